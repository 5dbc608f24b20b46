"""How long the parts of a round take, each measured in a jitted loop of its own."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array

from specmq_jax.compilation import compiler_options
from specmq_jax.errors import UserError
from specmq_jax.tree import DraftTree

if TYPE_CHECKING:
    from specmq_jax.decode import Decoder, DecodeState, Params

_MOST_ROUNDS = 8
_Loop = Callable[["Params", "DecodeState", Array], "DecodeState"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseTimes:
    """Median seconds of a prefill (drafter's included) and of one round and its parts, measured inside jitted loops."""

    prefill: float
    draft: float
    verify: float
    round: float


def measure_phases(decoder: "Decoder", prompt_ids: Sequence[int], repeats: int) -> PhaseTimes:
    """See `Decoder.phase_times`. A round is the difference of two calls, of several rounds and of one: to start a call on a
    model's thousand arrays takes milliseconds that are no round's."""
    room = (decoder.config.max_len - len(prompt_ids)) // decoder.drafter.tree_size
    if room < 1:
        raise UserError(f"a prompt of {len(prompt_ids)} tokens leaves no room in a cache of {decoder.config.max_len}")
    rounds = min(_MOST_ROUNDS, room)

    def fresh() -> "DecodeState":
        state = decoder.prefill(prompt_ids)
        endless = state.replace(done=jnp.asarray(False), stop_tokens=-jnp.ones_like(state.stop_tokens))
        return jax.block_until_ready(jax.device_put(endless, state.tokens.sharding))

    def taken(loop: _Loop, count: int) -> float:
        state = fresh()
        times = jax.device_put(jnp.int32(count), state.tokens.sharding)
        start = time.perf_counter()
        jax.block_until_ready(loop(decoder.params, state, times))
        return time.perf_counter() - start

    def median(loop: _Loop) -> float:
        taken(loop, 1)  # compiles
        one, several = (statistics.median(taken(loop, count) for _ in range(repeats)) for count in (1, rounds))
        return (several - one) / (rounds - 1) if rounds > 1 else one

    fresh()
    prefill = statistics.median(sum(decoder.timed_prefill(prompt_ids)[1:]) for _ in range(repeats))
    draft = median(_drafts(decoder)) if decoder.drafter.max_depth else 0.0
    return PhaseTimes(prefill=prefill, draft=draft, verify=median(_verifications(decoder)), round=median(decoder.loop))


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
