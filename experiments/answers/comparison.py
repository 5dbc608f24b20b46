"""Where a method's answers leave the baseline's, and how near a tie the target was there.

In half precision a pass over several rows rounds differently from a pass over one, so that a near tie may fall the other way;
a wide gap at a difference would be a fault.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from experiments.answers.answer_files import Answer
from experiments.inputs.questions import Question

NextLogits = Callable[[Sequence[int]], Float[np.ndarray, "V"]]
Encode = Callable[[Sequence[Mapping[str, str]]], list[int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """One turn that both answered, behind the same prompt.

    Attributes:
      question_id: of the question; turn: counted from 0.
      answered: the texts of the turns before, the same for both.
      base, tokens: the baseline's and the method's token ids.
    """

    question_id: int | str
    turn: int
    answered: tuple[str, ...]
    base: tuple[int, ...]
    tokens: tuple[int, ...]

    @property
    def difference(self) -> dict[str, Any] | None:
        """The first token that differs: question_id, turn, position in the answer, and the baseline's and the method's
        token; None for equal answers."""
        both = zip(self.base, self.tokens, strict=False)
        place = next((i for i, (theirs, ours) in enumerate(both) if theirs != ours), None)
        return None if place is None else {"question_id": self.question_id, "turn": self.turn, "position": place,
                                           "tokens": [self.base[place], self.tokens[place]]}


def pairs(found: Sequence[Answer], base: Sequence[Answer]) -> list[Pair]:
    """The comparable turns of each dialogue: up to and with the first whose text differs, the next ones' prompts differ too."""
    expected = {answer.question_id: answer for answer in base}
    result = []
    for answer in found:
        other = expected[answer.question_id]
        for turn, (theirs, ours) in enumerate(zip(other.token_ids, answer.token_ids, strict=False)):
            result.append(Pair(question_id=answer.question_id, turn=turn, answered=other.texts[:turn], base=theirs,
                               tokens=ours))
            if answer.texts[turn] != other.texts[turn]:
                break
    return result


def is_measured(recorded: Sequence[Mapping[str, Any]] | None, found: Sequence[Answer], base: Sequence[Answer]) -> bool:
    """Whether the record is what `measure` would make of these answers; no record counts where nothing differs."""
    places = [{key: entry[key] for key in ("question_id", "turn", "position", "tokens")} for entry in recorded or ()]
    return places == [pair.difference for pair in pairs(found, base) if pair.difference]


def measure(found: Sequence[Answer], base: Sequence[Answer], asked: Sequence[Question], encode: Encode,
            next_logits: NextLogits) -> list[dict[str, Any]]:
    """Every turn's first difference, as `Pair.difference` has it, with what the target thought of that place.

    Args:
      found, base: the method's and the baseline's answers.
      asked: their questions.
      encode: a dialogue's token ids.
      next_logits: the target's scores behind token ids.

    Returns:
      One entry a difference; "gap" is the lead of the best logit over the second, "top_two" says that the two tokens are
      these two.
    """
    questions = {question.id: question for question in asked}
    result = []
    for pair in pairs(found, base):
        if (entry := pair.difference) is not None:
            prompt = encode(questions[pair.question_id].messages(pair.answered))
            logits = next_logits([*prompt, *pair.base[:entry["position"]]])
            best = np.argsort(-logits, kind="stable")[:2]
            result.append({**entry, "gap": float(logits[best[0]] - logits[best[1]]),
                           "top_two": set(entry["tokens"]) == set(best.tolist())})
    return result
