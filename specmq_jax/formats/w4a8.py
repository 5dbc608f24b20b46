"""W4A8: 4-bit weights that are multiplied as 8-bit integers by 8-bit activations.

QQQ (arXiv:2406.09904) is symmetric, QoQ (QServe, arXiv:2405.04532) has zero points; both know one scale an output, and
groups whose scales turn the codes into 8-bit integers of one scale an output.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8

from pallas_kernels import w4a8, w8a8
from specmq_jax.formats.base import WeightFormat, abstract_array
from specmq_jax.formats.logical import ChannelInt4, Logical, Quantised, TwoLevelInt4

_PROTECTED = 119  # QoQ's first level stops short of 127, so that the second one's rounding can't leave 8 bits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int4Channel:
    """packed: uint8[B, N, 64] in `pallas_kernels.w4a8`'s layout; scales, offsets: f32[N]; w = q * scale - offset."""

    packed: UInt8[Array, "B N 64"]
    scales: Float[Array, "N"]
    offsets: Float[Array, "N"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int4TwoLevel:
    """packed: uint8[B, N, 64] and groups: int32[G, N] in `pallas_kernels.w4a8`'s layout; channel_scales: f32[N]; saturates:
    int32[1], whether any integer must be held to 8 bits, None where groups have zeros."""

    packed: UInt8[Array, "B N 64"]
    groups: Int32[Array, "G N"]
    channel_scales: Float[Array, "N"]
    saturates: Int32[Array, "1"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int4Int8Format(WeightFormat):
    """Attributes: scheme, "qqq" or "qoq"; group_size, rows of K that share a scale, 128 or -1 for all."""

    scheme: str
    group_size: int = -1

    @property
    def name(self) -> str:
        return f"w4a8-{self.scheme}" + ("" if self.group_size == -1 else f"-g{self.group_size}")

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(jnp.float16)

    @property
    def activation_bits(self) -> int:
        return 8

    @property
    def _zeros(self) -> bool:
        return self.scheme == "qoq"

    def abstract(self, shape: tuple[int, int]) -> Any:
        rows, columns = shape
        packed = abstract_array(w4a8.packed_shape(columns, rows), jnp.uint8)
        scales = abstract_array((columns,), jnp.float32)
        if self.group_size == -1:
            return Int4Channel(packed, scales, scales)
        groups = abstract_array((-(-rows // self.group_size), columns), jnp.int32)
        return Int4TwoLevel(packed, groups, scales, None if self._zeros else abstract_array((1,), jnp.int32))

    def _pack(self, logical: Logical) -> Any:
        if not isinstance(logical, ChannelInt4 | TwoLevelInt4):
            logical = self._quantise(jnp.asarray(logical, jnp.float32))
        q = jnp.asarray(logical.q).T
        packed = w4a8.pack(q)
        if isinstance(logical, ChannelInt4):
            return Int4Channel(packed, jnp.asarray(logical.scales, jnp.float32), jnp.asarray(logical.offsets, jnp.float32))
        scales, zeros = jnp.asarray(logical.group_scales), logical.group_zeros
        saturates = w4a8.saturates(q, scales) if zeros is None else None
        groups = w4a8.pack_groups(scales, None if zeros is None else jnp.asarray(zeros))
        return Int4TwoLevel(packed, groups, jnp.asarray(logical.channel_scales, jnp.float32), saturates)

    def _holds(self, logical: Quantised) -> bool:
        """QQQ's per channel has the offset of a code 8."""
        if isinstance(logical, ChannelInt4):
            with np.errstate(over="ignore"):
                return self.group_size == -1 and (self._zeros or bool((logical.offsets == 8 * logical.scales).all()))
        return (isinstance(logical, TwoLevelInt4) and logical.group_size == self.group_size
                and (logical.group_zeros is not None) == self._zeros)

    def unpack(self, weight: Any, shape: tuple[int, int]) -> Float[Array, "K N"]:
        q = w4a8.unpack(weight.packed, shape[0])
        if isinstance(weight, Int4Channel):
            return ChannelInt4(q.T, weight.scales, weight.offsets).dense()
        integers = w4a8.expand(q, *w4a8.unpack_groups(weight.groups, with_zeros=self._zeros))
        return integers.T.astype(jnp.float32) * weight.channel_scales

    def matmul(self, x: Float[Array, "M K"], weight: Any, *, peaks: Float[Array, "M C"] | None = None,
               halves: bool = False, reproducible: bool = False, implementation: str | None = None) -> Float[Array, "S M N"]:
        # QServe's epilogue takes zero points times the activations as they were. Their rounding then meets q, which is of one
        # sign, instead of q less its zero point: a model packed by DeepCompressor erred by 3.9 % of its logits' norm so, and
        # errs by 1.3 % with the sums of the rounded activations.
        codes, row_scales, *added = w8a8.quantise_rows(x, peaks=peaks, sums=self.group_size if self._zeros else None,
                                                       implementation=implementation)
        sums = added[0] if added else None
        if isinstance(weight, Int4TwoLevel):
            return w4a8.group_partials(codes, row_scales, sums, weight.packed, weight.groups, weight.channel_scales,
                                       weight.saturates, halves=halves, reproducible=reproducible,
                                       implementation=implementation)
        return w4a8.channel_partials(codes, row_scales, sums, weight.packed, weight.scales,
                                     weight.offsets if self._zeros else None, halves=halves,
                                     reproducible=reproducible, implementation=implementation)

    def outputs(self, weight: Any, kept: Int32[Array, "n"]) -> Any:
        if isinstance(weight, Int4Channel):
            return Int4Channel(weight.packed[:, kept], weight.scales[kept], weight.offsets[kept])
        return Int4TwoLevel(weight.packed[:, kept], weight.groups[:, kept], weight.channel_scales[kept], weight.saturates)

    def _quantise(self, values: Float[Array, "K N"]) -> ChannelInt4 | TwoLevelInt4:
        """Round-to-nearest of plain values."""
        if self.group_size == -1:
            return self._quantise_channels(values)
        rows, columns = values.shape
        groups = -(-rows // self.group_size)
        padded = jnp.pad(values, ((0, groups * self.group_size - rows), (0, 0)))
        grouped = padded.reshape(groups, self.group_size, columns)
        q, scales, zeros, channel_scales = (self._two_levels_with_zeros if self._zeros else self._two_levels)(grouped)
        return TwoLevelInt4(q.reshape(-1, columns)[:rows].astype(jnp.uint8), scales, zeros, channel_scales, self.group_size)

    def _quantise_channels(self, values: Float[Array, "K N"]) -> ChannelInt4:
        if not self._zeros:
            scales = _nonzero(jnp.max(jnp.abs(values), axis=0) / 7)
            q = jnp.clip(jnp.round(values / scales), -7, 7) + 8
            return ChannelInt4(q.astype(jnp.uint8), scales, 8 * scales)
        lowest, highest = jnp.minimum(values.min(axis=0), 0), jnp.maximum(values.max(axis=0), 0)
        scales = _nonzero((highest - lowest) / 15)
        zeros = jnp.clip(jnp.round(-lowest / scales), 0, 15)
        q = jnp.clip(jnp.round(values / scales) + zeros, 0, 15)
        return ChannelInt4(q.astype(jnp.uint8), scales, zeros * scales)

    def _two_levels(self, grouped: Float[Array, "G g N"]) -> tuple[Array, Array, None, Array]:
        largest = jnp.take_along_axis(grouped, jnp.argmax(jnp.abs(grouped), axis=1, keepdims=True), axis=1)
        steps = largest / -8  # the entry of largest magnitude gets the code without a mirror image
        q = jnp.clip(jnp.round(grouped / _nonzero(steps)) + 8, 0, 15)
        channel_scales = _nonzero(jnp.max(jnp.abs((q - 8) * steps), axis=(0, 1)) / 127)
        return q, (steps[:, 0] / channel_scales).astype(jnp.float16), None, channel_scales

    def _two_levels_with_zeros(self, grouped: Float[Array, "G g N"]) -> tuple[Array, Array, Array, Array]:
        channel_scales = _nonzero(jnp.max(jnp.abs(grouped), axis=(0, 1)) / _PROTECTED)
        integers = jnp.round(grouped / channel_scales)
        lowest, highest = jnp.minimum(integers.min(axis=1), 0), jnp.maximum(integers.max(axis=1), 0)
        scales = jnp.maximum(jnp.round((highest - lowest) / 15), 1)
        zeros = jnp.clip(jnp.round(-lowest / scales), 0, 15)
        q = jnp.clip(jnp.round(integers / scales[:, None]) + zeros[:, None], 0, 15)
        return q, scales.astype(jnp.uint8), (-zeros * scales).astype(jnp.int16), channel_scales


def _nonzero(scales: Float[Array, "..."]) -> Float[Array, "..."]:
    """One where a scale of zero would divide by it: all codes of such a group mean zero."""
    return jnp.where(scales == 0, 1.0, scales)
