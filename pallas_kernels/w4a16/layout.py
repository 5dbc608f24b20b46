"""How 4-bit weights and the scales of their groups lie in memory.

A block is 128 rows of K: 16 words of int32 for each column, side by side. Nibbles i and i + 4 of a word are neighbouring rows,
so that `words >> 4 * i & 0x000f000f` holds both in the halves of a word, where one bitwise or turns them into two floats.
Word 4p + 2t + h holds row 32i + 16t + 8h + 2p in nibble i. A lane of the tensor core's instruction takes the rows 2p, 2p + 1,
2p + 8 and 2p + 9 of every 16, so that four neighbouring words are all that it wants of a block's column: it reads them from
shared memory at once, without a bank conflict, and no value ever changes its lane.

A word of scales holds those of two neighbouring groups in f16, the even one in its lower half: a load of four bytes is the
narrowest that a GPU makes ahead of time.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt8

BLOCK = 128
WORDS = BLOCK // 8
PLANES = 4
PLANE_ROWS = BLOCK // PLANES  # the rows of nibbles i and i + 4, neighbours in K
ZERO = 8  # the code of weight zero

_PARTS = (4, 2, 2)  # p, t and h of a word


def packed_blocks(rows: int) -> int:
    """Blocks that hold `rows` rows of weights."""
    return -(-rows // BLOCK)


@jax.jit
def pack(q: UInt8[Array, "K N"]) -> Int32[Array, "B N 16"]:
    """See `api.pack`."""
    rows, columns = q.shape
    padded = jnp.pad(q, ((0, packed_blocks(rows) * BLOCK - rows), (0, 0)), constant_values=ZERO)
    codes = padded.reshape(-1, PLANES, 2, 2, 4, 2, columns)  # i, t, h, p and the one of two neighbours
    codes = codes.transpose(0, 6, 4, 2, 3, 5, 1).reshape(-1, columns, WORDS, 8).astype(jnp.uint32)
    words = jnp.zeros(codes.shape[:-1], jnp.uint32)
    for nibble in range(8):
        words |= (codes[..., nibble] & 0xF) << (4 * nibble)
    return words.view(jnp.int32)


@functools.partial(jax.jit, static_argnums=1)
def unpack(packed: Int32[Array, "B N 16"], rows: int) -> UInt8[Array, "K N"]:
    """See `api.unpack`."""
    columns = packed.shape[1]
    words = packed.reshape(-1, columns, 1, *_PARTS, 1)
    shifts = 4 * (jnp.arange(PLANES).reshape(PLANES, 1, 1, 1, 1) + 4 * jnp.arange(2))
    codes = (words >> shifts & 0xF).astype(jnp.uint8)  # B, N, i, p, t, h and the one of two neighbours
    # K last, as it lies in memory: a product takes the transposed matrix as it is
    return codes.transpose(1, 0, 2, 4, 5, 3, 6).reshape(columns, -1)[:, :rows].T


def scale_words(groups: int) -> int:
    """Words of a column that hold the scales of so many groups."""
    return -(-groups // 2)


@jax.jit
def pack_scales(scales: Float[Array, "G N"]) -> Int32[Array, "H N"]:
    """See `api.pack_scales`."""
    groups, columns = scales.shape
    padded = jnp.pad(scales.astype(jnp.float16), ((0, groups % 2), (0, 0)))
    halves = jax.lax.bitcast_convert_type(padded, jnp.uint16).astype(jnp.uint32).reshape(-1, 2, columns)
    return (halves[:, 0] | halves[:, 1] << 16).view(jnp.int32)


def half_of(words: Int32[Array, "..."], shift: int | Int32[Array, ""]) -> Float[Array, "..."]:
    """The f16 scales in the half of words that begins at bit `shift`, 0 or 16."""
    return jax.lax.bitcast_convert_type((words >> shift).astype(jnp.int16), jnp.float16)


@functools.partial(jax.jit, static_argnums=1)
def unpack_scales(words: Int32[Array, "H N"], groups: int) -> Float[Array, "G N"]:
    """See `api.unpack_scales`."""
    halves = jnp.stack([half_of(words, 0), half_of(words, 16)], axis=1)
    return halves.reshape(-1, words.shape[1])[:groups].astype(jnp.float32)
