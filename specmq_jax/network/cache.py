"""Key-value cache of one sequence."""

from typing import Self

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from specmq_jax.network.config import LlamaConfig
from specmq_jax.words import count, scalar


@flax.struct.dataclass
class KVCache:
    """Keys (after rotary embedding) and values of every layer.

    Attributes:
      keys, values: per layer, float[max_len, kv_heads, head_dim].
      length: i32 scalar, rows that hold committed tokens. Rows past it are scratch: a rejected row is not erased, the
        next write covers it.
      limit: static, the tokens it is meant for, which some rotary embeddings depend on; it may have more rows.
    """

    keys: tuple[Float[Array, "L H D"], ...]
    values: tuple[Float[Array, "L H D"], ...]
    length: Int32[Array, ""]
    limit: int = flax.struct.field(pytree_node=False)

    def __repr__(self) -> str:
        rows = self.keys[0].shape if self.keys and hasattr(self.keys[0], "shape") else "?"
        return f"KVCache({count(len(self.keys), 'layer')} of {rows}, length={scalar(self.length)}, limit={self.limit})"

    @classmethod
    def create(cls, config: LlamaConfig, max_len: int, dtype: jnp.dtype, *, limit: int | None = None) -> Self:
        """An empty cache of `max_len` rows a layer, meant for `limit` tokens (default: as many)."""
        shape = (max_len, config.num_kv_heads, config.head_dim)
        layers = range(config.num_layers)
        return cls(keys=tuple(jnp.zeros(shape, dtype) for _ in layers),
                   values=tuple(jnp.zeros(shape, dtype) for _ in layers), length=jnp.int32(0),
                   limit=limit or max_len)

    @property
    def max_len(self) -> int:
        return self.keys[0].shape[0]

    def rewind(self, length: Int32[Array, ""] | int) -> Self:
        """The same rows with another committed length."""
        return self.replace(length=jnp.asarray(length, jnp.int32))

    def keep(self, path: Int32[Array, "P"], count: Int32[Array, ""], *, in_place: bool) -> Self:
        """Commits an accepted tree path: row length + path[j] moves to row length + j, and length grows by count.

        Entries of `path` from `count` on may be anything inside the tree. `in_place` says that path[j] is j (a chain):
        then nothing moves.
        """
        def gather(rows: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(rows, rows[self.length + path], self.length, 0)

        keys, values = self.keys, self.values
        if not in_place:
            keys, values = tuple(map(gather, keys)), tuple(map(gather, values))
        return self.replace(keys=keys, values=values, length=self.length + count)
