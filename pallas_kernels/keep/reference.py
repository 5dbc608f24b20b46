"""What stays of a tree's rows in key-value caches, in plain jnp."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def keep_path(caches: Sequence[Float[Array, "B L H d"]], paths: Int32[Array, "N P"], counts: Int32[Array, "N"],
              lengths: Int32[Array, "N"], slots: Int32[Array, "N"] | None) -> tuple[Float[Array, "B L H d"], ...]:
    """See `api.keep_path`; no slots are one sequence in the only one."""
    (sequences, entries), rows = paths.shape, caches[0].shape[1]
    start = jnp.clip(lengths, 0, rows - entries)  # P rows of the cache that hold all that change
    target = start[:, None] + jnp.arange(entries)
    entry = target - lengths[:, None]
    source = lengths[:, None] + jnp.take_along_axis(paths, jnp.clip(entry, 0, entries - 1), axis=1)
    moves = (entry >= 0) & (entry < counts[:, None]) & (source < rows)
    source = jnp.where(moves, source, target)
    if sequences == 1:
        slot = 0 if slots is None else slots[0]
        return tuple(jax.lax.dynamic_update_slice(cache, cache[slot, source[0]][None], (slot, start[0], 0, 0))
                     for cache in caches)
    assert slots is not None  # of several sequences
    return tuple(cache.at[slots[:, None], target].set(cache[slots[:, None], source], unique_indices=True) for cache in caches)
