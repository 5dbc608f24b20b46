"""How long the parts of a round take, each measured in a jitted loop of its own."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array

from specmq_jax.decoding.compilation import compiler_options
from specmq_jax.decoding.tree import DraftTree
from specmq_jax.errors import UserError
from specmq_jax.words import count

if TYPE_CHECKING:
    from specmq_jax.decoding.decode import Decoder, DecodeState, Params

_ROUNDS, _TRIES = 8, 6
_Loop = Callable[["Params", "DecodeState", Array], "DecodeState"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseTimes:
    """Median seconds of a prefill (drafter's included) and of one round and its parts, measured inside jitted loops.

    A drafter that proposes nothing takes 0. None is not measured: the time could not be told from the machine's noise.
    """

    prefill: float
    draft: float | None
    verify: float | None
    round: float | None


def measure_phases(decoder: "Decoder", prompt_ids: Sequence[int], repeats: int) -> PhaseTimes:
    """See `Decoder.phase_times`. A round is the difference of two calls, of several rounds and of one: to start a call on a
    model's thousand arrays takes milliseconds that are no round's."""
    room = (decoder.config.max_len - len(prompt_ids)) // decoder.drafter.tree_size
    if room < 1:
        raise UserError(f"a prompt of {count(len(prompt_ids), 'token')} leaves no room in a cache of {decoder.config.max_len}")

    def fresh() -> "DecodeState":
        state = decoder.prefill(prompt_ids)
        endless = state.replace(done=jnp.asarray(False), stop_tokens=-jnp.ones_like(state.stop_tokens))
        return jax.block_until_ready(jax.device_put(endless, state.tokens.sharding))

    def each(loop: _Loop) -> float | None:
        def taken(rounds: int) -> float:
            state = fresh()
            times = jax.device_put(jnp.int32(rounds), state.tokens.sharding)
            start = time.perf_counter()
            jax.block_until_ready(loop(decoder.params, state, times))
            return time.perf_counter() - start

        taken(1)  # compiles
        return seconds_each(taken, room, repeats)

    fresh()
    prefill = statistics.median(sum(decoder.timed_prefill(prompt_ids)[1:]) for _ in range(repeats))
    draft = each(_drafts(decoder)) if decoder.drafter.max_depth else 0.0
    return PhaseTimes(prefill=prefill, draft=draft, verify=each(_verifications(decoder)), round=each(decoder.loop))


def seconds_each(taken: Callable[[int], float], most: int, repeats: int) -> float | None:
    """Seconds of one of the equal steps that a call makes.

    Args:
      taken: seconds of a call that makes so many steps.
      most: steps that a call can make at most; where it is 1, a step is a call.
      repeats: calls of each kind, of which the medians count.

    Returns:
      The difference of calls of several steps and of one, by step. None where a call of several steps took no longer than one
      of a single step, with more and more steps: noise would be told as a time.
    """
    steps = min(_ROUNDS, most)
    for _ in range(_TRIES):
        pairs = [(taken(1), taken(steps)) for _ in range(repeats)]
        one, several = (statistics.median(times) for times in zip(*pairs, strict=True))
        if steps == 1:
            return one
        if one < min(times[1] for times in pairs):
            return (several - one) / (steps - 1)
        steps = min(2 * steps, most)
    return None


def _drafts(decoder: "Decoder") -> _Loop:
    def body(params: "Params", state: "DecodeState") -> "DecodeState":
        tree, drafter = decoder.drafter.propose(params[1], state.drafter, state.tokens[0])
        return state.replace(drafter=drafter, tokens=state.tokens.at[0].set(jnp.maximum(tree.tokens[-1], 0)))

    return _repeated(body)


def _verifications(decoder: "Decoder") -> _Loop:
    """Of trees of the drafter's sizes."""
    def body(params: "Params", state: "DecodeState") -> "DecodeState":
        shape = jax.eval_shape(lambda: decoder.drafter.propose(params[1], state.drafter, state.length)[0])
        tree = DraftTree.chain(state.tokens[:shape.size]).replace(max_depth=shape.max_depth, is_chain=shape.is_chain)
        accepted, cache = decoder.verify(params[0], state, tree)
        return state.replace(cache=cache.rewind(state.cache.length), tokens=state.tokens.at[0].set(accepted.tokens[0]))

    return _repeated(body)


def _repeated(body: Callable[["Params", "DecodeState"], "DecodeState"]) -> _Loop:
    def loop(params: "Params", state: "DecodeState", times: Array) -> "DecodeState":
        return jax.lax.fori_loop(0, times, lambda _, state: body(params, state), state)

    return jax.jit(loop, donate_argnums=1, compiler_options=compiler_options())
