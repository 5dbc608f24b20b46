"""What one run's answers come to beside another's over the same questions."""

import dataclasses
import statistics
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from experiments.answers import comparison, metrics
from experiments.answers.answer_files import Answer

_RESAMPLES, _RESAMPLES_AT_ONCE = 10_000, 500
LEVEL = 0.95
"""Of the bootstrap intervals."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """A run's figures over some questions, and those relative to a base's answers to the same questions.

    Attributes:
      questions: how many.
      tokens_per_second, base_tokens_per_second: means over questions, the run's and the base's; None where no question has a
        speed.
      mean_ratio: mean over questions of the run's speed over the base's; None where no question has both.
      interval: its bootstrap interval; None for less than two questions with both.
      accept_length: mean over rounds, the bonus token counted; None where there was no round.
      identical_share: of the turns whose prompts are the same, those whose answers are too; None where a file holds neither
        token ids nor texts.
      compared_turns, turns: how many turns these are, and how many the run has.
    """

    questions: int
    tokens_per_second: float | None
    base_tokens_per_second: float | None
    mean_ratio: float | None
    interval: tuple[float, float] | None
    accept_length: float | None
    identical_share: float | None
    compared_turns: int
    turns: int

    @property
    def speedup(self) -> float | None:
        """The mean speed over the base's: a ratio of means, as in SpecMQuant's evaluation."""
        return metrics.ratio(self.tokens_per_second, self.base_tokens_per_second)


def compare(found: Sequence[Answer], base: Sequence[Answer]) -> Figures:
    """The figures of `found` beside `base`, which answers the same questions in any order."""
    expected = {answer.question_id: answer for answer in base}
    others = [expected[answer.question_id] for answer in found]
    both = (metrics.ratio(answer.speed, other.speed) for answer, other in zip(found, others, strict=True))
    ratios = np.array([ratio for ratio in both if ratio is not None])
    accepted = [length for answer in found for length in answer.accept_lengths]
    same = _same_turns(found, others)
    return Figures(
        questions=len(found), tokens_per_second=metrics.mean_speed(answer.speed for answer in found),
        base_tokens_per_second=metrics.mean_speed(other.speed for other in others),
        mean_ratio=float(ratios.mean()) if len(ratios) else None,
        interval=bootstrap_interval(ratios) if len(ratios) > 1 else None,
        accept_length=metrics.mean_accept_length(accepted) if accepted else None,
        identical_share=statistics.fmean(same) if same else None, compared_turns=len(same),
        turns=sum(len(answer.new_tokens) for answer in found))


def bootstrap_interval(values: Float[np.ndarray, "n"], level: float = LEVEL) -> tuple[float, float]:
    """The percentile bootstrap interval of a mean (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13).

    Args:
      values: drawn independently; here one a question.
      level: the probability that such intervals cover the mean which the values were drawn around.

    Returns:
      The lower and the upper bound, the same in every call for the same values.
    """
    rng = np.random.default_rng(0)
    means = np.concatenate([rng.choice(values, (_RESAMPLES_AT_ONCE, len(values))).mean(axis=1)
                            for _ in range(_RESAMPLES // _RESAMPLES_AT_ONCE)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _same_turns(found: Sequence[Answer], base: Sequence[Answer]) -> list[bool]:
    """Whether they are the same, of each turn behind the same prompt: by token ids, or by text where a file has no ids."""
    if all(answer.token_ids for answer in (*found, *base)):
        return [pair.tokens == pair.base for pair in comparison.pairs(found, base)]
    same: list[bool] = []
    for answer, other in zip(found, base, strict=True):
        for ours, theirs in zip(answer.texts, other.texts, strict=False):
            same.append(ours == theirs)
            if not same[-1]:
                break
    return same
