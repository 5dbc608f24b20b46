"""W8A8 and W8A16: symmetric 8-bit weights with a scale for each output, and 8-bit or half-precision activations."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Int32

from pallas_kernels import w8a8, w8a16
from specmq_jax.formats.base import WeightFormat, abstract_array
from specmq_jax.formats.logical import ChannelInt8, Logical, Quantised


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Channel:
    """values: int8[N, K]; scales: f32[N]."""

    values: Int8[Array, "N K"]
    scales: Float[Array, "N"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8ChannelFormat(WeightFormat):
    """w[k, n] = values[n, k] * scales[n]; 8-bit activations have a scale for each token (arXiv:2211.10438)."""

    activation_bits: int = 8

    @property
    def name(self) -> str:
        return f"w8a{self.activation_bits}"

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(jnp.float16)

    def abstract(self, shape: tuple[int, int]) -> Int8Channel:
        rows, columns = shape
        return Int8Channel(abstract_array((columns, rows), jnp.int8), abstract_array((columns,), jnp.float32))

    def _holds(self, logical: Quantised) -> bool:
        return isinstance(logical, ChannelInt8)

    def _pack(self, logical: Logical) -> Int8Channel:
        if isinstance(logical, ChannelInt8):
            return Int8Channel(jnp.asarray(logical.q).T, jnp.asarray(logical.scales, jnp.float32))
        # a row of the transposed weight is an output's, as a token's row is of the activations
        return Int8Channel(*w8a8.quantise_rows(jnp.asarray(logical, jnp.float32).T))

    def unpack(self, weight: Int8Channel, shape: tuple[int, int]) -> Float[Array, "K N"]:
        return ChannelInt8(weight.values.T, weight.scales).dense()

    def matmul(self, x: Float[Array, "M K"], weight: Int8Channel, *, peaks: Float[Array, "M C"] | None = None,
               halves: bool = False, reproducible: bool = False, implementation: str | None = None) -> Float[Array, "S M N"]:
        if self.activation_bits == 8:
            codes, scales = w8a8.quantise_rows(x, peaks=peaks, implementation=implementation)
            return w8a8.matmul_partials(codes, scales, weight.values, weight.scales, halves=halves,
                                        reproducible=reproducible, implementation=implementation)
        return w8a16.matmul_partials(x.astype(self.dtype), weight.values, weight.scales, reproducible=reproducible,
                                     implementation=implementation)

    def outputs(self, weight: Int8Channel, kept: Int32[Array, "n"]) -> Int8Channel:
        return Int8Channel(weight.values[kept], weight.scales[kept])
