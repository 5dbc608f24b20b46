"""How 4-bit weights lie in memory.

A block is 128 rows of K. Its 8 planes of 16 rows share 16 rows of int32 words: row r of plane p is a nibble of word
r. So a plane of words multiplies a contiguous slab of x, 16 rows long like one tensor-core instruction, and no value
ever changes its lane. Plane p stands in nibble p // 2 + 4 * (p % 2): `words >> 4 * j & 0x000f000f` then holds planes
2j and 2j + 1 in the two halves of a word, where one bitwise or turns them into two floats.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int32, UInt8

BLOCK = 128
PLANES = 8
PLANE_ROWS = BLOCK // PLANES
ZERO = 8  # the code of weight zero
NIBBLES = tuple(plane // 2 + 4 * (plane % 2) for plane in range(PLANES))


def packed_rows(rows: int) -> int:
    """Rows of the packed array for `rows` rows of weights, whole blocks."""
    return -(-rows // BLOCK) * PLANE_ROWS


def pack(q: UInt8[Array, "K N"]) -> Int32[Array, "K8 N"]:
    """See `api.pack`."""
    rows, columns = q.shape
    padding = packed_rows(rows) * PLANES - rows
    padded = jnp.pad(q, ((0, padding), (0, 0)), constant_values=ZERO)
    planes = padded.reshape(-1, PLANES, PLANE_ROWS, columns).astype(jnp.uint32)
    words = jnp.zeros((planes.shape[0], PLANE_ROWS, columns), jnp.uint32)
    for plane, nibble in enumerate(NIBBLES):
        words |= (planes[:, plane] & 0xF) << (4 * nibble)
    return words.reshape(-1, columns).view(jnp.int32)


def unpack(packed: Int32[Array, "K8 N"], rows: int) -> UInt8[Array, "K N"]:
    """See `api.unpack`."""
    columns = packed.shape[1]
    words = packed.reshape(-1, 1, PLANE_ROWS, columns)
    shifts = 4 * jnp.array(NIBBLES, jnp.int32).reshape(PLANES, 1, 1)
    planes = words >> shifts & 0xF
    return planes.reshape(-1, columns)[:rows].astype(jnp.uint8)
