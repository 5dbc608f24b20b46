"""Steps repeated in a jitted loop on the device, and the timing of such loops.

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
from jaxtyping import Array

from specmq_jax.decoding.compilation import compiler_options
from specmq_jax.network.cache import KVCache

_RUN_SECONDS, _MOST_STEPS, _TRIES = 0.2, 64, 3
_CALLS, _RUNS = 2, 3

Loop = Callable[[Any, Any, Array], Any]
"""Parameters, a carry that is consumed, a number of steps: the carry behind them."""


def repeated(body: Callable[[Any, Any], Any]) -> Loop:
    """The loop of a step, which takes parameters and a carry and returns the carry behind it."""
    def loop(params: Any, carry: Any, steps: Array) -> Any:
        return jax.lax.fori_loop(0, steps, lambda _, carry: _varying(body(params, carry)), carry)

    return jax.jit(loop, donate_argnums=1, compiler_options=compiler_options())


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

    @property
    def median(self) -> float:
        """Seconds a step."""
        return statistics.median(self.seconds)


def time_loop(loop: Loop, params: Any, carry: Any, *, runs: int, least: int = 2, most: int = _MOST_STEPS
              ) -> tuple[Timing, Any, Any]:
    """Times runs of a loop, of as many steps as last 0.2 s, 64 at most, each beside a run of one step.

    Where noise hides what the steps take, it tries with twice as many, three times in all.

    Args:
      loop: to time.
      params: weights.
      carry: where each run begins; it is consumed. A cache in it keeps the rows below its length.
      runs: how often to run it.
      least, most: further bounds on the steps of a run; the second wins.

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
    steps = min(most, max(least, math.ceil(_RUN_SECONDS / trial * min(4, most))))
    for _ in range(_TRIES):
        short, long = [], []
        for _ in range(runs):
            if steps > 1:
                carry, taken = run(carry, 1)
                short.append(taken)
            carry, taken = run(carry, steps)
            long.append(taken)
        timing = timing_of(short, long, steps, first_call)
        if not timing.is_bound:
            break
        steps = min(most, 2 * steps)
    return timing, carry, _rewound(carry, kept)


def seconds_each(call: Callable[[], Any]) -> tuple[float, ...]:
    """Seconds that the device takes for a call, which gives what it makes, in 3 runs of 2 calls: the host starts the second
    while the first runs."""
    found = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        for _ in range(_CALLS):
            result = call()
        jax.block_until_ready(result)
        found.append((time.perf_counter() - start) / _CALLS)
    return tuple(found)


def timing_of(short: Sequence[float], long: Sequence[float], steps: int, first_call: float) -> Timing:
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
