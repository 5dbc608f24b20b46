"""A decoder layer taken apart at its linear layers, over sequences of calibration text.

A layer's weights are f32 arrays by the names they have in `parameters.parameter_shapes` behind layers_<i>/.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from checkpoints_tools.training.batched import attention, heads_first, linear, rms_norm, rotation
from pallas_kernels.rope.reference import rotate
from specmq_jax.network.config import LlamaConfig

QKV, OUT, GATE_UP, DOWN = LINEAR = ("attention/qkv/w", "attention/o/w", "mlp/gate_up/w", "mlp/down/w")
ATTENTION_NORM, MLP_NORM = "attention_norm/scale", "mlp_norm/scale"

LayerWeights = Mapping[str, Float[Array, "..."]]
Inputs = Iterable[Float[Array, "S K"]]


def walk(config: LlamaConfig, weights: LayerWeights, stream: Float[np.ndarray, "n S D"],
         weight_for: Callable[[str, Inputs], Float[Array, "K N"]]) -> None:
    """Takes the residual stream of `n` sequences through a layer, in place.

    `weight_for` is asked for the linear weights in the order of the forward pass. It is given a weight's name and the inputs
    that the weights before it lead to, sequence by sequence, has to go through all of them, and returns the weight f32[K, N]
    to go on with.
    """
    attended = np.empty((*stream.shape[:2], config.num_heads * config.head_dim), np.float32)

    def normalised(norm: str) -> Iterator[Float[Array, "S D"]]:
        for rows in stream:
            yield _normalise(config, weights[norm], rows)

    qkv = weight_for(QKV, normalised(ATTENTION_NORM))

    def mixed() -> Iterator[Float[Array, "S A"]]:
        for i, x in enumerate(normalised(ATTENTION_NORM)):
            found = _mix(config, qkv, x)
            attended[i] = found
            yield found

    o = weight_for(OUT, mixed())

    def behind_attention() -> Iterator[Float[Array, "S D"]]:
        for i, x in enumerate(attended):
            stream[i] = _project(o, x, stream[i])
            yield _normalise(config, weights[MLP_NORM], stream[i])

    gate_up = weight_for(GATE_UP, behind_attention())

    def gated() -> Iterator[Float[Array, "S I"]]:
        for x in normalised(MLP_NORM):
            yield _gate(gate_up, x)

    down = weight_for(DOWN, gated())
    for i, x in enumerate(gated()):
        stream[i] = _project(down, x, stream[i])


@functools.partial(jax.jit, static_argnames="config")
def linear_inputs(config: LlamaConfig, weights: LayerWeights, rows: Float[Array, "S D"]) -> dict[str, Float[Array, "S K"]]:
    """What a layer's linear weights multiply in one sequence, by name."""
    x = _normalise(config, weights[ATTENTION_NORM], rows)
    mixed = _mix(config, weights[QKV], x)
    behind = _normalise(config, weights[MLP_NORM], _project(weights[OUT], mixed, rows))
    return {QKV: x, OUT: mixed, GATE_UP: behind, DOWN: _gate(weights[GATE_UP], behind)}


@functools.partial(jax.jit, static_argnames="config")
def _normalise(config: LlamaConfig, scale: Float[Array, "D"], rows: Float[Array, "S D"]) -> Float[Array, "S D"]:
    return rms_norm(rows, scale, config.rms_norm_eps)


@functools.partial(jax.jit, static_argnames="config")
def _mix(config: LlamaConfig, qkv: Float[Array, "D F"], x: Float[Array, "S D"]) -> Float[Array, "S A"]:
    rows, heads = len(x), config.num_heads
    split = linear(x, qkv).reshape(1, rows, -1, config.head_dim)
    q, k, v = jnp.split(split, [heads, heads + config.num_kv_heads], axis=2)
    rotary = rotation(config, jnp.arange(rows)[None], rows)
    q, k = (jax.vmap(rotate)(part, *rotary) for part in (q, k))
    return attention(q, heads_first(k), heads_first(v), jnp.tri(rows, dtype=bool)[None]).reshape(rows, -1)


@jax.jit
def _gate(gate_up: Float[Array, "D F"], x: Float[Array, "S D"]) -> Float[Array, "S I"]:
    gate, up = jnp.split(linear(x, gate_up), 2, axis=-1)
    return jax.nn.silu(gate) * up


@jax.jit
def _project(weight: Float[Array, "K D"], x: Float[Array, "S K"], rows: Float[Array, "S D"]) -> Float[Array, "S D"]:
    return rows + linear(x, weight)
