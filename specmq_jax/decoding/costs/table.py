"""The table of costs: seconds of what rounds consist of on the present device, as they add up.

T_v(n) is known for some n and T_d for some depths; between them the curves are straight, and they never fall: more work takes
no less time, whatever a noisy machine says. What a round takes beside its drafting and its verification is the rest of whole
rounds.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Self

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
    """Seconds of something, in the median of some runs, in the fastest and in the slowest of them."""

    median: float
    fastest: float
    slowest: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Self:
        return cls(median=statistics.median(seconds), fastest=min(seconds), slowest=max(seconds))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """Seconds at some whole numbers, ascending; straight in between, and level beyond the ends.

    Attributes:
      at: the numbers; seconds: the medians of the runs there.
      spans: what the runs took, as measured; None where that is not known.
    """

    at: tuple[int, ...]
    seconds: tuple[float, ...]
    spans: tuple[Span, ...] | None = None

    @classmethod
    def rising(cls, at: Sequence[int], spans: Sequence[Span]) -> Self:
        """The curve nearest to the medians that does not fall."""
        return cls(at=tuple(at), seconds=isotonic([span.median for span in spans]), spans=tuple(spans))

    def __call__(self, number: float) -> float:
        return float(np.interp(number, self.at, self.seconds))

    @property
    def fastest(self) -> "Curve":
        """Of the fastest runs."""
        return self._of([span.fastest for span in self.spans or ()])

    @property
    def slowest(self) -> "Curve":
        """Of the slowest runs."""
        return self._of([span.slowest for span in self.spans or ()])

    @property
    def fall(self) -> float:
        """The largest share by which a measured median lies below or above the curve."""
        found = zip(self.seconds, self.spans or (), strict=False)
        return max((abs(span.median / seconds - 1) for seconds, span in found), default=0.0)

    def _of(self, seconds: Sequence[float]) -> "Curve":
        return Curve(at=self.at, seconds=isotonic(seconds)) if seconds else self


def isotonic(values: Sequence[float]) -> tuple[float, ...]:
    """The numbers nearest to these, in least squares, that do not fall: neighbours that do are replaced by their mean (the
    pool-adjacent-violators algorithm; Barlow and others, Statistical Inference under Order Restrictions, chapter 1)."""
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, size = value, 1
        while pools and pools[-1][0] > mean:
            before, pooled = pools.pop()
            mean, size = (before * pooled + mean * size) / (pooled + size), pooled + size
        pools.append((mean, size))
    return tuple(mean for mean, size in pools for _ in range(size))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of what a method's round consists of.

    Attributes:
      plain: a round of plain decoding.
      verify: T_v by rows.
      draft: a proposal, by its depth; of a hierarchy, that of its small model's head.
      rest: what else a round takes.
      small_verify, small_rest: the small model's T_v and the rest of its rounds; None for methods without a hierarchy.
      plain_spread: of a round of plain decoding, the fastest and the slowest run; None where they are not known.
    """

    plain: float
    verify: Curve
    draft: Curve
    rest: float = 0.0
    small_verify: Curve | None = None
    small_rest: float = 0.0
    plain_spread: tuple[float, float] | None = None

    @property
    def extremes(self) -> tuple["Costs", "Costs"]:
        """Of the fastest runs, and of the slowest."""
        verify, draft, small = self.verify, self.draft, self.small_verify
        return (dataclasses.replace(self, verify=verify.fastest, draft=draft.fastest, small_verify=small and small.fastest),
                dataclasses.replace(self, verify=verify.slowest, draft=draft.slowest, small_verify=small and small.slowest))

    def tree_round(self, depth: int, size: int) -> float:
        """A round with an EAGLE tree, or with a chain of depth + 1 nodes."""
        return self.draft(depth) + self.verify(size) + self.rest

    def inner_round(self, depth: int, size: int) -> float:
        """A round of the small model."""
        assert self.small_verify is not None  # of a hierarchy
        return self.draft(depth) + self.small_verify(size) + self.small_rest

    def hierarchical_round(self, depth: int, size: int, min_draft_length: int, inner_rounds: float, ahead: float) -> float:
        """A round whose draft takes `inner_rounds`; `ahead` is the share of rounds behind which the small model goes a token
        ahead."""
        assert self.small_verify is not None
        return (inner_rounds * self.inner_round(depth, size) + ahead * self.small_verify(2)
                + self.verify(min_draft_length + depth + 1) + self.rest)
