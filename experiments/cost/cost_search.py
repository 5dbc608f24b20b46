"""The cost model: the time a token takes for every depth and size of drafts, T_avg = (d T_d + T_v(n)) / tau(n, d).

The speed model of arXiv 2505.22179, with what a round takes beside the two added to its time.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Int32

import specmq_jax as sm
from experiments.cost.acceptance import Count, SmallModel, count_rounds, tree_lengths
from experiments.running.methods import Choice
from specmq_jax.decoding.costs.table import Costs

Ranks = Int32[np.ndarray, "R D D"]
"""Of an answer's places, as `acceptance.text_ranks` has them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the model says of one setting.

    Attributes:
      choice: the setting.
      accept_length: tau, tokens a round.
      seconds: of a round.
      speedup: over plain decoding.
      spread: seconds of a round of the fastest and of the slowest runs of its parts; None where they are not known.
      inner_accept_length: tokens that a round of a hierarchy's small model drafts; None for other methods.
    """

    choice: Choice
    accept_length: float
    seconds: float
    speedup: float
    spread: tuple[float, float] | None = None
    inner_accept_length: float | None = None


def plain(costs: Costs) -> Prediction:
    """Plain decoding."""
    return Prediction(choice=Choice(method="baseline"), accept_length=1.0, seconds=costs.plain, speedup=1.0,
                      spread=costs.plain_spread)


def chains(costs: Costs, agreements: Sequence[Int32[np.ndarray, "R"]], lengths: Sequence[int]) -> Iterator[Prediction]:
    """Of chains of the lengths given, from each answer's `acceptance.agreement`."""
    sides = costs, *costs.extremes
    for length in lengths:
        count = _count(agreements, lambda runs, length=length: np.minimum(runs, length) + 1)
        seconds = [side.tree_round(length, length + 1) for side in sides]
        yield _prediction(Choice(method="spec", draft_length=length), count, seconds, costs)


def trees(method: str, costs: Costs, answers: Sequence[Ranks], top_k: int, sizes: Sequence[int], depths: Sequence[int]
          ) -> Iterator[Prediction]:
    """Of EAGLE trees of every depth and size that has candidates enough."""
    sides = costs, *costs.extremes
    for tree in _shapes(top_k, sizes, depths):
        count = _count(answers, lambda ranks, tree=tree: tree_lengths(ranks, tree.depth, tree.size))
        seconds = [side.tree_round(tree.depth, tree.size) for side in sides]
        yield _prediction(Choice(method=method, tree=tree), count, seconds, costs)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class SmallRanks:
    """What a small model and its head do at the places of an answer.

    Attributes:
      agreement: i32[R], as in `acceptance.SmallModel`.
      ranks: of the head's candidates at each place, against the small model's own tokens.
      strayed: ranks along the small model's own text, by the place where it disagrees.
    """

    agreement: Int32[np.ndarray, "R"]
    ranks: Ranks
    strayed: Mapping[int, Ranks]

    def shaped(self, tree: sm.TreeConfig) -> SmallModel:
        """With trees of one shape."""
        return SmallModel(agreement=self.agreement, lengths=tree_lengths(self.ranks, tree.depth, tree.size),
                          strayed={place: tree_lengths(ranks, tree.depth, tree.size) for place, ranks in self.strayed.items()})


def hierarchies(costs: Costs, answers: Sequence[SmallRanks], top_k: int, sizes: Sequence[int], depths: Sequence[int],
                min_draft_lengths: Sequence[int], *, always_ahead: bool = False) -> Iterator[Prediction]:
    """Of the hierarchy with inner trees of every depth and size and every least draft."""
    sides = costs, *costs.extremes
    for tree in _shapes(top_k, sizes, depths):
        shaped = [answer.shaped(tree) for answer in answers]
        for length in min_draft_lengths:
            count = sum((answer.count(length, always_ahead=always_ahead) for answer in shaped), Count())
            if count.rounds:
                inner, ahead = count.inner_rounds / count.rounds, count.ahead / count.rounds
                seconds = [side.hierarchical_round(tree.depth, tree.size, length, inner, ahead) for side in sides]
                made = _prediction(Choice(method="hier", tree=tree, min_draft_length=length), count, seconds, costs)
                yield dataclasses.replace(made, inner_accept_length=count.drafted / max(count.inner_rounds, 1))


def _shapes(top_k: int, sizes: Sequence[int], depths: Sequence[int]) -> Iterator[sm.TreeConfig]:
    for depth in depths:
        most = sm.TreeConfig.fitting(depth, top_k).size
        for size in sizes:
            if 2 <= size <= most:
                yield sm.TreeConfig(depth=depth, top_k=top_k, size=size)


def _count(answers: Sequence[np.ndarray], lengths: Callable[[np.ndarray], Int32[np.ndarray, "R"]]) -> Count:
    return sum((Count(tokens=len(answer), rounds=count_rounds(lengths(answer))) for answer in answers), Count())


def _prediction(choice: Choice, count: Count, seconds: Sequence[float], costs: Costs) -> Prediction:
    """`seconds` are those of a round, of its fastest runs and of its slowest."""
    usual, fastest, slowest = seconds
    return Prediction(choice=choice, accept_length=count.accept_length, seconds=usual, spread=(fastest, slowest),
                      speedup=costs.plain * count.accept_length / usual)
