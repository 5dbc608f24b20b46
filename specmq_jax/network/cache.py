"""Key-value cache of one sequence, or of many in slots.

What is written for one sequence becomes what is done for many by `jax.vmap`: the rows of all slots are one array, which is not
mapped, and a sequence is a slot of it and a length, which are.
"""

from typing import Any, Protocol, Self

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.attention import api as attention_kernels
from pallas_kernels.keep import api as keep_kernels
from pallas_kernels.norm import RowScale
from pallas_kernels.rope import api as rope_kernels
from specmq_jax.network.config import LlamaConfig, View
from specmq_jax.network.rows import Rows
from specmq_jax.words import count as counted
from specmq_jax.words import scalar


class LayerCache(Protocol):
    """What attention keeps of one layer's rows."""

    def append(self, qkv: Float[Array, "S M F"], rows: Rows, config: LlamaConfig, row_scale: RowScale | None, *,
               implementation: str | None = None) -> tuple[Float[Array, "M Hq D"], Self]:
        """The rotated queries of M rows from partial sums of their q|k|v, and the cache with their keys and values.

        `row_scale` is a factor that the sums' rows are still owed.
        """

    def attend(self, query: Float[Array, "M Hq D"], rows: Rows, view: View, *, implementation: str | None = None
               ) -> Float[Array, "M Hq D"]:
        """What the rows, which have been appended, mix of the values that they see, as `view` says."""


class Cache(Protocol):
    """What the network asks of a cache; its layers are replaced with `replace`, as in any `flax.struct.PyTreeNode`."""

    layers: tuple[LayerCache, ...]

    def rows(self, config: LlamaConfig, count: int, offsets: Int32[Array, "M"] | None = None,
             mask: Bool[Array, "M C"] | None = None, *, skip: int = 0, reproducible: bool = False) -> Rows:
        """The `count` rows of a pass; the rest as in `Rows.behind`."""

    def replace(self, **changes: Any) -> Self: ...


class StoredLayer(flax.struct.PyTreeNode):
    """One layer's rows of one sequence, or of every slot.

    Attributes:
      keys, values: float[max_len, kv_heads, head_dim], or [slots, max_len, kv_heads, head_dim]; keys are behind the rotary
        embedding.
    """

    keys: Float[Array, "*B L H D"]
    values: Float[Array, "*B L H D"]

    def append(self, qkv: Float[Array, "S M F"], rows: Rows, config: LlamaConfig, row_scale: RowScale | None, *,
               implementation: str | None = None) -> tuple[Float[Array, "M Hq D"], Self]:
        assert rows.start is not None  # of rows behind stored ones
        query, keys, values = rope_kernels.rope_append(
            qkv, rows.cos, rows.sin, self.keys, self.values, rows.start, slots=rows.slots, heads=config.num_heads,
            kv_heads=config.num_kv_heads, head_dim=config.head_dim, row_scale=row_scale, implementation=implementation)
        return query, self.replace(keys=keys, values=values)

    def attend(self, query: Float[Array, "M Hq D"], rows: Rows, view: View, *, implementation: str | None = None
               ) -> Float[Array, "M Hq D"]:
        assert rows.committed is not None
        stored = query, self.keys, self.values, rows.committed
        how: dict[str, Any] = {"scale": view.scale, "window": view.window, "cap": view.cap, "slots": rows.slots,
                               "implementation": implementation}
        if rows.paths is not None and rows.depth is not None:
            return attention_kernels.ordered_attention(*stored, rows.depth, rows.paths, **how)
        if rows.mask_words is None:
            return attention_kernels.causal_attention(*stored, **how)
        return attention_kernels.tree_attention(*stored, rows.mask_words, tail=rows.tail, **how)


class KVCache(flax.struct.PyTreeNode):
    """The cache of every layer, as one sequence sees it, or several.

    Attributes:
      layers: their caches.
      length: i32 scalar, rows that hold committed tokens; i32[N] of N sequences. Rows past it are scratch: a rejected row is
        not erased, the next write covers it.
      slot: i32 scalar or i32[N], where a sequence stands in layers of slots; None where they hold one sequence alone.
      limit: static, the tokens it is meant for, which some rotary embeddings depend on; it may have more rows.
    """

    layers: tuple[StoredLayer, ...]
    length: Int32[Array, "*N"]
    limit: int = flax.struct.field(pytree_node=False)
    slot: Int32[Array, "*N"] | None = None

    def __repr__(self) -> str:
        rows = self.layers[0].keys.shape if self.layers and hasattr(self.layers[0].keys, "shape") else "?"
        return (f"KVCache({counted(len(self.layers), 'layer')} of {rows}, length={scalar(self.length)}, "
                f"limit={self.limit})")

    @classmethod
    def create(cls, config: LlamaConfig, max_len: int, dtype: jnp.dtype, *, limit: int | None = None,
               slots: int | None = None) -> Self:
        """An empty cache of `max_len` rows a layer, meant for `limit` tokens (default: as many); with `slots` of so many
        sequences."""
        shape = (max_len, config.num_kv_heads, config.head_dim) if slots is None else (
            slots, max_len, config.num_kv_heads, config.head_dim)
        layers = tuple(StoredLayer(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers))
        if slots is None:
            return cls(layers=layers, length=jnp.int32(0), limit=limit or max_len)
        return cls(layers=layers, length=jnp.zeros(slots, jnp.int32), limit=limit or max_len,
                   slot=jnp.arange(slots, dtype=jnp.int32))

    @property
    def max_len(self) -> int:
        return self.layers[0].keys.shape[-3]

    def rows(self, config: LlamaConfig, count: int, offsets: Int32[Array, "M"] | None = None,
             mask: Bool[Array, "M C"] | None = None, *, skip: int = 0, reproducible: bool = False) -> Rows:
        return Rows.behind(config, self.length, count, offsets, mask, limit=self.limit, slots=self.slot, skip=skip,
                           reproducible=reproducible)

    def rewind(self, length: Int32[Array, ""] | int) -> Self:
        """The same rows with another committed length."""
        return self.replace(length=jnp.asarray(length, jnp.int32))

    def advance(self, count: Int32[Array, ""] | int) -> Self:
        """Commits the next `count` rows, which have been written."""
        return self.rewind(self.length + count)

    def keep(self, path: Int32[Array, "P"], count: Int32[Array, ""], *, in_place: bool) -> Self:
        """Commits an accepted tree path: row length + path[j] moves to row length + j, and length grows by count.

        Entries of `path` from `count` on may be anything, and move nothing. `in_place` says that path[j] is j (a chain):
        then nothing moves at all.
        """
        layers = self.layers if in_place else _kept(self.layers, path, count, self.length, self.slot)
        return self.replace(layers=layers, length=self.length + count)


@jax.custom_batching.custom_vmap
def _kept(layers: tuple[StoredLayer, ...], path: Int32[Array, "*N P"], count: Int32[Array, "*N"],
          length: Int32[Array, "*N"], slot: Int32[Array, "*N"] | None) -> tuple[StoredLayer, ...]:
    rows, structure = jax.tree.flatten(layers)
    return jax.tree.unflatten(structure, keep_kernels.keep_path(rows, path, count, length, slots=slot))


@_kept.def_vmap
def _(sequences: int, batched: Any, layers: tuple[StoredLayer, ...], *places: Array) -> tuple[Any, Any]:
    every = (place if is_batched else jnp.broadcast_to(place, (sequences, *place.shape))
             for place, is_batched in zip(places, batched[1:], strict=True))
    kept = _kept(layers, *every)
    return kept, jax.tree.map(lambda _: False, kept)
