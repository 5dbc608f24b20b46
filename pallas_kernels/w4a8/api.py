"""4-bit codes two to a byte, and the 8-bit integers that groups of them stand for.

A block is 64 columns of K in 32 bytes: byte j holds column j in its low nibble and column 32 + j in its high one, so that
a mask and a shift of four bytes at a time give two runs of 32 integers, as long as one tensor-core instruction takes.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int8, Shaped, UInt8

BLOCK = 64
_HALF = BLOCK // 2


def packed_bytes(rows: int) -> int:
    """Bytes of an output's `rows` codes, whole blocks."""
    return -(-rows // BLOCK) * _HALF


def pack(q: UInt8[Array, "N K"]) -> UInt8[Array, "N B"]:
    """Packs codes 0..15, an output a row; columns that pad K to a multiple of 64 have code 0.

    Returns uint8[N, ceil(K / 64) * 32]. Raises ValueError for anything but uint8[N, K].
    """
    if q.ndim != 2 or q.dtype != jnp.uint8:
        raise ValueError(f"q is {q.dtype}{list(q.shape)}; expected uint8[N, K]")
    outputs, rows = q.shape
    halves = jnp.pad(q, ((0, 0), (0, 2 * packed_bytes(rows) - rows))).reshape(outputs, -1, 2, _HALF)
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).reshape(outputs, -1)


def unpack(packed: UInt8[Array, "N B"], rows: int) -> UInt8[Array, "N K"]:
    """The codes uint8[N, rows] that `pack` was given. Raises ValueError when `packed` does not hold `rows` columns."""
    if packed.ndim != 2 or packed.dtype != jnp.uint8 or packed.shape[1] != packed_bytes(rows):
        raise ValueError(f"packed is {packed.dtype}{list(packed.shape)}; expected uint8[N, {packed_bytes(rows)}] for "
                         f"K = {rows}")
    halves = packed.reshape(packed.shape[0], -1, 1, _HALF)
    both = jnp.concatenate([halves & 15, halves >> 4], axis=2)
    return both.reshape(packed.shape[0], -1)[:, :rows]


def expand(q: UInt8[Array, "N K"], scales: Shaped[Array, "N G"], zeros: Shaped[Array, "N G"] | None, group_size: int
           ) -> Int8[Array, "N K"]:
    """The 8-bit integers of grouped codes.

    Args:
      q: uint8[N, K], 0..15.
      scales: [N, ceil(K / group_size)]: f16 for (q - 8) * scale, rounded half to even and held to [-128, 127] (QQQ,
        arXiv:2406.09904), or uint8 for q * scale + zero (QoQ, arXiv:2405.04532).
      zeros: int16 of scales' shape beside uint8 scales, else None.
      group_size: columns that share a scale.

    Returns:
      int8[N, K].
    """
    rows = q.shape[1]
    scale = jnp.repeat(scales.astype(jnp.float32), group_size, axis=1)[:, :rows]
    codes = q.astype(jnp.float32)
    if zeros is None:
        values = jnp.round((codes - 8) * scale)
    else:
        values = codes * scale + jnp.repeat(zeros.astype(jnp.float32), group_size, axis=1)[:, :rows]
    return jnp.clip(values, -128, 127).astype(jnp.int8)
