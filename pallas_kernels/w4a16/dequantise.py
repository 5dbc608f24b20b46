"""Packed words to half-precision planes inside a kernel, without an integer-to-float conversion.

A 4-bit code or-ed into the mantissa of 1024.0 (f16) or 128.0 (bf16) is that number plus the code (Kim et al.,
arXiv:2211.10017); subtracting the base and the zero point leaves q - 8 exactly.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.w4a16.layout import NIBBLES, PLANES, ZERO


def planes_of(words: Int32[Array, "R C"], dtype: jnp.dtype, beside: Sequence[Float[Array, "R C"]] = (), *, inline_asm: bool
              ) -> list[Float[Array, "R C"]]:
    """The planes q - 8 of a block in `dtype` (f16 or bf16), in order of K.

    `inline_asm` handles two weights an instruction and compiles for NVIDIA GPUs only; the other form runs everywhere. It
    reads the f32 arrays `beside` and does not use them: Triton asks ahead of time for those loads alone that a product's
    operand depends on.
    """
    if inline_asm:
        return [_plane_in_ptx(words, nibble, dtype, () if nibble else beside) for nibble in NIBBLES]
    base, exponent = (1024, 0x64006400) if dtype == jnp.float16 else (128, 0x43004300)
    offset = jnp.asarray(base + ZERO, dtype)
    planes = []
    for pair in range(PLANES // 2):
        both = ((words >> (4 * pair)) & 0x000F000F) | exponent
        for half in (both, both >> 16):
            planes.append(jax.lax.bitcast_convert_type(half.astype(jnp.int16), dtype) - offset)
    return planes


def joined(planes: list[Float[Array, "R C"]], axis: int) -> Float[Array, "..."]:
    """A power of two of planes one behind the other along `axis`, the axis of K, for one long product of them all.

    The tensor core takes K in steps of a plane's 16 rows, so that the joining of registers costs no instruction.
    """
    while len(planes) > 1:
        planes = [_join(*planes[first:first + 2], axis) for first in range(0, len(planes), 2)]
    return planes[0]


def _join(a: Array, b: Array, axis: int) -> Array:
    shape = list(a.shape)
    shape[axis] *= 2
    between = (2, 0, 1) if axis == 0 else (0, 2, 1)
    return jnp.transpose(jnp.stack([a, b], axis=-1), between).reshape(shape)


def _plane_in_ptx(words: Int32[Array, "R C"], nibble: int, dtype: jnp.dtype, beside: Sequence[Float[Array, "R C"]]
                  ) -> Float[Array, "R C"]:
    """One plane, two words at a time.

    The same half of both words is gathered first, so that the result is a pair of neighbours in the operand of the
    tensor core, as it wants them. The assembler merges the gathers and shifts that planes have in common.
    """
    gather = f"prmt.b32 t, $1, $2, {0x7632 if nibble >= PLANES // 2 else 0x5410:#06x};"
    place = nibble % 4
    if dtype == jnp.float16:
        # A code in the upper nibble of a byte counts 16-fold, which the multiplication undoes: no shift by four.
        mask, finish = [("0x000f000f", "mov.b32 c, 0x64086408; sub.f16x2 $0, t, c;"),
                        ("0x00f000f0", "mov.b32 o, 0x2c002c00; mov.b32 c, 0xd480d480; fma.rn.f16x2 $0, t, o, c;")
                        ][place % 2]
        shift, exponent = 8 * (place // 2), "0x64006400"
    else:
        # bf16 has no room above the code, and no subtraction before sm_90: times one, plus the negative offset.
        mask, finish = "0x000f000f", "mov.b32 o, 0x3f803f80; mov.b32 c, 0xc308c308; fma.rn.bf16x2 $0, t, o, c;"
        shift, exponent = 4 * place, "0x43004300"
    shifted = f"shr.u32 t, t, {shift};" if shift else ""
    asm = f"{{ .reg .b32 t, c, o; {gather} {shifted} lop3.b32 t, t, {mask}, {exponent}, 0xea; {finish} }}"
    [plane] = plgpu.elementwise_inline_asm(asm, args=[words, *beside], constraints="=r,r,r" + ",f,f" * len(beside), pack=2,
                                           result_shape_dtypes=[jax.ShapeDtypeStruct(words.shape, dtype)])
    return plane


def multiply_add(a: Float[Array, "M N"], b: Float[Array, "M N"], c: Float[Array, "M N"], *, inline_asm: bool
                 ) -> Float[Array, "M N"]:
    """a * b + c in f32, which the compiler would leave as two instructions; the inline form rounds once."""
    if not inline_asm:
        return a * b + c
    [out] = plgpu.elementwise_inline_asm(
        "fma.rn.f32 $0, $1, $2, $3;", args=[a, jnp.broadcast_to(b, a.shape), c], constraints="=f,f,f,f", pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(a.shape, jnp.float32)])
    return out
