"""Seconds of a round's parts on the present machine, as the cost model adds them up.

T_v(n) is measured for some n and T_d for some depths; between them the curves are straight. What a round takes beside its
drafting and its verification is measured once a method, as the rest of whole rounds.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import specmq_jax as sm
from experiments.timed_loops import Timing, repeated_draft, repeated_verify, some_tree, time_loop
from specmq_jax.tree import DraftTree

_HIERARCHICAL_ROUNDS, _HIERARCHICAL_RUNS = 16, 3

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """Seconds at some whole numbers, ascending; straight in between, and level beyond the ends."""

    at: tuple[int, ...]
    seconds: tuple[float, ...]

    def __call__(self, number: float) -> float:
        return float(np.interp(number, self.at, self.seconds))


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
    """Whole rounds: seconds of one, and in it the rounds of a hierarchy's small model and its passes that go a token ahead."""

    seconds: float
    inner_rounds: float = 0.0
    ahead: float = 0.0


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
        return Curve(at=self._ladder.rows, seconds=tuple(seconds))

    def draft(self, name: str, drafters: Mapping[int, sm.Drafter]) -> Curve:
        """Seconds of a proposal by its depth; the drafters differ in nothing else."""
        deepest = drafters[max(drafters)]
        state, seconds = sm.Decoder(self._model, deepest, self._config).prefill(self._prompt), []
        root, drafter_state = state.tokens[len(self._prompt)], state.drafter
        for depth, drafter in sorted(drafters.items()):
            timing, _, (_, drafter_state) = self._time(repeated_draft(drafter), drafter.params,
                                                       (jnp.copy(root), drafter_state))
            seconds.append(self._told(f"draft of {name}, depth {depth}", timing))
        return Curve(at=tuple(sorted(drafters)), seconds=tuple(seconds))

    def rounds(self, name: str, drafter: sm.Drafter | None) -> Whole:
        """Whole rounds, in the loop that `generate` runs."""
        decoder = sm.Decoder(self._model, drafter, self._config)
        timing, _, _ = self._time(decoder.loop, decoder.params, decoder.prefill(self._prompt), most=self._most_rounds(decoder))
        return Whole(seconds=self._told(f"whole round of {name}", timing))

    def hierarchical_rounds(self, name: str, drafter: sm.HierarchicalDrafter) -> Whole:
        """Whole rounds of a hierarchy, enough of them for what differs from round to round."""
        decoder = sm.Decoder(self._model, drafter, self._config)
        rounds, seconds = min(_HIERARCHICAL_ROUNDS, self._most_rounds(decoder)), []
        for run in range(1 + _HIERARCHICAL_RUNS):
            state = jax.block_until_ready(decoder.prefill(self._prompt))
            count = jax.device_put(jnp.int32(rounds), state.rounds.sharding)
            start = time.perf_counter()
            state = jax.block_until_ready(decoder.loop(decoder.params, state, count))
            if run:  # the first compiles
                seconds.append((time.perf_counter() - start) / rounds)
        inner = drafter.accept_lengths(state.drafter)
        accepted = np.asarray(state.accept_lengths)[:rounds]
        ahead = rounds_ahead(accepted, inner, drafter.min_draft_length, always_ahead=drafter.draft_model_start)
        timing = Timing(seconds=tuple(seconds), steps=rounds, first_call=0.0)
        return Whole(seconds=self._told(f"whole round of {name}", timing), inner_rounds=len(inner) / rounds,
                     ahead=ahead / rounds)

    def _most_rounds(self, decoder: sm.Decoder) -> int:
        """That the cache has room for, even if everything is accepted."""
        return max(1, (self._config.max_len - len(self._prompt) - 1) // (decoder.drafter.max_depth + 1))

    def _time(self, loop: Any, params: Any, carry: Any, **bound: int) -> tuple[Timing, Any, Any]:
        return time_loop(loop, params, carry, runs=self._ladder.runs, **bound)

    def _told(self, what: str, timing: Timing) -> float:
        seconds = statistics.median(timing.seconds)
        self._say(f"{what}: {1e3 * seconds:.2f} ms")
        return seconds


def rounds_ahead(accepted: Sequence[int], inner: Sequence[int], min_draft_length: int, *, always_ahead: bool = False) -> int:
    """Rounds of a hierarchy behind which its small model goes a token ahead.

    Args:
      accepted: accept length of each round.
      inner: those of the small model's rounds.
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
