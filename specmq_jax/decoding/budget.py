"""How much an engine's calls draft: the drafter's whole tree, a smaller one, or nothing.

A round of n sequences commits n times the accept length in the time that such a round takes. With few sequences a pass reads
weights whatever its rows are, and drafts come almost for nothing; with many each row has its price, and fewer pay. What a round
takes is measured, by sequences and tree, and what it commits is learned from the rounds that are decoded (the goodput of arXiv
2406.14066).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from specmq_jax.decoding.config import TreeConfig
from specmq_jax.decoding.costs.table import Curve, Span
from specmq_jax.decoding.costs.timing import seconds_each
from specmq_jax.decoding.drafters import ChainDrafter, Drafter, EagleDrafter, NoDrafter

MOST_ROWS = 512
"""Rows of a call's pass, beyond which each more costs as much as the first: no draft pays where its rows don't come cheaper."""

_MARGIN = 0.01
"""Share by which drafting must be expected to be faster than plain decoding, which cannot disappoint."""
_FORGOTTEN = 1 / 32
"""Share of what was learned that each call makes count less."""
_TRIALS, _LEAST_CALLS = 0.002, 16
"""Share of the time that a choice is tried with for which another is faster, and the calls in between at least."""


def choices(drafter: Drafter) -> tuple[Drafter, ...]:
    """What calls choose from: the drafter, the same with smaller trees over the same state, and, last, none.

    A quarter of an EAGLE tree's nodes from half the candidates a row; half of a chain. A hierarchy's state has room for drafts
    of one length.
    """
    smaller: tuple[Drafter, ...] = ()
    match drafter:
        case NoDrafter():
            return (drafter,)
        case EagleDrafter(tree=tree) if tree.size >= 8:
            size = tree.size // 4
            smaller = (dataclasses.replace(
                drafter, tree=TreeConfig.fitting(min(tree.depth, size - 1), max(1, tree.top_k // 2), size)),)
        case ChainDrafter(length=length) if length > 1:
            smaller = (dataclasses.replace(drafter, length=length // 2),)
    return (drafter, *smaller, NoDrafter())


def affordable(drafters: Sequence[Drafter], size: int) -> tuple[int, ...]:
    """Which of the choices there are for calls of `size` sequences: those of at most `MOST_ROWS` rows, and the last."""
    return tuple(choice for choice, drafter in enumerate(drafters)
                 if size * drafter.tree_size <= MOST_ROWS or choice == len(drafters) - 1)


def measure(calls: Mapping[int, Callable[[], Any]], lengths: Sequence[int], fill: Callable[[int], None]) -> dict[int, Curve]:
    """What calls take, which give what they make, behind caches that were filled to some lengths, ascending."""
    spans: dict[int, list[Span]] = {choice: [] for choice in calls}
    for length in lengths:
        fill(length)
        for choice, call in calls.items():
            spans[choice].append(Span.of(seconds_each(call)))
    return {choice: Curve.rising(lengths, found) for choice, found in spans.items()}


@dataclasses.dataclass
class _Learned:
    """A mean over rounds, the newest of which count most.

    Attributes:
      tokens: a round, in the mean; rounds: that the mean counts for; calls: since it was chosen.
    """

    tokens: float = 0.0
    rounds: float = 0.0
    calls: int = 0


class Budget:
    """Chooses for each call the drafting that is expected to commit most tokens a second.

    What has never been tried is expected to accept half of its depth, though no more than the larger trees before it. What
    is not chosen is tried again now and then, so rarely that the loss stays within 0.2 % of the time. The same calls and
    times give the same choices.
    """

    def __init__(self, depths: Sequence[int]) -> None:
        """Of choices with so deep trees, the largest first, and plain decoding, of depth 0, last."""
        self._depths = tuple(depths)
        self._learned = [_Learned() for _ in depths]
        self._curves: dict[tuple[int, int], Mapping[int, Curve]] = {}

    def measured(self, size: int, needs: int, seconds: Mapping[int, Curve]) -> None:
        """Sets what a call of `size` sequences takes, by the tokens of each, for every choice that there is for so many, where
        sampling `needs` so much."""
        self._curves[size, needs] = dict(seconds)

    def accept_length(self, choice: int) -> float:
        """Tokens that a round is expected to commit."""
        if not self._depths[choice]:
            return 1.0
        if self._learned[choice].rounds:
            return self._learned[choice].tokens
        expected = 1 + self._depths[choice] / 2
        return min([expected, *(self.accept_length(larger) for larger in range(choice))])

    def choose(self, size: int, needs: int, length: float) -> int:
        """The choice for the next call, of sequences of so many tokens in the mean; the first where nothing was measured."""
        curves = self._curves.get((size, needs)) or self._curves.get((size, 0)) or {}
        times = {choice: curve(length) for choice, curve in curves.items()}
        best = self._fastest(times) if times else 0
        chosen = next((choice for choice in times if self._is_due(choice, best, times)), best)
        for choice, learned in enumerate(self._learned):
            learned.calls = 0 if choice == chosen else learned.calls + 1
        return chosen

    def learn(self, choice: int, tokens: int, rounds: int) -> None:
        """Takes in that a call's rounds, those of all its sequences together, have committed so many tokens."""
        for learned in self._learned:
            learned.rounds *= 1 - _FORGOTTEN
        learned = self._learned[choice]
        if rounds:
            learned.tokens = (learned.tokens * learned.rounds + tokens) / (learned.rounds + rounds)
            learned.rounds += rounds

    def _fastest(self, times: Mapping[int, float]) -> int:
        def rate(choice: int) -> float:
            return self.accept_length(choice) / times[choice] * (1 if self._depths[choice] else 1 + _MARGIN)

        return max(times, key=rate)

    def _is_due(self, choice: int, best: int, times: Mapping[int, float]) -> bool:
        """Whether another choice than the fastest is to be tried again. Plain decoding needs no trial."""
        if choice == best or not self._depths[choice]:
            return False
        lost = times[choice] - self.accept_length(choice) / self.accept_length(best) * times[best]
        if not self._depths[best]:  # what drafters lag behind by is put at a call
            lost += times[best]
        return self._learned[choice].calls >= max(_LEAST_CALLS, math.ceil(lost / (_TRIALS * times[best])))
