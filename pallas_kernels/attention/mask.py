"""Ancestor masks of draft trees, 32 keys to a word."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

WORD = 32


def pack(mask: Bool[Array, "T C"]) -> Int32[Array, "T W"]:
    """See `api.pack_mask`."""
    rows, keys = mask.shape
    padded = jnp.pad(mask, ((0, 0), (0, -keys % WORD))).reshape(rows, -1, WORD)
    bits = padded.astype(jnp.uint32) << jnp.arange(WORD, dtype=jnp.uint32)
    return jnp.sum(bits, axis=-1, dtype=jnp.uint32).view(jnp.int32)


def unpack(words: Int32[Array, "T W"], columns: int) -> Bool[Array, "T C"]:
    """The mask of so many columns that `pack` was given."""
    rows = words.shape[0]
    bits = words[:, :, None] >> jnp.arange(WORD) & 1
    return bits.reshape(rows, -1)[:, :columns].astype(bool)


def windowed(words: Int32[Array, "T W"], columns: int, window: int) -> tuple[Int32[Array, "T W"], Int32[Array, "T"]]:
    """The words without keys that a window hides, and how many keys of its path each row has among these columns."""
    mask = unpack(words, columns)
    behind = jnp.cumsum(mask, axis=1, dtype=jnp.int32)  # the row's path up to each node
    return pack(mask & (behind[:, -1:] - behind < window)), behind[:, -1]


def paths(mask: Bool[Array, "T T"], depth: Int32[Array, "T"]) -> Int32[Array, "T T"]:
    """See `api.tree_paths`."""
    node = jnp.arange(mask.shape[0], dtype=jnp.int32)
    on_path = mask[:, None, :] & (depth[None, None, :] == node[None, :, None])
    return jnp.sum(jnp.where(on_path, node, 0), axis=2, dtype=jnp.int32)
