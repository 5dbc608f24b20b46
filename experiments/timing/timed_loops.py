"""Parts of a round, each repeated in a jitted loop on the device, and the timing of such loops.

Every step of a loop depends on the one before, and each run begins at the same state, whatever the run before has committed.
A step's time is the difference of two calls, of many steps and of one: starting a call on a model's thousand arrays takes
milliseconds, which are the call's and no step's.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import specmq_jax as sm
from specmq_jax.decoding.compilation import compiler_options
from specmq_jax.decoding.tree import DraftTree
from specmq_jax.decoding.verification import verify
from specmq_jax.network.cache import KVCache
from specmq_jax.network.llama import Llama

_RUN_SECONDS, _MOST_STEPS = 0.2, 64
_BRANCHES = 10

Loop = Callable[[Any, Any, Array], Any]
"""Parameters, a carry that is consumed, a number of steps: the carry behind them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Times of a loop's runs.

    Attributes:
      seconds: a step's, in each run. Where the machine's noise hides what a run of more steps takes longer than one of a
        single step, a run's time over its steps: an upper bound, with the call in it.
      steps: of a run.
      first_call: seconds of the first call, of one step, which compiles.
      call: seconds that a later call takes besides its steps; None where it could not be told from them.
      is_bound: the seconds are such upper bounds.
    """

    seconds: tuple[float, ...]
    steps: int
    first_call: float
    call: float | None = None
    is_bound: bool = False


def time_loop(loop: Loop, params: Any, carry: Any, *, runs: int, most: int = _MOST_STEPS) -> tuple[Timing, Any, Any]:
    """Times runs of a loop, of as many steps as last 0.2 s, 64 at most, each beside a run of one step.

    Args:
      loop: to time.
      params: weights.
      carry: where each run begins; it is consumed. A cache in it keeps the rows below its length.
      runs: how often to run it.
      most: another bound on the steps of a run.

    Returns:
      The times, the carry behind the last run, and where that run began, as `carry` was; the last two share the caches' rows,
      so that only one of them may be used in another loop.
    """
    (device,) = jax.tree.leaves(carry)[0].devices()
    # what a jitted function returns is bound to a device: a function given the one and then the other is compiled twice
    carry = jax.device_put(carry, device)
    kept = _without_rows(carry)

    def run(carry: Any, steps: int) -> tuple[Any, float]:
        carry, count = jax.block_until_ready((_rewound(carry, kept), jax.device_put(jnp.int32(steps), device)))
        start = time.perf_counter()
        carry = jax.block_until_ready(loop(params, carry, count))
        return carry, time.perf_counter() - start

    most = min(most, _MOST_STEPS)
    carry, first_call = run(carry, 1)
    carry, trial = run(carry, min(4, most))
    steps = min(most, max(2, math.ceil(_RUN_SECONDS / trial * min(4, most))))
    short, long = [], []
    for _ in range(runs):
        if steps > 1:
            carry, taken = run(carry, 1)
            short.append(taken)
        carry, taken = run(carry, steps)
        long.append(taken)
    return _timing(short, long, steps, first_call), carry, _rewound(carry, kept)


def _timing(short: Sequence[float], long: Sequence[float], steps: int, first_call: float) -> Timing:
    """Of the times of runs of one step, of which there are none where the others have no more, and of `steps`."""
    if not short:
        return Timing(seconds=tuple(long), steps=1, first_call=first_call)
    one = statistics.median(short)
    seconds = tuple((taken - one) / (steps - 1) for taken in long)
    if min(seconds) <= 0:
        bounds = tuple(taken / steps for taken in long)
        return Timing(seconds=bounds, steps=steps, first_call=first_call, is_bound=True)
    call = one - statistics.median(seconds)
    return Timing(seconds=seconds, steps=steps, first_call=first_call, call=call if call >= 0 else None)


def repeated_pass(module: Llama) -> Loop:
    """The pass of a model over a tree, and the best token after each node, which is the node's token in the next step.

    The carry: the cache and the tree.
    """
    def body(params: Any, carry: tuple[KVCache, DraftTree]) -> tuple[KVCache, DraftTree]:
        cache, tree = carry
        hidden, _, cache = module.apply(params, tree.tokens, cache, tree.depth, tree.mask)
        best = jnp.argmax(module.apply(params, hidden, method="logits"), axis=-1).astype(jnp.int32)
        return cache, tree.replace(tokens=best)

    return _repeated(body)


def repeated_verify(module: Llama) -> Loop:
    """A round's verification, with acceptance and what the cache keeps; carry as in `repeated_pass`."""
    def body(params: Any, carry: tuple[KVCache, DraftTree]) -> tuple[KVCache, DraftTree]:
        cache, tree = carry
        accepted, kept = verify(module, params, cache, tree, lambda logits: jnp.argmax(logits, axis=-1).astype(jnp.int32))
        return kept.rewind(cache.length), tree.replace(tokens=tree.tokens.at[0].set(accepted.tokens[0]))

    return _repeated(body)


def repeated_draft(drafter: sm.Drafter) -> Loop:
    """A round's `propose`. The carry: the root's token and the drafter's state."""
    def body(params: Any, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        root, state = carry
        tree, state = drafter.propose(params, state, root)
        return jnp.maximum(tree.tokens[-1], 0), state

    return _repeated(body)


def some_tree(rows: int, vocab_size: int) -> DraftTree:
    """A tree of random tokens in which every node has ten children, as far as they go."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, rows).astype(np.int32)
    parent = np.maximum(np.arange(rows, dtype=np.int32) - 1, 0) // _BRANCHES
    return DraftTree.from_parents(jnp.asarray(tokens), jnp.asarray(parent), max_depth=rows - 1)


def _repeated(body: Callable[[Any, Any], Any]) -> Loop:
    def loop(params: Any, carry: Any, steps: Array) -> Any:
        return jax.lax.fori_loop(0, steps, lambda _, carry: _varying(body(params, carry)), carry)

    return jax.jit(loop, donate_argnums=1, compiler_options=compiler_options())


def _is_cache(part: Any) -> bool:
    return isinstance(part, KVCache)


def _varying(carry: Any) -> Any:
    """The same values, of which XLA doesn't see that a step left some as they were: it would take what follows from them alone
    out of the loop."""
    flat, structure = jax.tree.flatten(carry, is_leaf=_is_cache)
    small = jax.lax.optimization_barrier([part.length if _is_cache(part) else part for part in flat])
    return jax.tree.unflatten(structure, [part.rewind(value) if _is_cache(part) else value
                                          for part, value in zip(flat, small, strict=True)])


def _without_rows(carry: Any) -> Any:
    """Copies of everything but the caches' rows."""
    return jax.tree.map(lambda part: jnp.copy(part.length if _is_cache(part) else part), carry, is_leaf=_is_cache)


def _rewound(carry: Any, kept: Any) -> Any:
    """`kept` with the rows of the caches in `carry`: a loop changes none of the committed ones."""
    return jax.tree.map(lambda part, value: part.rewind(jnp.copy(value)) if _is_cache(part) else jnp.copy(value), carry, kept,
                        is_leaf=_is_cache)
