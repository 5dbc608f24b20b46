"""Where the rows of a pass stand and what each of them sees: the one place that knows positions and masks."""

from typing import Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.attention import api as attention_kernels
from specmq_jax.network.config import LlamaConfig
from specmq_jax.network.rope_config import RopeConfig

MOST_DECODE_ROWS = 64
"""Up to this many causal rows of a sequence take the decode kernel, which splits the cache among programs; more fill a GPU as
they are. No more nodes of a tree are attended to in bits that their own paths alone decide."""


class Rows(flax.struct.PyTreeNode):
    """What every layer needs to know of the rows it processes.

    Attributes:
      cos, sin: f32[M, head_dim / 2], rotary table at the rows' positions.
      others: such tables of the config's further `rope_tables`.
      start: i32 scalar; row i is written to cache row start + i. Of several sequences i32[N], each with M / N of the rows.
      committed: i32 scalar, or i32[N], cache rows that every row sees.
      slots: i32 scalar or i32[N], where each sequence stands in caches of slots; None for the cache of one sequence.
      mask_words: i32[M, W], bit i of a row says that it sees cache row committed + i; None for causal rows.
      tail: static, how many rows behind the committed ones the mask speaks of.
      depth, paths: i32[M] and i32[M, M / N], what `ordered_attention` reads instead of the mask; None for other rows.
      mask: bool[B or 1, S, T], which of T keys each of a sequence's S rows sees where the M = B * S rows are those of sequences
        side by side; None for rows behind one sequence's cache.
    """

    cos: Float[Array, "M D2"]
    sin: Float[Array, "M D2"]
    start: Int32[Array, "..."] | None = None
    committed: Int32[Array, "*N"] | None = None
    slots: Int32[Array, "*N"] | None = None
    mask_words: Int32[Array, "M W"] | None = None
    tail: int = flax.struct.field(pytree_node=False, default=0)
    depth: Int32[Array, "M"] | None = None
    paths: Int32[Array, "M T"] | None = None
    mask: Bool[Array, "#B S T"] | None = None
    others: tuple[tuple[Float[Array, "M D2"], Float[Array, "M D2"]], ...] = ()

    def turned_by(self, table: int) -> Self:
        """The same rows with one of the config's `rope_tables` as `cos` and `sin`."""
        if table == 0:
            return self
        cos, sin = self.others[table - 1]
        return self.replace(cos=cos, sin=sin)

    @classmethod
    def behind(cls, config: LlamaConfig, length: Int32[Array, "*N"], count: int, offsets: Int32[Array, "M"] | None,
               mask: Bool[Array, "M C"] | None, *, limit: int, slots: Int32[Array, "*N"] | None = None, skip: int = 0,
               reproducible: bool = False) -> Self:
        """Rows that stand behind the committed rows of a cache: T of each of N sequences, one sequence behind the other.

        Args:
          config: for the rotary table.
          length: committed rows of each sequence; the first free row is the next one.
          count: M = N * T.
          offsets: of each row's position from its sequence's length; None for consecutive rows.
          mask: which of the rows behind its sequence's committed ones each row sees; None for causal rows.
          limit: the tokens the cache is meant for, which some rotary embeddings depend on.
          slots: as in the attributes.
          skip: rows behind the committed ones that hold earlier levels of a tree and stay.
          reproducible: a sequence's rows are a whole tree, to be attended to in bits that each row's own path alone decides.
        """
        sequences = 1 if jnp.ndim(length) == 0 else len(length)
        each = count // sequences
        if offsets is None:
            offsets = jnp.tile(jnp.arange(each, dtype=jnp.int32), sequences)
        (cos, sin), *others = _rotations(config, (length if sequences == 1 else jnp.repeat(length, each)) + offsets, limit)
        if mask is None and each <= MOST_DECODE_ROWS:
            mask = jnp.tile(jnp.tri(each, dtype=bool), (sequences, 1))
        rows = cls(cos=cos, sin=sin, others=tuple(others), start=length + skip, committed=length, slots=slots)
        if mask is None:
            return rows
        if reproducible:
            trees = mask.reshape(sequences, each, each), offsets.reshape(sequences, each)
            paths = jax.vmap(attention_kernels.tree_paths)(*trees) if sequences > 1 else attention_kernels.tree_paths(
                mask, offsets)
            return rows.replace(depth=offsets, paths=paths.reshape(count, each))
        return rows.replace(mask_words=attention_kernels.pack_mask(mask), tail=mask.shape[1])

    @classmethod
    def among(cls, config: LlamaConfig, positions: Int32[Array, "B S"], mask: Bool[Array, "#B S T"], *, limit: int,
              start: Int32[Array, "B"] | None = None) -> Self:
        """Rows of B sequences side by side, at these positions; the rest as in the attributes and in `behind`."""
        (cos, sin), *others = _rotations(config, positions.reshape(-1), limit)
        return cls(cos=cos, sin=sin, others=tuple(others), start=start, mask=mask)


def _rotations(config: LlamaConfig, positions: Int32[Array, "M"], limit: int
               ) -> list[tuple[Float[Array, "M D2"], Float[Array, "M D2"]]]:
    """cos and sin of each of the config's `rope_tables`."""
    return [_rotation(rope, config.head_dim, positions, limit) for rope in config.rope_tables]


def _rotation(rope: RopeConfig | None, head_dim: int, positions: Int32[Array, "M"], limit: int
              ) -> tuple[Float[Array, "M D2"], Float[Array, "M D2"]]:
    if rope is None:
        shape = len(positions), head_dim // 2
        return jnp.ones(shape), jnp.zeros(shape)
    frequencies, scale = rope.frequencies(head_dim, limit)
    angles = positions.astype(jnp.float32)[:, None] * frequencies
    if rope.partial != 1:  # what passes has frequency 0, and no factor
        return jnp.cos(angles) * np.where(frequencies == 0, np.float32(1), np.float32(scale)), jnp.sin(angles) * scale
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale
