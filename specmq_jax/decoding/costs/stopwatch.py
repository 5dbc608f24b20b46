"""Measures the table of costs of a model and of what drafts for it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from specmq_jax.decoding.config import DecodeConfig, TreeConfig
from specmq_jax.decoding.costs.parts import Parts, some_tree
from specmq_jax.decoding.costs.table import Costs, Curve, Span
from specmq_jax.decoding.costs.timing import Timing
from specmq_jax.decoding.costs.traffic import rounds_ahead
from specmq_jax.decoding.decode import Decoder
from specmq_jax.decoding.drafters import ChainDrafter, Drafter, EagleDrafter, HierarchicalDrafter, NoDrafter
from specmq_jax.decoding.tree import DraftTree
from specmq_jax.loading.model import Model
from specmq_jax.words import count

_HIERARCHICAL_ROUNDS, _HIERARCHICAL_RUNS = 16, 3
BUSY = 0.1
"""Share by which times may contradict one another before they are doubted."""

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ladder:
    """Where to measure.

    Attributes:
      rows: n of T_v(n), ascending from 1.
      depths: of EAGLE trees, ascending from 1.
      lengths: of chains that a small model drafts, ascending from 1.
      runs: of each loop, of which the median counts.
    """

    rows: tuple[int, ...]
    depths: tuple[int, ...]
    lengths: tuple[int, ...]
    runs: int = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stopwatch:
    """Times one model's passes and the drafting for it behind one prompt.

    Attributes:
      model: that verifies.
      config: of the decoding.
      prompt: ids.
      ladder: where to measure.
      say: is told each figure.
    """

    model: Model
    config: DecodeConfig
    prompt: tuple[int, ...]
    ladder: Ladder
    say: Say

    def plain(self, name: str) -> Costs:
        """Of plain decoding and of verification alone; `name` is what the model is called where it is spoken of."""
        verify, whole = self.verify(name), self._rounds("baseline", NoDrafter())
        return Costs(plain=whole.median, plain_spread=(whole.fastest, whole.slowest), verify=verify,
                     draft=Curve(at=(0,), seconds=(0.0,)))

    def drafting(self, name: str, drafter: EagleDrafter | ChainDrafter | HierarchicalDrafter, plain: Costs) -> Costs:
        """Of a drafter, its kind with other depths, sizes and lengths, beside what `plain` measured of the model."""
        if isinstance(drafter, HierarchicalDrafter):
            return self._hierarchical(name, drafter, plain)
        costs = dataclasses.replace(plain, draft=self._draft(name, self._variants(drafter)))
        parts = costs.tree_round(drafter.max_depth, drafter.tree_size)
        return dataclasses.replace(costs, rest=self._rest(name, self._rounds(name, drafter).median, parts))

    def verify(self, name: str) -> Curve:
        """T_v(n) of trees as deep as the ladder goes."""
        parts = self._parts(_Wide(tree_size=max(self.ladder.rows)))
        spans = []
        for rows in self.ladder.rows:
            tree = some_tree(rows, self.model.config.vocab_size).replace(max_depth=min(rows - 1, self.ladder.depths[-1]))
            timing = parts.verify(tree if rows > 1 else DraftTree.chain(tree.tokens))
            spans.append(self._told(f"T_v({rows}) of {name}", timing))
        return self._rising(f"T_v(n) of {name}", self.ladder.rows, spans)

    def _hierarchical(self, name: str, drafter: HierarchicalDrafter, plain: Costs) -> Costs:
        inner, small = drafter.inner, dataclasses.replace(self, model=drafter.model)
        costs = dataclasses.replace(plain, small_verify=small.verify("the small model"),
                                    draft=small._draft("the small model's head", small._variants(inner)))
        alone = small._rounds("the small model", inner).median
        costs = dataclasses.replace(costs, small_rest=self._rest(
            "the small model", alone, costs.inner_round(inner.tree.depth, inner.tree.size)))
        # enough rounds for what differs from round to round
        timing, end = self._parts(drafter, runs=_HIERARCHICAL_RUNS, least=_HIERARCHICAL_ROUNDS).rounds()
        accepted, drafted = np.asarray(end.accept_lengths)[:timing.steps], drafter.accept_lengths(end.drafter)
        parts = costs.hierarchical_round(
            inner.tree.depth, inner.tree.size, drafter.min_draft_length, len(drafted) / timing.steps,
            rounds_ahead(drafter, accepted, drafted) / timing.steps)
        whole = self._told(f"whole round of {name}", timing)
        return dataclasses.replace(costs, rest=self._rest(name, whole.median, parts))

    def _variants(self, drafter: EagleDrafter | ChainDrafter) -> Mapping[int, Drafter]:
        """By depth; trees have as many nodes as the drafter's where the depth allows as many."""
        if isinstance(drafter, ChainDrafter):
            return {length: dataclasses.replace(drafter, length=length) for length in self.ladder.lengths}
        tree = drafter.tree
        return {depth: dataclasses.replace(drafter, tree=TreeConfig.fitting(depth, tree.top_k, tree.size))
                for depth in self.ladder.depths}

    def _draft(self, name: str, drafters: Mapping[int, Drafter]) -> Curve:
        parts = self._parts(drafters[max(drafters)])
        spans = [self._told(f"draft of {name}, depth {depth}", parts.draft(drafters[depth])[0]) for depth in sorted(drafters)]
        return self._rising(f"drafting of {name}", sorted(drafters), spans)

    def _rounds(self, name: str, drafter: Drafter) -> Span:
        return self._told(f"whole round of {name}", self._parts(drafter).rounds()[0])

    def _parts(self, drafter: Drafter, *, runs: int | None = None, least: int = 2) -> Parts:
        parts = Parts(Decoder(self.model, drafter, self.config), runs=runs or self.ladder.runs, least=least)
        parts.start(self.prompt)
        return parts

    def _told(self, what: str, timing: Timing) -> Span:
        span = Span.of(timing.seconds)
        self.say(f"{what}: {1e3 * span.median:.3g} ms ({1e3 * span.fastest:.3g} to {1e3 * span.slowest:.3g} in "
                 f"{count(len(timing.seconds), 'run')})")
        return span

    def _rising(self, what: str, at: Sequence[int], spans: Sequence[Span]) -> Curve:
        curve = Curve.rising(at, spans)
        if curve.fall > BUSY:
            self.say(f"{what} was measured to fall where there is more to do, {curve.fall:.0%} from a curve that doesn't; "
                     "something else keeps the device busy, and the predictions will be off")
        return curve

    def _rest(self, name: str, whole: float, parts: float) -> float:
        """What a round takes beside its parts."""
        if parts > (1 + BUSY) * whole:
            self.say(f"{name}: drafting and verification took {1e3 * parts:.3g} ms apart and {1e3 * whole:.3g} ms in a round; "
                     "something else keeps the device busy, and the predictions will be off")
        return max(0.0, whole - parts)


@dataclasses.dataclass(frozen=True, eq=False)
class _Wide(NoDrafter):
    """Proposes nothing, in a cache with room for trees of `tree_size` nodes."""

    tree_size: int = 1
