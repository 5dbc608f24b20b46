"""W4A8: 4-bit weights that are multiplied as 8-bit integers by 8-bit activations.

QQQ (arXiv:2406.09904) is symmetric, QoQ (QServe, arXiv:2405.04532) has zero points; both know one scale an output, and
groups whose scales turn the codes into 8-bit integers of one scale an output.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped, UInt8

from pallas_kernels.w4a8 import api as w4a8
from pallas_kernels.w8a8 import api as w8a8
from specmq_jax.formats.base import WeightFormat
from specmq_jax.formats.logical import ChannelInt4, Logical, TwoLevelInt4, dense_values

_PROTECTED = 119  # QoQ's first level stops short of 127, so that the second one's rounding can't leave 8 bits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int4Channel:
    """packed: uint8[N, B] in `pallas_kernels.w4a8`'s layout; scales, offsets: f32[N]; w = q * scale - offset."""

    packed: UInt8[Array, "N B"]
    scales: Float[Array, "N"]
    offsets: Float[Array, "N"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int4TwoLevel:
    """packed: uint8[N, B]; group_scales f16 or uint8[N, G], group_zeros int16[N, G] or None; channel_scales f32[N]."""

    packed: UInt8[Array, "N B"]
    group_scales: Shaped[Array, "N G"]
    group_zeros: Shaped[Array, "N G"] | None
    channel_scales: Float[Array, "N"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int4Int8Format(WeightFormat):
    """Attributes: scheme, "qqq" or "qoq"; group_size, rows of K that share a scale, -1 for all."""

    scheme: str
    group_size: int = -1

    @property
    def name(self) -> str:
        return f"w4a8-{self.scheme}" + ("" if self.group_size == -1 else f"-g{self.group_size}")

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(jnp.float16)

    @property
    def _zeros(self) -> bool:
        return self.scheme == "qoq"

    def abstract(self, shape: tuple[int, int]) -> Any:
        rows, columns = shape

        def array(dtype: Any, *trailing: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((columns, *trailing), dtype)

        packed, scales = array(jnp.uint8, w4a8.packed_bytes(rows)), array(jnp.float32)
        if self.group_size == -1:
            return Int4Channel(packed, scales, array(jnp.float32))
        groups = -(-rows // self.group_size)
        return Int4TwoLevel(packed, array(jnp.uint8 if self._zeros else jnp.float16, groups),
                            array(jnp.int16, groups) if self._zeros else None, scales)

    def pack(self, logical: Logical) -> Any:
        if not self._holds(logical):
            logical = self._quantise(dense_values(logical).astype(jnp.float32))
        packed = w4a8.pack(jnp.asarray(logical.q).T)
        if isinstance(logical, ChannelInt4):
            return Int4Channel(packed, jnp.asarray(logical.scales, jnp.float32), jnp.asarray(logical.offsets, jnp.float32))
        zeros = None if logical.group_zeros is None else jnp.asarray(logical.group_zeros, jnp.int16).T
        return Int4TwoLevel(packed, jnp.asarray(logical.group_scales).T, zeros,
                            jnp.asarray(logical.channel_scales, jnp.float32))

    def _holds(self, logical: Logical) -> bool:
        """Whether the weight was stored in this format; QQQ's per channel has the offset of a code 8."""
        if isinstance(logical, ChannelInt4):
            return self.group_size == -1 and (self._zeros or bool((logical.offsets == 8 * logical.scales).all()))
        return (isinstance(logical, TwoLevelInt4) and logical.group_size == self.group_size
                and (logical.group_zeros is not None) == self._zeros)

    def unpack(self, weight: Any, shape: tuple[int, int]) -> Float[Array, "K N"]:
        q = w4a8.unpack(weight.packed, shape[0])
        if isinstance(weight, Int4Channel):
            return ChannelInt4(q.T, weight.scales, weight.offsets).dense()
        integers = w4a8.expand(q, weight.group_scales, weight.group_zeros, self.group_size)
        return integers.T.astype(jnp.float32) * weight.channel_scales

    def matmul(self, x: Float[Array, "M K"], weight: Any, *, reproducible: bool = False) -> Float[Array, "S M N"]:
        codes, row_scales = w8a8.quantise_rows(x)
        product = functools.partial(w8a8.matmul_partials, codes, row_scales, reproducible=reproducible)
        q = w4a8.unpack(weight.packed, x.shape[1])
        if isinstance(weight, Int4TwoLevel):
            integers = w4a8.expand(q, weight.group_scales, weight.group_zeros, self.group_size)
            return product(integers, weight.channel_scales)
        if not self._zeros:
            return product(q.astype(jnp.int8) - 8, weight.scales)
        # QServe's epilogue takes the zero points times the activations as they were. Their rounding then meets q, which is
        # of one sign, instead of q less its zero point: a model packed by DeepCompressor erred by 3.9 % of its logits' norm
        # so, and errs by 1.3 % with rounded activations on both sides.
        total = jnp.sum(codes, axis=1, dtype=jnp.int32).astype(jnp.float32) * row_scales
        partials = product(q.astype(jnp.int8), weight.scales)
        return partials - total[:, None] * (weight.offsets / len(partials))

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
        steps = _nonzero(largest / -8)  # the entry of largest magnitude gets the code without a mirror image
        q = jnp.clip(jnp.round(grouped / steps) + 8, 0, 15)
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
