"""Attention over the live part of a cache in plain jnp, block by block, so that its cost follows the live length."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels import exact
from pallas_kernels.attention import mask as masks

BLOCK = 128
MASKED = -1e30  # finite: the difference of two masked scores must not be NaN


def attention(q: Float[Array, "T Hq d"], k_cache: Float[Array, "B L Hkv d"], v_cache: Float[Array, "B L Hkv d"],
              slot: Int32[Array, ""] | int, length: Int32[Array, ""], mask_words: Int32[Array, "T W"] | None, *, tail: int,
              scale: float, window: int | None = None, cap: float | None = None) -> Float[Array, "T Hq d"]:
    """See `api.tree_attention`, and `api.causal_attention` where `mask_words` is None: of one sequence, in one slot."""
    rows, heads, head_dim = q.shape
    _, max_len, kv_heads, _ = k_cache.shape
    block = min(BLOCK, max_len)
    queries = (q.astype(jnp.float32) * scale).reshape(rows, kv_heads, heads // kv_heads, head_dim)
    first_block: Array | int = 0
    first_key: Array | int = 0
    if window is not None:
        words = masks.pack(jnp.tri(rows, dtype=bool)) if mask_words is None else mask_words
        mask_words, behind = masks.windowed(words, tail, window)
        first_key = length + behind[:, None] - window
        first_block = jnp.maximum(first_key.min(), 0) // block
    mask = jnp.tri(rows, dtype=bool) if mask_words is None else masks.unpack(mask_words, tail)

    def visible(key: Int32[Array, "B"]) -> Bool[Array, "T B"]:
        node = key - length
        own = mask[:, jnp.clip(node, 0, tail - 1)]
        return jnp.where(node < 0, True if window is None else key >= first_key, own & (node < tail))

    def step(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        start = jnp.minimum(index * block, max_len - block)
        key = start + jnp.arange(block)
        live = (key >= index * block) & (key < length + tail)
        keys, values = (jax.lax.dynamic_slice(cache, (slot, start, 0, 0), (1, block, kv_heads, head_dim))[0]
                        .astype(jnp.float32) for cache in (k_cache, v_cache))
        values = jnp.where(live[:, None, None], values, 0)  # dead rows may hold NaN
        return _add_block(carry, queries, keys, values, (visible(key) & live)[:, None, None, :], cap)

    blocks = (length + tail + block - 1) // block
    total, _, weight_sum = jax.lax.fori_loop(first_block, blocks, step, _nothing_seen(queries))
    return (total / jnp.where(weight_sum == 0, 1, weight_sum)[..., None]).reshape(q.shape).astype(q.dtype)


def ordered_attention(q: Float[Array, "T Hq d"], k_cache: Float[Array, "B L Hkv d"], v_cache: Float[Array, "B L Hkv d"],
                      slot: Int32[Array, ""] | int, length: Int32[Array, ""], depth: Int32[Array, "T"],
                      paths: Int32[Array, "T D"], *, scale: float, window: int | None = None, cap: float | None = None
                      ) -> Float[Array, "T Hq d"]:
    """See `api.ordered_attention`: each row of one sequence for itself, over its keys in the order of their positions.

    However many rows there are, the products of one are of the same sizes and so of the same bits.
    """
    _, max_len, kv_heads, head_dim = k_cache.shape
    block = min(BLOCK, max_len)

    def one(row: tuple[Array, Array, Array]) -> Float[Array, "Hq d"]:
        query, last, path = row
        queries = (query.astype(jnp.float32) * scale).reshape(kv_heads, -1, head_dim)
        position_of_query = length + last

        def step(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            position = index * block + jnp.arange(block)
            own = length + path[jnp.clip(position - length, 0, len(path) - 1)]
            place = jnp.minimum(jnp.where(position < length, position, own), max_len - 1)
            seen = position <= position_of_query
            if window is not None:
                seen &= position > position_of_query - window
            keys, values = (jnp.where(seen[:, None, None], cache[slot, place], 0).astype(jnp.float32)
                            for cache in (k_cache, v_cache))
            return _add_block(carry, queries, keys, values, seen, cap)

        first_block = 0 if window is None else jnp.maximum(position_of_query - window + 1, 0) // block
        total, _, weight_sum = jax.lax.fori_loop(first_block, position_of_query // block + 1, step, _nothing_seen(queries))
        return (total / weight_sum[..., None]).reshape(query.shape)

    return jax.lax.map(one, (q, depth, paths)).astype(q.dtype)


def each_sequence(attend: Callable[..., Float[Array, "T Hq d"]], q: Float[Array, "M Hq d"],
                  lengths: Int32[Array, "N"], slots: Int32[Array, "N"] | None, *of_rows: Array | None
                  ) -> Float[Array, "M Hq d"]:
    """A function of a sequence's slot, length, queries and what else there is of each of its rows, on one sequence after
    another: each gets the bits that it would have alone."""
    if slots is None:
        return attend(0, lengths[0], q, *of_rows)

    def split(rows: Array | None) -> Array | None:
        return None if rows is None else rows.reshape(len(lengths), -1, *rows.shape[1:])

    return jax.lax.map(lambda sequence: attend(*sequence), (slots, lengths, *map(split, (q, *of_rows)))).reshape(q.shape)


def _nothing_seen(queries: Float[Array, "*T Hkv G d"]) -> tuple[Array, Array, Array]:
    """The weighted sum of values, the largest score and the sum of weights before the first block."""
    shape = queries.shape[:-1]
    return jnp.zeros(queries.shape), jnp.full(shape, MASKED), jnp.zeros(shape)


def _add_block(carry: tuple[Array, Array, Array], queries: Float[Array, "*T Hkv G d"], keys: Float[Array, "B Hkv d"],
               values: Float[Array, "B Hkv d"], seen: Bool[Array, "*S B"], cap: float | None
               ) -> tuple[Array, Array, Array]:
    """The three with a block of keys added, of which each query sees some."""
    total, largest, weight_sum = carry
    scores = jnp.einsum("...hgd,jhd->...hgj", queries, keys, precision="highest")
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    scores = jnp.where(seen, scores, MASKED)
    new_largest = jnp.maximum(largest, scores.max(-1))
    weights = jnp.where(seen, jnp.exp(scores - new_largest[..., None]), 0)
    decay = jnp.exp(largest - new_largest)
    added = jnp.einsum("...hgj,jhd->...hgd", weights, values, precision="highest")
    total = exact.rounded(total * decay[..., None]) + added
    return total, new_largest, exact.rounded(weight_sum * decay) + exact.row_sums(weights)[..., 0]
