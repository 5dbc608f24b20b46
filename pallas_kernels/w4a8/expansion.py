"""Packed codes to 8-bit integers in memory, for products of more rows than the kernel of the product takes."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Int8, Int32, UInt8

from pallas_kernels import launch, transposed
from pallas_kernels.w4a8.dequantise import codes_of, rounded_of
from pallas_kernels.w4a8.layout import BLOCK, HALF

_CUT = transposed.Config()


def _body(packed_ref, *refs, with_zeros: bool):
    *groups_refs, out_ref = refs
    outputs, inner = out_ref.shape
    [mine] = transposed.cut(1, inner, outputs, _CUT, block_k=BLOCK, shares=packed_ref.shape[0])
    block = mine.first  # a share is a block
    packed = mine.tile(packed_ref, block, jnp.arange(HALF))
    # not in PTX, whose form wants four of one output in a register: no product is there to lay them out so
    words = mine.per_output(groups_refs[0], block) if groups_refs else None
    if words is not None and not with_zeros:
        halves = rounded_of(packed, words, saturating=True, inline_asm=False)
    else:
        halves = codes_of(packed, inline_asm=False)
        if words is not None:
            halves = [half.astype(jnp.int32) * (words & 0xFFFF)[:, None] + (words >> 16)[:, None] for half in halves]
        elif not with_zeros:
            halves = [half - 8 for half in halves]
    for number, half in enumerate(halves):
        k = block * BLOCK + number * HALF + jnp.arange(HALF)
        plgpu.store(out_ref.at[mine.output[:, None], k[None, :]], half.astype(jnp.int8),
                    mask=transposed.both(mine.output_mask, mine.inside(k)))


@functools.partial(jax.jit, static_argnames=("inner", "with_zeros", "interpret"))
def integers(packed: UInt8[Array, "B N 64"], groups: Int32[Array, "G N"] | None, *, inner: int, with_zeros: bool,
             interpret: bool) -> Int8[Array, "N K"]:
    """What the activations are multiplied by: of groups, `reference.expand`'s integers; of a channel, codes where there are
    zero points, else codes less 8."""
    blocks, outputs = packed.shape[:2]
    [out] = launch.call(
        functools.partial(_body, with_zeros=with_zeros),
        (packed,) if groups is None else (packed, groups), num_warps=_CUT.num_warps, num_stages=1, interpret=interpret,
        name="w4a8_integers", grid=transposed.grid(1, outputs, _CUT, shares=blocks),
        out_shape=(jax.ShapeDtypeStruct((outputs, inner), jnp.int8),))
    return out
