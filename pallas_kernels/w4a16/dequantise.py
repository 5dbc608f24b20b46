"""Packed words to half-precision planes inside a kernel, without an integer-to-float conversion.

A 4-bit code or-ed into the mantissa of 1024.0 (f16) or 128.0 (bf16) is that number plus the code (Kim et al.,
arXiv:2211.10017); subtracting the base and the zero point leaves q - 8 exactly.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32, Shaped

from pallas_kernels.w4a16.layout import PLANE_ROWS, PLANES, ZERO


def planes_of(words: Int32[Array, "N 16"], dtype: jnp.dtype, beside: Sequence[Int32[Array, "N"]] = (), *, inline_asm: bool
              ) -> list[Float[Array, "N 32"]]:
    """The planes q - 8 of a block in `dtype` (f16 or bf16), in order of K.

    `inline_asm` handles two weights an instruction and compiles for NVIDIA GPUs only; the other form runs everywhere. It
    reads the words `beside` and does not use them: Triton asks ahead of time for those loads alone that a product's operand
    depends on.
    """
    if inline_asm:
        beside = [jnp.broadcast_to(numbers[:, None], words.shape) for numbers in beside]
        pairs = [_pairs_in_ptx(words, plane, dtype, () if plane else beside) for plane in range(PLANES)]
        return [_in_order(*(jax.lax.bitcast_convert_type(half.astype(jnp.int16), dtype) for half in (pair, pair >> 16)))
                for pair in pairs]
    base, exponent = (1024, 0x6400) if dtype == jnp.float16 else (128, 0x4300)
    offset = jnp.asarray(base + ZERO, dtype)
    bits = [_in_order(*((words >> (4 * plane + high) & 0xF) | exponent for high in (0, 16))) for plane in range(PLANES)]
    return [jax.lax.bitcast_convert_type(each.astype(jnp.int16), dtype) - offset for each in bits]


def joined(planes: list[Float[Array, "R C"]]) -> Float[Array, "..."]:
    """A power of two of planes one behind the other along the second axis, that of K, for one long product of them all.

    The tensor core takes K in shorter steps than a plane's columns, so that the joining of registers costs no instruction.
    """
    while len(planes) > 1:
        planes = [_join(*planes[first:first + 2]) for first in range(0, len(planes), 2)]
    return planes[0]


def _join(a: Array, b: Array) -> Array:
    rows, columns = a.shape
    return jnp.transpose(jnp.stack([a, b], axis=-1), (0, 2, 1)).reshape(rows, 2 * columns)


def _in_order(even: Shaped[Array, "N 16"], odd: Shaped[Array, "N 16"]) -> Shaped[Array, "N 32"]:
    """A plane from each word's two neighbours, in order of K. Where a lane holds the words that the tensor core's layout
    gives it, no instruction comes of this."""
    columns = len(even)
    both = jnp.stack([even, odd], axis=-1).reshape(columns, 4, 2, 2, 2)  # p, t, h and the one of two neighbours
    return jnp.transpose(both, (0, 2, 3, 1, 4)).reshape(columns, PLANE_ROWS)


def _pairs_in_ptx(words: Int32[Array, "N 16"], plane: int, dtype: jnp.dtype, beside: Sequence[Int32[Array, "N 16"]]
                  ) -> Int32[Array, "N 16"]:
    """One plane, two neighbouring rows in the halves of each word."""
    if dtype == jnp.float16:
        # A code in the upper nibble of a byte counts 16-fold, which the multiplication undoes: no shift by four.
        mask, finish = [("0x000f000f", "mov.b32 c, 0x64086408; sub.f16x2 $0, t, c;"),
                        ("0x00f000f0", "mov.b32 o, 0x2c002c00; mov.b32 c, 0xd480d480; fma.rn.f16x2 $0, t, o, c;")
                        ][plane % 2]
        shift, exponent = 8 * (plane // 2), "0x64006400"
    else:
        # bf16 has no room above the code, and no subtraction before sm_90: times one, plus the negative offset.
        mask, finish = "0x000f000f", "mov.b32 o, 0x3f803f80; mov.b32 c, 0xc308c308; fma.rn.bf16x2 $0, t, o, c;"
        shift, exponent = 4 * plane, "0x43004300"
    asm = (f"{{ .reg .b32 t, c, o; shr.u32 t, $1, {shift}; lop3.b32 t, t, {mask}, {exponent}, 0xea; {finish} }}")
    # one word at a time: with pack=2 two neighbours would have to share a register, which only some layouts do
    [result] = plgpu.elementwise_inline_asm(asm, args=[words, *beside], constraints="=r,r" + ",r" * len(beside), pack=1,
                                            result_shape_dtypes=[jax.ShapeDtypeStruct(words.shape, jnp.int32)])
    return result


def multiply_add(a: Float[Array, "M N"], b: Float[Array, "M N"], c: Float[Array, "M N"], *, inline_asm: bool
                 ) -> Float[Array, "M N"]:
    """a * b + c in f32, which the compiler would leave as two instructions; the inline form rounds once."""
    if not inline_asm:
        return a * b + c
    [out] = plgpu.elementwise_inline_asm(
        "fma.rn.f32 $0, $1, $2, $3;", args=[a, jnp.broadcast_to(b, a.shape), c], constraints="=f,f,f,f", pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(a.shape, jnp.float32)])
    return out
