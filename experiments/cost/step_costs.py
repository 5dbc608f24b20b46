"""Seconds of a round's parts on the present machine, as the cost model adds them up.

T_v(n) is measured for some n and T_d for some depths; between them the curves are straight, and they never fall: more work
takes no less time, whatever a noisy machine says. What a round takes beside its drafting and its verification is measured once
a method, as the rest of whole rounds.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

import specmq_jax as sm
from experiments.display.cells import milliseconds, percent
from experiments.timing.timed_loops import Timing, repeated_draft, repeated_verify, some_tree, time_loop
from specmq_jax.decoding.tree import DraftTree
from specmq_jax.words import count

_HIERARCHICAL_ROUNDS, _HIERARCHICAL_RUNS = 16, 3
BUSY = 0.1
"""Share by which times may contradict one another before they are doubted."""

Say = Callable[[str], None]


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
class Whole:
    """Whole rounds: the time of one, and in it the rounds of a hierarchy's small model and its passes that go a token ahead."""

    span: Span
    inner_rounds: float = 0.0
    ahead: float = 0.0

    @property
    def seconds(self) -> float:
        """Median of the runs."""
        return self.span.median


class Stopwatch:
    """Times one model's passes and the drafting for it behind one prompt."""

    def __init__(self, model: sm.Model, config: sm.DecodeConfig, prompt: Sequence[int], ladder: Ladder, say: Say) -> None:
        """`config` holds no stop tokens, which would end a measurement; `say` is told each figure."""
        self._model, self._config, self._prompt, self._ladder, self._say = model, config, tuple(prompt), ladder, say

    def verify(self, name: str, max_depth: int) -> Curve:
        """T_v(n) of trees at most so deep."""
        decoder = sm.Decoder(self._model, _Wide(tree_size=max(self._ladder.rows)), self._config)
        loop, cache, seconds = repeated_verify(decoder.module), decoder.prefill(self._prompt).cache, []
        for rows in self._ladder.rows:
            tree = some_tree(rows, self._model.config.vocab_size).replace(max_depth=min(rows - 1, max_depth))
            tree = tree if rows > 1 else DraftTree.chain(tree.tokens)
            timing, _, (cache, _) = self._time(loop, self._model.params, (cache, tree))
            seconds.append(self._told(f"T_v({rows}) of {name}", timing))
        return self._rising(f"T_v(n) of {name}", self._ladder.rows, seconds)

    def draft(self, name: str, drafters: Mapping[int, sm.Drafter]) -> Curve:
        """Seconds of a proposal by its depth; the drafters differ in nothing else."""
        deepest = drafters[max(drafters)]
        state, seconds = sm.Decoder(self._model, deepest, self._config).prefill(self._prompt), []
        root, drafter_state = state.tokens[len(self._prompt)], state.drafter
        for depth, drafter in sorted(drafters.items()):
            timing, _, (_, drafter_state) = self._time(repeated_draft(drafter), drafter.params,
                                                       (jnp.copy(root), drafter_state))
            seconds.append(self._told(f"draft of {name}, depth {depth}", timing))
        return self._rising(f"drafting of {name}", sorted(drafters), seconds)

    def rounds(self, name: str, drafter: sm.Drafter | None) -> Whole:
        """Whole rounds, in the loop that `generate` runs."""
        decoder = sm.Decoder(self._model, drafter, self._config)
        timing, _, _ = self._time(decoder.loop, decoder.params, decoder.prefill(self._prompt), most=self._most_rounds(decoder))
        return Whole(span=self._told(f"whole round of {name}", timing))

    def hierarchical_rounds(self, name: str, drafter: sm.HierarchicalDrafter) -> Whole:
        """Whole rounds of a hierarchy, enough of them for what differs from round to round."""
        decoder = sm.Decoder(self._model, drafter, self._config)
        rounds, seconds = min(_HIERARCHICAL_ROUNDS, self._most_rounds(decoder)), []
        for run in range(1 + _HIERARCHICAL_RUNS):
            state = jax.block_until_ready(decoder.prefill(self._prompt))
            most = jax.device_put(jnp.int32(rounds), state.rounds.sharding)
            start = time.perf_counter()
            state = jax.block_until_ready(decoder.loop(decoder.params, state, most))
            if run:  # the first compiles
                seconds.append((time.perf_counter() - start) / rounds)
        inner = drafter.accept_lengths(state.drafter)
        accepted = np.asarray(state.accept_lengths)[:rounds]
        ahead = rounds_ahead(accepted, inner, drafter.min_draft_length, always_ahead=drafter.draft_model_start)
        timing = Timing(seconds=tuple(seconds), steps=rounds, first_call=0.0)
        return Whole(span=self._told(f"whole round of {name}", timing), inner_rounds=len(inner) / rounds,
                     ahead=ahead / rounds)

    def _most_rounds(self, decoder: sm.Decoder) -> int:
        """That the cache has room for, even if everything is accepted."""
        return max(1, (self._config.max_len - len(self._prompt) - 1) // (decoder.drafter.max_depth + 1))

    def _time(self, loop: Any, params: Any, carry: Any, **bound: int) -> tuple[Timing, Any, Any]:
        return time_loop(loop, params, carry, runs=self._ladder.runs, **bound)

    def _told(self, what: str, timing: Timing) -> Span:
        span = Span.of(timing.seconds)
        self._say(f"{what}: {milliseconds(span.median)} ms ({milliseconds(span.fastest)} to {milliseconds(span.slowest)} in "
                  f"{count(len(timing.seconds), 'run')})")
        return span

    def _rising(self, what: str, at: Sequence[int], spans: Sequence[Span]) -> Curve:
        curve = Curve.rising(at, spans)
        if curve.fall > BUSY:
            self._say(f"{what} was measured to fall where there is more to do, {percent(curve.fall)} from a curve that "
                      "doesn't; something else keeps the device busy, and the predictions will be off")
        return curve


def rounds_ahead(accepted: Sequence[int], inner: Iterable[int], min_draft_length: int, *, always_ahead: bool = False) -> int:
    """Rounds of a hierarchy behind which its small model goes a token ahead.

    Args:
      accepted: accept length of each round.
      inner: those of the small model's rounds; of an iterator no more is taken than these rounds had.
      min_draft_length, always_ahead: of the drafter; the latter is its draft_model_start.
    """
    lengths, ahead, total = iter(inner), False, 0
    for length in accepted:
        drafted = int(ahead)
        while drafted < min_draft_length:
            drafted += int(next(lengths))
        ahead = length > drafted or always_ahead
        total += ahead
    return total


@dataclasses.dataclass(frozen=True, eq=False)
class _Wide(sm.NoDrafter):
    """Proposes nothing, in a cache with room for trees of `tree_size` nodes."""

    tree_size: int = 1


def eagle_drafters(head: sm.Head, top_k: int, depths: Sequence[int], size: int) -> dict[int, sm.EagleDrafter]:
    """Of each depth, with trees of `size` nodes where the depth allows as many."""
    made = {}
    for depth in depths:
        candidates = sm.TreeConfig(depth=depth, top_k=top_k, size=2).candidates
        made[depth] = sm.EagleDrafter(head, sm.TreeConfig(depth=depth, top_k=top_k, size=min(size, candidates + 1)))
    return made
