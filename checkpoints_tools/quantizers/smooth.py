"""SmoothQuant (Xiao et al., arXiv:2211.10438): outliers go from the activations into the weights, whose product stays.

An input channel is divided by a number and the weight's row multiplied by it. The division is done by whatever makes the
input: the norm before q, k, v and gate, up; v before o; up before down.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from checkpoints_tools.quantizers.stages import (
    ATTENTION_NORM,
    DOWN,
    GATE_UP,
    LINEAR,
    MLP_NORM,
    OUT,
    QKV,
    LayerWeights,
    linear_inputs,
)
from specmq_jax import formats
from specmq_jax.formats import WeightFormat
from specmq_jax.network.config import LlamaConfig

INPUTS = {"qkv": QKV, "o": OUT, "gate_up": GATE_UP, "down": DOWN}
"""The linear layers whose inputs can be smoothed, by the names users give."""
_TRIED = tuple(i / 10 for i in range(1, 10))
_ROWS = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Smoothing:
    """How far, and where.

    Attributes:
      alpha: share of the outliers' range, in the logarithm, that goes into the weights; None searches for the one that makes
        the layer's output err least, each layer and input for itself, no smoothing included.
      inputs: names of `INPUTS`.
    """

    alpha: float | None
    inputs: tuple[str, ...]

    def apply(self, config: LlamaConfig, weights: LayerWeights, stream: Float[np.ndarray, "n S D"],
              weight_format: WeightFormat) -> LayerWeights:
        """A layer's weights smoothed for the residual stream that enters it; its function is the same."""
        found, weights = _observe(config, weights, stream), dict(weights)
        for name in self.inputs:
            path = INPUTS[name]
            scale = self._choose(config, found[path], weights[path], weight_format, path)
            weights[path] = weights[path] * scale[:, None]
            _divide_source(config, weights, path, scale)
        return weights

    def _choose(self, config: LlamaConfig, observed: "_Observed", weight: Float[Array, "K N"], weight_format: WeightFormat,
                path: str) -> Float[Array, "K"]:
        heaviest = jnp.max(jnp.abs(weight), axis=1)
        largest = observed.largest
        if path == OUT:
            largest, heaviest = (_shared(config, part) for part in (largest, heaviest))
        tried = [_scale(largest, heaviest, alpha) for alpha in (_TRIED if self.alpha is None else [self.alpha])]
        if self.alpha is not None:
            return tried[0]
        tried.insert(0, jnp.ones_like(largest))
        errors = [float(_output_error(observed.rows, weight, scale, weight_format)) for scale in tried]
        return tried[int(np.argmin(errors))]


@dataclasses.dataclass(frozen=True)
class _Observed:
    """An input's largest magnitude in each channel, f32[K], and some of its rows, f32[R, K]."""

    largest: Float[Array, "K"]
    rows: Float[Array, "R K"]


def _observe(config: LlamaConfig, weights: LayerWeights, stream: Float[np.ndarray, "n S D"]) -> dict[str, _Observed]:
    count, length, _ = stream.shape
    stride = max(1, count * length // _ROWS)
    largest: dict[str, Array] = {}
    rows: dict[str, list[Array]] = {path: [] for path in LINEAR}
    for i, sequence in enumerate(stream):
        for path, x in linear_inputs(config, weights, sequence).items():
            found = jnp.max(jnp.abs(x), axis=0)
            largest[path] = jnp.maximum(largest[path], found) if path in largest else found
            rows[path].append(x[-i * length % stride::stride])
    return {path: _Observed(largest[path], jnp.concatenate(rows[path])) for path in LINEAR}


def _scale(largest: Float[Array, "K"], heaviest: Float[Array, "K"], alpha: float) -> Float[Array, "K"]:
    """s = max|x|^alpha / max|w|^(1 - alpha), with a geometric mean of one; one where a channel or its row is zero."""
    alive = (largest > 0) & (heaviest > 0)
    logarithm = alpha * jnp.log(jnp.where(alive, largest, 1)) - (1 - alpha) * jnp.log(jnp.where(alive, heaviest, 1))
    mean = jnp.sum(jnp.where(alive, logarithm, 0)) / jnp.maximum(alive.sum(), 1)
    return jnp.where(alive, jnp.exp(logarithm - mean), 1)


def _shared(config: LlamaConfig, channels: Float[Array, "A"]) -> Float[Array, "A"]:
    """The largest number among the query heads that share a head of v, for each of them."""
    grouped = channels.reshape(config.num_kv_heads, -1, config.head_dim)
    return jnp.broadcast_to(grouped.max(axis=1, keepdims=True), grouped.shape).reshape(-1)


def _divide_source(config: LlamaConfig, weights: dict[str, Array], path: str, scale: Float[Array, "K"]) -> None:
    """Makes a layer compute the input of the weight at `path` over `scale`."""
    if path in (QKV, GATE_UP):
        norm = ATTENTION_NORM if path == QKV else MLP_NORM
        weights[norm] = weights[norm] / scale
    elif path == OUT:
        kept = scale.reshape(config.num_kv_heads, -1, config.head_dim)[:, 0].reshape(-1)
        _divide_last_columns(weights, QKV, kept)
    else:
        _divide_last_columns(weights, GATE_UP, scale)


def _divide_last_columns(weights: dict[str, Array], path: str, scale: Float[Array, "N"]) -> None:
    """Of the weight at `path` and, where it has one, of its bias."""
    for part in (path, f"{path.removesuffix('w')}bias"):
        if part in weights:
            weights[part] = weights[part].at[..., -len(scale):].divide(scale)


@functools.partial(jax.jit, static_argnames="weight_format")
def _output_error(x: Float[Array, "R K"], weight: Float[Array, "K N"], scale: Float[Array, "K"], weight_format: WeightFormat
                  ) -> Float[Array, ""]:
    """The squared error of the layer's output when it is smoothed by `scale` and rounded, inputs included."""
    packed, held = weight_format.pack(weight * scale[:, None]), weight_format
    if jax.default_backend() == "cpu":
        packed, held = formats.expand(weight_format, packed, weight.shape), formats.expanded(weight_format)
    found = held.matmul(x / scale, packed).sum(axis=0)
    return jnp.sum((found - jnp.matmul(x, weight, precision="highest")) ** 2)
