"""4-bit codes two to a byte: a block of 128 columns of K, which is also a group, in 64 bytes; a group's numbers in a word.

All outputs' bytes of a block lie together: what a program reads at a time is one piece of memory. Byte j of a block holds
column j in its low nibble and column 64 + j in its high one, so that a mask and a shift of four bytes at a time give two
runs of integers in the order in which the tensor core takes them.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, Shaped, UInt8

BLOCK = 128
HALF = BLOCK // 2


def packed_shape(outputs: int, rows: int) -> tuple[int, int, int]:
    """The shape of what `pack` makes of uint8[outputs, rows]."""
    return -(-rows // BLOCK), outputs, HALF


@jax.jit
def pack(q: UInt8[Array, "N K"]) -> UInt8[Array, "B N 64"]:
    """Packs codes 0..15, an output a row; columns that pad K to a multiple of 128 have code 0.

    Returns uint8[ceil(K / 128), N, 64]. Raises ValueError for anything but uint8[N, K].
    """
    if q.ndim != 2 or q.dtype != jnp.uint8:
        raise ValueError(f"q is {q.dtype}{list(q.shape)}; expected uint8[N, K]")
    outputs, rows = q.shape
    halves = jnp.pad(q, ((0, 0), (0, -rows % BLOCK))).reshape(outputs, -1, 2, HALF)
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).swapaxes(0, 1)


@functools.partial(jax.jit, static_argnums=1)
def unpack(packed: UInt8[Array, "B N 64"], rows: int) -> UInt8[Array, "N K"]:
    """The codes uint8[N, rows] that `pack` was given. Raises ValueError when `packed` does not hold `rows` columns."""
    check_packed(packed, rows)
    halves = packed.swapaxes(0, 1)[:, :, None]
    both = jnp.concatenate([halves & 15, halves >> 4], axis=2)
    return both.reshape(packed.shape[1], -1)[:, :rows]


def check_packed(packed: Array, rows: int) -> None:
    """Raises ValueError when `packed` does not hold `rows` columns."""
    expected = packed_shape(packed.shape[1] if packed.ndim == 3 else 0, rows)
    if packed.shape != expected or packed.dtype != jnp.uint8:
        raise ValueError(f"packed is {packed.dtype}{list(packed.shape)}; expected uint8[{expected[0]}, N, {HALF}] for "
                         f"K = {rows}")


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
