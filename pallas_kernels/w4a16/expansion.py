"""Packed weights to plain ones in memory, for products of more rows than the kernel of the product takes."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32, Shaped

from pallas_kernels import launch, transposed
from pallas_kernels.w4a16 import layout
from pallas_kernels.w4a16.dequantise import planes_of

_CUT = transposed.Config()


def _body(packed_ref, scales_ref, out_ref, *, group_size: int):
    columns, inner = out_ref.shape
    [mine] = transposed.cut(1, inner, columns, _CUT, block_k=layout.BLOCK, shares=packed_ref.shape[0])
    block = mine.first  # a share is a block
    planes = planes_of(mine.tile(packed_ref, block, jnp.arange(layout.WORDS)), jnp.float16, inline_asm=False)
    for number, plane in enumerate(planes):
        k = block * layout.BLOCK + number * layout.PLANE_ROWS
        if group_size == -1:
            scales = mine.per_output(scales_ref, jnp.int32(0))
        else:
            group = k // group_size  # groups are whole planes; past the last one nobody keeps what comes out
            words = mine.per_output(scales_ref, jnp.minimum(group // 2, scales_ref.shape[0] - 1))
            scales = layout.half_of(words, 16 * (group % 2)).astype(jnp.float32)
        values = plane.astype(jnp.float32) * scales[:, None]
        column = k + jnp.arange(layout.PLANE_ROWS)
        plgpu.store(out_ref.at[mine.output[:, None], column[None, :]], values.astype(out_ref.dtype),
                    mask=transposed.both(mine.output_mask, mine.inside(column)))


@functools.partial(jax.jit, static_argnames=("inner", "group_size", "dtype", "interpret"))
def dequantise(packed: Int32[Array, "B N 16"], scales: Shaped[Array, "H N"], *, inner: int, group_size: int,
               dtype: jnp.dtype, interpret: bool) -> Float[Array, "N K"]:
    """The weights (q - 8) * scale, multiplied in f32 and rounded to `dtype`, K last."""
    blocks, columns = packed.shape[:2]
    [out] = launch.call(
        functools.partial(_body, group_size=group_size), (packed, scales), num_warps=_CUT.num_warps, num_stages=1,
        interpret=interpret, name="w4a16_dequantise", grid=transposed.grid(1, columns, _CUT, shares=blocks),
        out_shape=(jax.ShapeDtypeStruct((columns, inner), dtype),))
    return out
