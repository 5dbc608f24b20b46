"""Formats for CPUs, where half precision and small integers are slow: everything is f32, and multiplied as it was."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import exact, w4a8
from pallas_kernels.w8a8 import api as w8a8
from specmq_jax.formats.base import Weight, WeightFormat, abstract_array
from specmq_jax.formats.dense import Dense, DenseFormat
from specmq_jax.formats.int8 import Int8Channel
from specmq_jax.formats.logical import Logical, Quantised
from specmq_jax.formats.ranges import Range
from specmq_jax.formats.w4a8 import Int4Channel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpandedIntegers:
    """integers: f32[K, N], whole numbers; scales, offsets: f32[N]; w = integers * scales - offsets."""

    integers: Float[Array, "K N"]
    scales: Float[Array, "N"]
    offsets: Float[Array, "N"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpandedIntegersFormat(WeightFormat):
    """A format of 8-bit activations with its integers in f32, which holds their products to 2^-24 of themselves.

    Attributes:
      source: the format whose numerics it has.
    """

    source: WeightFormat

    @property
    def name(self) -> str:
        return f"{self.source.name} in f32"

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(jnp.float32)

    @property
    def rounds_activations(self) -> bool:
        return True

    def abstract(self, shape: tuple[int, int]) -> ExpandedIntegers:
        return ExpandedIntegers(*(abstract_array(part, jnp.float32) for part in (shape, shape[1:], shape[1:])))

    @property
    def range(self) -> Range:
        return self.source.range

    def _holds(self, logical: Quantised) -> bool:
        return self.source._holds(logical)

    def _pack(self, logical: Logical) -> Weight:
        rows, columns = logical.shape
        return expand(self.source, self.source._pack(logical), (rows, columns))

    def unpack(self, weight: ExpandedIntegers, shape: tuple[int, int]) -> Float[Array, "K N"]:
        return weight.integers * weight.scales - weight.offsets

    def matmul(self, x: Float[Array, "M K"], weight: ExpandedIntegers, *, peaks: Float[Array, "M C"] | None = None,
               halves: bool = False, reproducible: bool = False, implementation: str | None = None) -> Float[Array, "1 M N"]:
        del peaks, halves, reproducible, implementation  # sums of whole numbers are the same in any order, up to 2^24
        codes, row_scales = w8a8.quantise_rows(x)
        codes = codes.astype(jnp.float32)
        product = exact.rounded(jnp.dot(codes, weight.integers, precision="highest") * weight.scales)
        offsets = exact.rounded(jnp.sum(codes, axis=1, keepdims=True) * weight.offsets)
        return exact.rounded((product - offsets) * row_scales[:, None])[None]


def expanded(weight_format: WeightFormat) -> WeightFormat:
    """The format that stands for `weight_format` on a CPU."""
    return ExpandedIntegersFormat(source=weight_format) if weight_format.activation_bits == 8 else DenseFormat(kind="fp32")


def expand(weight_format: WeightFormat, weight: Any, shape: tuple[int, int]) -> Dense | ExpandedIntegers:
    """A weight of `weight_format` in the format that stands for it on a CPU."""
    if isinstance(expanded(weight_format), DenseFormat):
        return Dense(weight_format.unpack(weight, shape))
    if isinstance(weight, Int8Channel):
        return ExpandedIntegers(weight.values.T.astype(jnp.float32), weight.scales, jnp.zeros_like(weight.scales))
    codes = w4a8.unpack(weight.packed, shape[0])
    if not isinstance(weight, Int4Channel):
        integers = w4a8.expand(codes, *w4a8.unpack_groups(weight.groups, with_zeros=weight.saturates is None))
        return ExpandedIntegers(integers.T.astype(jnp.float32), weight.channel_scales, jnp.zeros_like(weight.channel_scales))
    return ExpandedIntegers(codes.T.astype(jnp.float32), weight.scales, weight.offsets)
