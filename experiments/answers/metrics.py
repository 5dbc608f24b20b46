"""What an evaluation reports: speed, acceptance, equality of answers, and how near the device's memory bandwidth it came.

The definitions are those of SpecMQuant's evaluation (https://github.com/AI9Stars/SpecMQuant, `evaluation/`).
"""

import statistics
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int64


def speed(new_tokens: Sequence[int], seconds: Sequence[float]) -> float | None:
    """Tokens/s of one question: all new tokens of its turns over the seconds of their decode loops.

    A turn's first token counts, though it comes with the prefill, whose time does not.

    Args:
      new_tokens: of each turn.
      seconds: of each turn's decode loop.

    Returns:
      The speed; None where no turn has a second token or no time has passed, as nothing was decoded then.
    """
    total = sum(seconds)
    return sum(new_tokens) / total if total > 0 and max(new_tokens) > 1 else None


def mean_speed(speeds: Iterable[float | None]) -> float | None:
    """Tokens/s of a run: the mean of its questions' speeds; None where no question has one."""
    found = [value for value in speeds if value is not None]
    return statistics.fmean(found) if found else None


def ratio(value: float | None, base: float | None) -> float | None:
    """A speed over another; None where there is no such ratio."""
    return value / base if value is not None and base else None


def mean_accept_length(accept_lengths: Sequence[int]) -> float:
    """Tokens a round commits, the bonus token counted, over all rounds; 1.0 where there was none."""
    return statistics.fmean(accept_lengths) if len(accept_lengths) else 1.0


def accept_histogram(accept_lengths: Sequence[int]) -> Int64[np.ndarray, "L"]:
    """How many rounds accepted i + 1 tokens, at index i."""
    return np.bincount(np.asarray(accept_lengths, np.int64), minlength=2)[1:]
