"""Packed bytes to 8-bit integers inside a kernel, four at a time.

Each function has a form in PTX, for NVIDIA GPUs, and one that runs everywhere.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int8, Int32, UInt8

Pair = tuple[Int8[Array, "n b"], Int8[Array, "n b"]]
"""A block's first columns of K, from the low nibbles, and its last."""


def codes_of(packed: UInt8[Array, "n b"], companion: Int32[Array, "n"] | None = None, *, inline_asm: bool) -> Pair:
    """The codes q, 0 to 15.

    `companion` is read and not used: Triton asks ahead of time for those loads alone that a product's operand depends on.
    """
    if not inline_asm:
        return (packed & 15).astype(jnp.int8), (packed >> 4).astype(jnp.int8)
    beside = () if companion is None else (jnp.broadcast_to(companion[:, None], packed.shape),)
    return (_four_bytes("and.b32 $0, $1, 0x0f0f0f0f;", packed, *beside),
            _four_bytes("{ .reg .b32 t; shr.u32 t, $1, 4; and.b32 $0, t, 0x0f0f0f0f; }", packed))


def centred_of(packed: UInt8[Array, "n b"], *, inline_asm: bool) -> Pair:
    """16 * (q - 8): a code in the upper half of a byte, its uppermost bit inverted."""
    if not inline_asm:
        return tuple(((half - 8) * 16).astype(jnp.int8) for half in codes_of(packed, inline_asm=False))
    flip = "lop3.b32 $0, {}, 0xf0f0f0f0, 0x80808080, 0x6a;"  # (a & b) ^ c
    return (_four_bytes(f"{{ .reg .b32 t; shl.b32 t, $1, 4; {flip.format('t')} }}", packed),
            _four_bytes(flip.format("$1"), packed))


def rounded_of(packed: UInt8[Array, "n b"], scales: Int32[Array, "n"], *, saturating: bool, inline_asm: bool) -> Pair:
    """(q - 8) * scale, rounded half to even; scales f16, twice in a word. With `saturating`, held to [-128, 127].

    In f16, numbers from 1024 to 2048 are whole: the multiplication that adds 1536 rounds, and leaves the integer's two's
    complement in its lowest byte. Additions that turn what is negative to zero do the holding, for they run beside the bit
    operations, where minimum and maximum queue behind them.
    """
    if not inline_asm:
        halves = jax.lax.bitcast_convert_type(scales.astype(jnp.int16), jnp.float16)
        wide = halves.astype(jnp.float32)[:, None]
        rounded = (_rounded((half - 8).astype(jnp.float32) * wide) for half in codes_of(packed, inline_asm=False))
        return tuple((jnp.clip(half, -128, 127) if saturating else half).astype(jnp.int8) for half in rounded)
    scale = jnp.broadcast_to(scales[:, None], packed.shape)
    return tuple(_rounded_half(packed, scale, saturating, high) for high in (False, True))


def _rounded(values: Float[Array, "n b"]) -> Float[Array, "n b"]:
    """Half to even, of products of a code and an f16 scale, to which adding a half is exact; Pallas lowers no `round`."""
    above = jnp.floor(values + 0.5)
    odd = jnp.floor(above * 0.5) * 2 != above
    return jnp.where((above - values == 0.5) & odd, above - 1, above)


def _rounded_half(packed: UInt8[Array, "n b"], scale: Array, saturating: bool, high: bool) -> Int8[Array, "n b"]:
    constants = {"m": 0x6600, "l": 0xE580, "h": 0x5BF8, "e": 0x667F, "p": 0x3C00, "n": 0xBC00}  # 1536 -1408 255 1663 1 -1
    # A code in the upper nibble of a byte counts 16-fold, which the multiplication undoes.
    mask, centre = ("0x00f000f0", "fma.rn.f16x2 {0}, {0}, o, c;") if high else ("0x000f000f", "sub.f16x2 {0}, {0}, c;")
    constants |= {"o": 0x2C00, "c": 0xD480} if high else {"c": 0x6408}
    step = f"lop3.b32 {{0}}, {{1}}, {mask}, 0x64006400, 0xea; {centre} fma.rn.f16x2 {{0}}, {{0}}, $2, m;"  # v + 1536
    if saturating:
        step += (" fma.rn.relu.f16x2 {0}, {0}, p, l;"  # v + 128, from 0 on
                 " fma.rn.relu.f16x2 {0}, {0}, n, h;"  # 255 less that, from 0 on
                 " fma.rn.f16x2 {0}, {0}, n, e;")  # v + 1536 again
    asm = (f"{{ .reg .b32 a, b, s, {', '.join(constants)}; "
           + "".join(f"mov.b32 {name}, {bits * 0x10001:#x}; " for name, bits in constants.items())
           + "shr.u32 s, $1, 8; " + step.format("a", "$1") + " " + step.format("b", "s") + " prmt.b32 $0, a, b, 0x6240; }")
    return _four_bytes(asm, packed, scale)


def _four_bytes(asm: str, packed: UInt8[Array, "n b"], *words: Int32[Array, "n b"]) -> Int8[Array, "n b"]:
    """Of each word, which is the same for all columns, the first of four."""
    [result] = plgpu.elementwise_inline_asm(asm, args=[packed, *words], constraints="=r,r" + ",r,r,r,r" * len(words), pack=4,
                                            result_shape_dtypes=[jax.ShapeDtypeStruct(packed.shape, jnp.int8)])
    return result
