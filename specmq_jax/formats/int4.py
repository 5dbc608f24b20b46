"""W4A16: symmetric 4-bit weights in groups along the input, 16-bit activations (GPTQ's and Marlin's numerics)."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped

from pallas_kernels.w4a16 import api as w4a16
from specmq_jax.formats.base import WeightFormat, abstract_array
from specmq_jax.formats.logical import GroupedInt4, Logical, Quantised
from specmq_jax.formats.ranges import Range


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int4Group:
    """packed: i32[ceil(K / 128), N, 16] and scales: i32[ceil(groups / 2), N] in `pallas_kernels.w4a16`'s layout; scales:
    f32[1, N] where a column has one.

    order: i32[K], the input that each row multiplies; None where row k multiplies input k.
    """

    packed: Int32[Array, "B N 16"]
    scales: Shaped[Array, "H N"]
    order: Int32[Array, "K"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int4GroupFormat(WeightFormat):
    """w[k, n] = (q[k, n] - 8) * scales[k // group_size, n]; group_size -1 gives each column one scale.

    With `act_order` k counts the inputs in an order that the weight carries (GPTQ's desc_act).
    """

    group_size: int = 128
    act_order: bool = False

    @property
    def name(self) -> str:
        size = {128: "w4a16", -1: "w4a16-channel"}.get(self.group_size, f"w4a16-g{self.group_size}")
        return f"{size}-act-order" if self.act_order else size

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(jnp.float16)

    def _groups(self, rows: int) -> int:
        return 1 if self.group_size == -1 else -(-rows // self.group_size)

    def abstract(self, shape: tuple[int, int]) -> Int4Group:
        rows, columns = shape
        scales = w4a16.scales_shape(rows, columns, self.group_size)
        return Int4Group(abstract_array(w4a16.packed_shape(rows, columns), jnp.int32),
                         abstract_array(scales.shape, scales.dtype),
                         abstract_array((rows,), jnp.int32) if self.act_order else None)

    @property
    def range(self) -> Range:
        """That of f16: many rows are multiplied by the values themselves, in half precision."""
        return Range.of(jnp.float16, codes=8)

    def _pack(self, logical: Logical) -> Int4Group:
        if isinstance(logical, GroupedInt4):
            q, scales, order = jnp.asarray(logical.q), jnp.asarray(logical.scales, jnp.float16), logical.order
        else:
            (q, scales), order = self.round_to_nearest(jnp.asarray(logical, jnp.float32)), None
        packed = w4a16.pack(q), scales.astype(jnp.float32) if self.group_size == -1 else w4a16.pack_scales(scales)
        if not self.act_order:
            return Int4Group(*packed)
        return Int4Group(*packed, jnp.arange(len(q), dtype=jnp.int32) if order is None else jnp.asarray(order, jnp.int32))

    def logical(self, weight: Int4Group, rows: int) -> GroupedInt4:
        """The codes and scales that a weight of so many rows was packed from."""
        scales = weight.scales if self.group_size == -1 else w4a16.unpack_scales(weight.scales, self._groups(rows))
        return GroupedInt4(w4a16.unpack(weight.packed, rows), scales.astype(jnp.float16), self.group_size, weight.order)

    def _holds(self, logical: Quantised) -> bool:
        if not isinstance(logical, GroupedInt4) or (logical.order is not None and not self.act_order):
            return False
        rows = logical.shape[0]
        return self._groups(rows) == 1 == logical.scales.shape[0] or logical.group_size == self.group_size

    def round_to_nearest(self, values: Float[Array, "K N"]) -> tuple[Array, Array]:
        """q uint8[K, N] and scales f16[groups, N].

        The entry of largest magnitude in a group is mapped to -8, the only code without a mirror image, so that all
        sixteen codes are used (ggml's Q4_0 rule); scales may therefore be negative.
        """
        rows, columns = values.shape
        groups = self._groups(rows)
        size = -(-rows // groups) if self.group_size == -1 else self.group_size
        grouped = jnp.pad(values, ((0, groups * size - rows), (0, 0))).reshape(groups, size, columns)
        largest = jnp.argmax(jnp.abs(grouped), axis=1, keepdims=True)
        scales = (jnp.take_along_axis(grouped, largest, axis=1) / -8).astype(jnp.float16)
        step = scales.astype(jnp.float32)
        q = jnp.clip(jnp.round(grouped / jnp.where(step == 0, 1, step)) + 8, 0, 15).astype(jnp.uint8)
        return q.reshape(groups * size, columns)[:rows], scales[:, 0]

    def unpack(self, weight: Int4Group, shape: tuple[int, int]) -> Float[Array, "K N"]:
        return self.logical(weight, shape[0]).dense()

    def matmul(self, x: Float[Array, "M K"], weight: Int4Group, *, peaks: Float[Array, "M C"] | None = None,
               halves: bool = False, reproducible: bool = False, implementation: str | None = None) -> Float[Array, "S M N"]:
        x = x if weight.order is None else x[:, weight.order]
        return w4a16.matmul_partials(x.astype(self.dtype), weight.packed, weight.scales, group_size=self.group_size,
                                     halves=halves, reproducible=reproducible, implementation=implementation)

    def outputs(self, weight: Int4Group, kept: Int32[Array, "n"]) -> Int4Group:
        return Int4Group(weight.packed[:, kept], weight.scales[:, kept], weight.order)
