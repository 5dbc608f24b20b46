"""Questions of a benchmark, read from its own file format."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from checkpoints_tools import records
from checkpoints_tools.records import Record
from specmq_jax.errors import UserError
from specmq_jax.words import count

SAMPLES = pathlib.Path(__file__).parents[1] / "data"
SMALL = SAMPLES / "mt_bench_small.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """One dialogue to be held.

    Attributes:
      id: unique in its file.
      category: for example "writing".
      turns: what the user says, one text a turn.
      reference: what an answer is scored by; empty where answers are not scored.
    """

    id: int | str
    category: str
    turns: tuple[str, ...]
    reference: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def messages(self, answered: Sequence[str]) -> list[dict[str, str]]:
        """The dialogue up to the turn that awaits its answer, behind the turns answered before."""
        messages = []
        for said, text in zip(self.turns, answered, strict=False):
            messages += [{"role": "user", "content": said}, {"role": "assistant", "content": text}]
        return [*messages, {"role": "user", "content": self.turns[len(answered)]}]


Parse = Callable[[Record], Question]


def dialogue(record: Record) -> Question:
    """A question in MT-Bench's format: question_id, category and turns; other keys are ignored.

    Raises:
      UserError: one of the three is missing or of the wrong kind.
    """
    ident, category, turns = (record.values.get(key) for key in ("question_id", "category", "turns"))
    return Question(
        id=record.field("question_id", "a number or a text", isinstance(ident, int | str) and not isinstance(ident, bool)),
        category=record.field("category", "a text", records.is_text(category)),
        turns=tuple(record.field("turns", "a list of at least one text", isinstance(turns, list) and bool(turns)
                                 and all(map(records.is_text, turns)))))


def load(path: pathlib.Path, begin: int = 0, end: int | None = None, *, parse: Parse = dialogue) -> list[Question]:
    """Questions `begin` (counted from 0) up to, but not with, `end` of a file.

    Raises:
      UserError: the file can't be read, a line is malformed (its number and fault are named), two questions share an
        id, or the range is empty or runs past the file.
    """
    found: list[Question] = []
    places: dict[int | str, str] = {}
    for record in records.read(path):
        question = parse(record)
        if question.id in places:
            raise UserError(f"{record.place}: question_id {question.id!r} was already used in "
                            f"{places[question.id].removeprefix(f'{path}, ')}; ids must differ")
        places[question.id] = record.place
        found.append(question)
    if not found:
        raise UserError(f"{path} holds no questions; expected one JSON object a line")
    end = len(found) if end is None else end
    if end > len(found):
        raise UserError(f"--question_end={end} lies past the {count(len(found), 'question')} of {path}; choose at most "
                        f"{len(found)}")
    if not 0 <= begin < end:
        raise UserError(f"--question_begin={begin} and --question_end={end} leave no question; the first must be 0 or "
                        "more and below the second")
    return found[begin:end]


def digest(questions: Sequence[Question]) -> str:
    """Tells two sets of questions apart, wherever their files lie; references don't count, they change no answer."""
    text = json.dumps([{"id": q.id, "category": q.category, "turns": q.turns} for q in questions])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
