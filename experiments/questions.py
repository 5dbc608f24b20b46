"""Question files in MT-Bench's format: one JSON object a line, with question_id, category and turns."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from specmq_jax.errors import UserError

SMALL = pathlib.Path(__file__).parent / "data" / "mt_bench_small.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """One dialogue to be held.

    Attributes:
      id: unique in its file.
      category: for example "writing".
      turns: what the user says, one text a turn.
    """

    id: int | str
    category: str
    turns: tuple[str, ...]

    def messages(self, answered: Sequence[str]) -> list[dict[str, str]]:
        """The dialogue up to the turn that awaits its answer, behind the turns answered before."""
        messages = []
        for said, text in zip(self.turns, answered, strict=False):
            messages += [{"role": "user", "content": said}, {"role": "assistant", "content": text}]
        return [*messages, {"role": "user", "content": self.turns[len(answered)]}]


def load(path: pathlib.Path, begin: int = 0, end: int | None = None) -> list[Question]:
    """Questions `begin` (counted from 0) up to, but not with, `end` of a file; other keys than the three are ignored.

    Raises:
      UserError: the file can't be read, a line is malformed (its number and fault are named), two questions share an
        id, or the range is empty or runs past the file.
    """
    questions, lines = [], {}
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        question = _parse(line, f"{path}, line {number}")
        if question.id in lines:
            raise UserError(f"{path}, line {number}: question_id {question.id!r} was already used in line "
                            f"{lines[question.id]}; ids must differ")
        lines[question.id] = number
        questions.append(question)
    if not questions:
        raise UserError(f"{path} holds no questions; expected one JSON object a line")
    end = len(questions) if end is None else end
    if end > len(questions):
        raise UserError(f"--question_end={end} lies past the {len(questions)} questions of {path}; choose at most "
                        f"{len(questions)}")
    if not 0 <= begin < end:
        raise UserError(f"--question_begin={begin} and --question_end={end} leave no question; the first must be 0 or "
                        "more and below the second")
    return questions[begin:end]


def digest(questions: Sequence[Question]) -> str:
    """Tells two sets of questions apart, wherever their files lie."""
    text = json.dumps([dataclasses.asdict(question) for question in questions])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"the question file {path} does not exist") from None
    except OSError as error:
        raise UserError(f"the question file {path} can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"the question file {path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def _parse(line: str, place: str) -> Question:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not valid JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(record, dict):
        raise UserError(f"{place}: expected a JSON object; found a {type(record).__name__}")

    def field(key: str, kind: str, accepted: bool) -> Any:
        if key not in record:
            raise UserError(f"{place}: {key!r} is missing")
        if not accepted:
            raise UserError(f"{place}: {key!r} must be {kind}; found {json.dumps(record[key])[:60]}")
        return record[key]

    ident, category, turns = (record.get(key) for key in ("question_id", "category", "turns"))
    return Question(
        id=field("question_id", "a number or a text", isinstance(ident, int | str) and not isinstance(ident, bool)),
        category=field("category", "a text", _is_text(category)),
        turns=tuple(field("turns", "a list of at least one text", isinstance(turns, list) and bool(turns)
                          and all(map(_is_text, turns)))))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
