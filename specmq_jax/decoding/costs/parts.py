"""Times of the parts of a decoder's rounds, each in a jitted loop of its own."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from specmq_jax.decoding.costs.timing import Loop, Timing, repeated, time_loop
from specmq_jax.decoding.drafters import Drafter
from specmq_jax.decoding.tree import DraftTree
from specmq_jax.errors import UserError
from specmq_jax.network.cache import KVCache
from specmq_jax.network.llama import Llama
from specmq_jax.words import count

if TYPE_CHECKING:
    from specmq_jax.decoding.decode import Decoder
    from specmq_jax.decoding.rounds import DecodeState

_BRANCHES = 10
_PHASE_STEPS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseTimes:
    """Median seconds of a prefill (drafter's included) and of one round and its parts, measured inside jitted loops.

    A drafter that proposes nothing takes 0. None is not measured: the time could not be told from the machine's noise.
    """

    prefill: float
    draft: float | None
    verify: float | None
    round: float | None


class Parts:
    """Times the parts of a decoder's rounds behind one prompt after another; each run of a part begins behind the prompt."""

    def __init__(self, decoder: "Decoder", *, runs: int, least: int = 2) -> None:
        """`runs` and `least` are those of `time_loop`."""
        self._decoder, self._bounds = decoder, {"runs": runs, "least": least}
        self._drafts: dict[Drafter, Loop] = {}
        self._verification = repeated(self._verify)

    def start(self, prompt_ids: Sequence[int]) -> None:
        """Takes in the prompt, behind which the parts are timed from here on; errors as in `Decoder.prefill`."""
        state = self._decoder.prefill(prompt_ids)
        # a stop token would end a measurement
        self._state = state.replace(done=jnp.asarray(False), stop_tokens=-jnp.ones_like(state.stop_tokens))
        self._root = state.tokens[len(prompt_ids)]
        self._most = max(1, room(self._decoder, prompt_ids))

    def draft(self, drafter: Drafter | None = None) -> tuple[Timing, Any]:
        """Of a `propose`, and the drafter's state behind the last run.

        Args:
          drafter: instead of the decoder's own, from which it differs in how far it drafts alone.
        """
        drafter = drafter or self._decoder.drafter
        loop = self._drafts.setdefault(drafter, _drafting(drafter))
        carry = jnp.copy(self._root), self._state.drafter
        timing, (_, end), (_, start) = time_loop(loop, drafter.params, carry, most=self._most, **self._bounds)
        self._state = self._state.replace(drafter=start)
        return timing, end

    def verify(self, tree: DraftTree | None = None) -> Timing:
        """Of a round's verification, with acceptance and what the cache keeps; by default of a tree of the drafter's sizes."""
        target = self._decoder.target
        fixed = self._state.replace(cache=None, drafter=None)
        carry = self._state.cache, self._drafted() if tree is None else tree
        timing, _, (cache, _) = time_loop(self._verification, (target.params, fixed), carry, **self._bounds)
        self._state = self._state.replace(cache=cache)
        return timing

    def rounds(self) -> "tuple[Timing, DecodeState]":
        """Of whole rounds, in the loop that `generate` runs, and the state behind the last run."""
        timing, end, self._state = time_loop(self._decoder.loop, self._decoder.params, self._state, most=self._most,
                                             **self._bounds)
        return timing, end

    def _verify(self, params: Any, carry: tuple[KVCache, DraftTree]) -> tuple[KVCache, DraftTree]:
        (weights, state), (cache, tree) = params, carry
        accepted, kept = self._decoder.verify(weights, state.replace(cache=cache), tree)
        return kept.rewind(cache.length), tree.replace(tokens=tree.tokens.at[0].set(accepted.tokens[0]))

    def _drafted(self) -> DraftTree:
        drafter = self._decoder.drafter
        shape = jax.eval_shape(lambda: drafter.propose(drafter.params, self._state.drafter, self._root)[0])
        tree = some_tree(shape.size, self._decoder.target.config.vocab_size)
        return DraftTree.chain(tree.tokens) if shape.is_chain else tree.replace(max_depth=shape.max_depth)


def room(decoder: "Decoder", prompt_ids: Sequence[int]) -> int:
    """Rounds that the cache has room for behind a prompt, even if everything is accepted."""
    return (decoder.config.max_len - len(prompt_ids) - 1) // (decoder.drafter.max_depth + 1)


def phase_times(decoder: "Decoder", prompt_ids: Sequence[int], repeats: int) -> PhaseTimes:
    """See `Decoder.phase_times`."""
    if room(decoder, prompt_ids) < 1:
        raise UserError(f"a prompt of {count(len(prompt_ids), 'token')} leaves no room in a cache of {decoder.config.max_len}")

    def told(timing: Timing) -> float | None:
        return None if timing.is_bound else timing.median

    parts = Parts(decoder, runs=repeats, least=_PHASE_STEPS)
    parts.start(prompt_ids)  # compiles
    prefill = statistics.median(sum(decoder.timed_prefill(prompt_ids)[1:]) for _ in range(repeats))
    draft = told(parts.draft()[0]) if decoder.drafter.max_depth else 0.0
    return PhaseTimes(prefill=prefill, draft=draft, verify=told(parts.verify()), round=told(parts.rounds()[0]))


def repeated_pass(module: Llama) -> Loop:
    """The pass of a model over a tree, and the best token after each node, which is the node's token in the next step.

    The carry: the cache and the tree.
    """
    def body(params: Any, carry: tuple[KVCache, DraftTree]) -> tuple[KVCache, DraftTree]:
        cache, tree = carry
        hidden, _, cache = module.apply(params, tree.tokens, cache, tree.depth, tree.mask)
        best = jnp.argmax(module.apply(params, hidden, method="logits"), axis=-1).astype(jnp.int32)
        return cache, tree.replace(tokens=best)

    return repeated(body)


def some_tree(rows: int, vocab_size: int) -> DraftTree:
    """A tree of random tokens in which every node has ten children, as far as they go."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, rows).astype(np.int32)
    parent = np.maximum(np.arange(rows, dtype=np.int32) - 1, 0) // _BRANCHES
    return DraftTree.from_parents(jnp.asarray(tokens), jnp.asarray(parent), max_depth=rows - 1)


def _drafting(drafter: Drafter) -> Loop:
    """The carry: the root's token and the drafter's state."""
    def body(params: Any, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        root, state = carry
        tree, state = drafter.propose(params, state, root)
        return jnp.maximum(tree.tokens[-1], 0), state

    return repeated(body)
