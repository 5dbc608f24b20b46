"""What a decoder layer's linear weights multiply, over sequences of calibration text.

A layer's weights are f32 arrays by the names they have in `parameters.parameter_shapes` behind layers_<i>/.
"""

import functools
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float

from pallas_kernels.partials import add_up
from specmq_jax.formats import Dense, DenseFormat
from specmq_jax.network.config import LlamaConfig
from specmq_jax.network.layers import Layer
from specmq_jax.network.sequences import Sequences

QKV, OUT, GATE_UP, DOWN = LINEAR = ("attention/qkv/w", "attention/o/w", "mlp/gate_up/w", "mlp/down/w")
ATTENTION_NORM, MLP_NORM = "attention_norm/scale", "mlp_norm/scale"
CALIBRATED = ("biases", "qk_norm", "rope")
"""Fields in which a model may differ from Llama."""
_HALVES = (QKV, OUT), (GATE_UP, DOWN)

LayerWeights = Mapping[str, Float[Array, "..."]]
Inputs = Iterable[Float[Array, "S K"]]


def walk(config: LlamaConfig, weights: LayerWeights, stream: Float[np.ndarray, "n S D"],
         weight_for: Callable[[str, Inputs], Float[Array, "K N"]]) -> None:
    """Takes the residual stream of `n` sequences through a layer, in place.

    `weight_for` is asked for the linear weights in the order of the forward pass. It is given a weight's name and the inputs
    that the weights before it lead to, sequence by sequence, and returns the weight f32[K, N] to go on with. Inputs that it
    doesn't look at are not computed.
    """
    known = dict(weights)
    for names in _HALVES:
        for name in names:
            known[name] = weight_for(name, (_input(config, name, known, rows) for rows in stream))
        for i, rows in enumerate(stream):
            stream[i] = _behind(config, names, known, rows)


@functools.partial(jax.jit, static_argnames="config")
def linear_inputs(config: LlamaConfig, weights: LayerWeights, rows: Float[Array, "S D"]) -> dict[str, Float[Array, "S K"]]:
    """What a layer's linear weights multiply in one sequence, by name."""
    behind, inputs = _half(config, _HALVES[0], weights, rows)
    return inputs | _half(config, _HALVES[1], weights, behind)[1]


@functools.partial(jax.jit, static_argnames=("config", "name"))
def _input(config: LlamaConfig, name: str, weights: LayerWeights, rows: Float[Array, "S D"]) -> Float[Array, "S K"]:
    names = next(names for names in _HALVES if name in names)
    return _half(config, names, weights, rows)[1][name]


@functools.partial(jax.jit, static_argnames=("config", "names"))
def _behind(config: LlamaConfig, names: tuple[str, ...], weights: LayerWeights, rows: Float[Array, "S D"]
            ) -> Float[Array, "S D"]:
    return _half(config, names, weights, rows)[0]


def _half(config: LlamaConfig, names: tuple[str, ...], weights: LayerWeights, rows: Float[Array, "S D"]
          ) -> tuple[Float[Array, "S D"], dict[str, Float[Array, "S K"]]]:
    """The residual stream behind the half of a layer that has these linear weights, and what they multiply."""
    dense = DenseFormat(kind="fp32")
    layer = Layer(config, dense, implementation="reference")
    variables = {"params": traverse_util.unflatten_dict(
        {path: Dense(value) if path in LINEAR else value for path, value in weights.items()}, sep="/")}
    if QKV in names:
        sequence = Sequences.causal(config, 1, len(rows), dense.dtype)
        (residual, update, _), kept = layer.apply(
            variables, rows, None, sequence.rows(config, len(rows)), sequence.layers[0], method="attend",
            mutable="intermediates")
    else:
        (residual, update), kept = layer.apply(variables, rows, None, method="feed_forward", mutable="intermediates")
    found = traverse_util.flatten_dict(kept["intermediates"], sep="/")
    return residual + add_up(update), {name: found[f"{name.removesuffix('w')}inputs"][0] for name in names}
