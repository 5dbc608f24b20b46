"""4-bit codes two to a byte: a block of 128 columns of K, which is also a group, in 64 bytes; a group's numbers in a word.

Byte j of a block holds column j in its low nibble and column 64 + j in its high one, so that a mask and a shift of four
bytes at a time give two runs of integers in the order in which the tensor core takes them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, Shaped, UInt8

BLOCK = 128
HALF = BLOCK // 2


def packed_bytes(rows: int) -> int:
    """Bytes of an output's `rows` codes, whole blocks."""
    return -(-rows // BLOCK) * HALF


def pack(q: UInt8[Array, "N K"]) -> UInt8[Array, "N B"]:
    """Packs codes 0..15, an output a row; columns that pad K to a multiple of 128 have code 0.

    Returns uint8[N, ceil(K / 128) * 64]. Raises ValueError for anything but uint8[N, K].
    """
    if q.ndim != 2 or q.dtype != jnp.uint8:
        raise ValueError(f"q is {q.dtype}{list(q.shape)}; expected uint8[N, K]")
    outputs, rows = q.shape
    halves = jnp.pad(q, ((0, 0), (0, 2 * packed_bytes(rows) - rows))).reshape(outputs, -1, 2, HALF)
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).reshape(outputs, -1)


def unpack(packed: UInt8[Array, "N B"], rows: int) -> UInt8[Array, "N K"]:
    """The codes uint8[N, rows] that `pack` was given. Raises ValueError when `packed` does not hold `rows` columns."""
    if packed.ndim != 2 or packed.dtype != jnp.uint8 or packed.shape[1] != packed_bytes(rows):
        raise ValueError(f"packed is {packed.dtype}{list(packed.shape)}; expected uint8[N, {packed_bytes(rows)}] for "
                         f"K = {rows}")
    halves = packed.reshape(packed.shape[0], -1, 1, HALF)
    both = jnp.concatenate([halves & 15, halves >> 4], axis=2)
    return both.reshape(packed.shape[0], -1)[:, :rows]


def pack_groups(scales: Shaped[Array, "G N"], zeros: Shaped[Array, "G N"] | None) -> Int32[Array, "G N"]:
    """A word for each group of 128 columns and output: what loads of four bytes bring in time.

    Args:
      scales: f16, which stand in both halves of the word, or uint8, in the lower half.
      zeros: whole numbers of 16 bits for the upper half beside uint8 scales, else None.

    Raises:
      ValueError: other dtypes.
    """
    if scales.dtype == jnp.float16 and zeros is None:
        bits = jax.lax.bitcast_convert_type(scales, jnp.uint16).astype(jnp.uint32)
        return (bits | (bits << 16)).view(jnp.int32)
    if scales.dtype == jnp.uint8 and zeros is not None and jnp.issubdtype(zeros.dtype, jnp.integer):
        return (zeros.astype(jnp.int32) << 16) | scales.astype(jnp.int32)
    raise ValueError(f"scales are {scales.dtype}, zeros {zeros if zeros is None else zeros.dtype}; expected float16 and None, "
                     "or uint8 and int16")


def unpack_groups(words: Int32[Array, "G N"], *, with_zeros: bool) -> tuple[Array, Array | None]:
    """The scales and zeros that `pack_groups` was given, zeros as int16."""
    if with_zeros:
        return (words & 0xFFFF).astype(jnp.uint8), (words >> 16).astype(jnp.int16)
    return jax.lax.bitcast_convert_type((words & 0xFFFF).astype(jnp.uint16), jnp.float16), None
