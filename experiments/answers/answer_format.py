"""One line of an answer file: what a run writes of a question, and what a report reads of it."""

import dataclasses
import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import specmq_jax as sm
from experiments.answers import metrics
from experiments.inputs.questions import Question
from specmq_jax.errors import UserError

_LARGEST = 1e18
"""Of the numbers of a line: sums of them, and their conversion to a float, stay finite."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What a report needs of one line of an answer file.

    Attributes:
      question_id, category: of the question.
      prompt_tokens: of each turn; empty in files of other programs.
      texts: each turn's answer; empty in files of other programs.
      token_ids: the same as token ids; empty in files of other programs.
      new_tokens: of each turn, the first and a stop token counted.
      wall_time: seconds of each turn's decode loop.
      prefill_time: seconds of each turn's prefill; empty in files of other programs.
      accept_lengths: of all rounds of all turns.
      draft_accept_lengths: of the rounds inside a hierarchical drafter; empty for others and in files of other programs.
      cut: why turns are missing, None where none is.
      decoding_steps: rounds of each turn; empty in files of other programs.
      model_id: what answered; empty in files of programs that don't say.
      slots: questions that were answered side by side; the times of more than one are no single-stream times.
    """

    question_id: int | str
    category: str
    prompt_tokens: tuple[int, ...]
    texts: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    new_tokens: tuple[int, ...]
    wall_time: tuple[float, ...]
    prefill_time: tuple[float, ...]
    accept_lengths: tuple[int, ...]
    draft_accept_lengths: tuple[int, ...]
    cut: str | None
    decoding_steps: tuple[int, ...] = ()
    model_id: str = ""
    slots: int = 1

    @property
    def speed(self) -> float | None:
        """Tokens/s, as `metrics.speed` has it; None among other questions, whose time it shares."""
        return metrics.speed(self.new_tokens, self.wall_time) if self.slots == 1 else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """One decoded turn: its prompt's length, what came of it, and the text it spells."""

    prompt_tokens: int
    generation: sm.Generation
    text: str


def record(question: Question, turns: Sequence[Turn], *, model_id: str, cut: str | None, slots: int = 1) -> dict[str, Any]:
    """The JSON object of one question; each list has one entry a turn, but for the accept lengths, which join them."""
    made = [turn.generation for turn in turns]
    new_tokens = [len(g.tokens) for g in made]
    choice = {
        "index": 0,
        "turns": [turn.text for turn in turns],
        "token_ids": [[int(token) for token in g.tokens] for g in made],
        "prompt_tokens": [turn.prompt_tokens for turn in turns],
        "decoding_steps": [len(g.accept_lengths) for g in made],
        "new_tokens": new_tokens,
        "wall_time": [g.seconds for g in made],
        "accept_lengths": [int(length) for g in made for length in g.accept_lengths],
        "draft_accept_lengths": [int(length) for g in made for length in g.draft_accept_lengths],
        "generate_speed": [metrics.speed([count], [g.seconds]) if slots == 1 else None
                           for count, g in zip(new_tokens, made, strict=True)],
        "prefill_time": [g.prefill_seconds for g in made],
        "draft_prefill_time": [g.draft_prefill_seconds for g in made],
        "cut": cut,
    } | ({"slots": slots} if slots > 1 else {})
    return {"question_id": question.id, "category": question.category, "answer_id": uuid.uuid4().hex,
            "model_id": model_id, "tstamp": time.time(), "choices": [choice]}


def parse(line: str | bytes, place: str) -> Answer:
    """The answer that a line holds, SpecMQuant's own included.

    Args:
      line: without its end; bytes are UTF-8.
      place: file and line, for messages.

    Raises:
      UserError: no JSON, or an entry that is missing or of another kind than in `record`.
    """
    try:
        found = json.loads(line)
        choice = found["choices"][0]
        fields = _Fields(choice, place)
        turns = len(fields.list("new_tokens", "whole numbers", _is_count))
        answer = Answer(
            question_id=found["question_id"], category=found["category"],
            prompt_tokens=fields.list("prompt_tokens", "whole numbers", _is_count, turns),
            texts=fields.list("turns", "texts", _is_text, turns),
            token_ids=tuple(map(tuple, fields.list("token_ids", "lists of whole numbers", _are_counts, turns))),
            new_tokens=fields.list("new_tokens", "whole numbers", _is_count),
            wall_time=fields.list("wall_time", "seconds", _is_number),
            prefill_time=fields.list("prefill_time", "seconds", _is_number, turns),
            accept_lengths=fields.list("accept_lengths", "whole numbers", _is_count),
            draft_accept_lengths=fields.list("draft_accept_lengths", "whole numbers", _is_count, None),
            decoding_steps=fields.list("decoding_steps", "whole numbers", _is_count, turns), cut=choice.get("cut"),
            model_id=str(found.get("model_id", "")), slots=choice.get("slots", 1))
    except KeyError as error:
        raise UserError(f"{place}: no answer of this format, {error.args[0]!r} is missing") from None
    except (ValueError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise UserError(f"{place}: no answer of this format ({error})") from None
    _check(answer, place)
    return answer


def _check(answer: Answer, place: str) -> None:
    ident = answer.question_id
    if not isinstance(ident, int | str) or isinstance(ident, bool) or not isinstance(answer.category, str):
        raise UserError(f"{place}: no answer of this format, question_id must be a number or a text, and category a text")
    if answer.token_ids and not answer.texts:
        raise UserError(f"{place}: no answer of this format, 'turns' is missing beside 'token_ids'")
    if not _is_count(answer.slots) or answer.slots < 1:
        raise UserError(f"{place}: no answer of this format, 'slots' must be a whole number above 0")
    if not isinstance(answer.cut, str | None):
        raise UserError(f"{place}: no answer of this format, 'cut' must be a text or null")
    if not answer.new_tokens or len(answer.new_tokens) != len(answer.wall_time) or not (
            sum(answer.wall_time) > 0 or max(answer.new_tokens) <= 1):
        raise UserError(f"{place}: new_tokens and wall_time need one entry a turn, and time must have passed where a turn has "
                        "more than one token")


_NEEDED = object()


@dataclasses.dataclass(frozen=True)
class _Fields:
    """The lists of a choice."""

    choice: Mapping[str, Any]
    place: str

    def list(self, key: str, kind: str, accepted: Callable[[Any], bool], turns: Any = _NEEDED) -> tuple[Any, ...]:
        """The entries of `key`; it may be absent where `turns` is given, and where that is a number has as many entries, or
        none."""
        value = self.choice[key] if turns is _NEEDED else self.choice.get(key, [])
        if not isinstance(value, list) or not all(map(accepted, value)):
            raise UserError(f"{self.place}: no answer of this format, {key!r} must be a list of {kind}")
        if isinstance(turns, int) and len(value) not in (0, turns):
            raise UserError(f"{self.place}: no answer of this format, {key!r} has {len(value)} entries for {turns} turns")
        return tuple(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= _LARGEST


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
