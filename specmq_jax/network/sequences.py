"""Sequences side by side whose rows see each other and no stored cache: what training and calibration run the network on."""

from collections.abc import Sequence
from typing import Self

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.norm import RowScale
from pallas_kernels.rope import api as rope_kernels
from specmq_jax.errors import UserError
from specmq_jax.network.config import LlamaConfig, View
from specmq_jax.network.rows import Rows


class SequenceLayer(flax.struct.PyTreeNode):
    """One layer's keys and values of B sequences.

    Attributes:
      keys, values: of each pass so far. Those of the first one, [B, kv_heads, S, head_dim], are seen as the rows' mask says.
        Those of a later one, [B, S, kv_heads, head_dim], are seen by the row of their own index alone.
      dtype: static, of both.
    """

    keys: tuple[Float[Array, "B _ _ d"], ...] = ()
    values: tuple[Float[Array, "B _ _ d"], ...] = ()
    dtype: jnp.dtype = flax.struct.field(pytree_node=False, default=jnp.dtype(jnp.float32))

    def append(self, qkv: Float[Array, "1 M F"], rows: Rows, config: LlamaConfig, row_scale: RowScale | None, *,
               implementation: str | None = None) -> tuple[Float[Array, "M Hq d"], Self]:
        del implementation  # there is one
        assert rows.mask is not None  # of rows side by side
        query, *rest = rope_kernels.rotated(qkv, rows.cos, rows.sin, heads=config.num_heads, kv_heads=config.num_kv_heads,
                                            head_dim=config.head_dim, dtype=self.dtype, row_scale=row_scale)
        key, value = (part.reshape(-1, rows.mask.shape[1], *part.shape[1:]) for part in rest)
        if not self.keys:
            key, value = heads_first(key), heads_first(value)
        return query, self.replace(keys=(*self.keys, key), values=(*self.values, value))

    def attend(self, query: Float[Array, "M Hq d"], rows: Rows, view: View, *, implementation: str | None = None
               ) -> Float[Array, "M Hq d"]:
        del implementation
        refuse_view(view)
        assert rows.mask is not None
        own = list(zip(self.keys[1:], self.values[1:], strict=True))
        split = query.reshape(-1, rows.mask.shape[1], *query.shape[1:])
        return attention(split, self.keys[0], self.values[0], rows.mask, own).reshape(query.shape)


class Sequences(flax.struct.PyTreeNode):
    """B sequences of S tokens, whose rows a pass takes one sequence behind the other.

    A further pass takes a draft from every row. It stands `offsets` behind the row, and sees what the row sees, the row's
    drafts of the passes before and itself.

    Attributes:
      positions: i32[B, S].
      mask: bool[B or 1, S, S], which rows of its sequence each row sees.
      layers: what the passes leave.
      limit: static, the longest sequence meant, which some rotary embeddings depend on.
    """

    positions: Int32[Array, "B S"]
    mask: Bool[Array, "#B S S"]
    layers: tuple[SequenceLayer, ...]
    limit: int = flax.struct.field(pytree_node=False)

    @classmethod
    def create(cls, config: LlamaConfig, positions: Int32[Array, "B S"], mask: Bool[Array, "#B S S"], dtype: jnp.dtype, *,
               limit: int) -> Self:
        """Sequences before their first pass; keys and values are held in `dtype`."""
        return cls(positions=positions, mask=mask, layers=(SequenceLayer(dtype=dtype),) * config.num_layers, limit=limit)

    @classmethod
    def causal(cls, config: LlamaConfig, count: int, length: int, dtype: jnp.dtype, *, limit: int | None = None) -> Self:
        """`count` whole sequences of `length` tokens."""
        positions = jnp.broadcast_to(jnp.arange(length), (count, length))
        return cls.create(config, positions, jnp.tri(length, dtype=bool)[None], dtype, limit=limit or length)

    def rows(self, config: LlamaConfig, count: int, offsets: Int32[Array, ""] | int | None = None, mask: None = None, *,
             skip: int = 0, reproducible: bool = False) -> Rows:
        del count, mask, skip, reproducible  # the sequences have a mask of their own
        return Rows.among(config, self.positions if offsets is None else self.positions + offsets, self.mask, limit=self.limit)


def refuse_view(view: View) -> None:
    """Raises a `UserError` for a view that is not of all keys as they are: sequences side by side have no other."""
    if view != View():
        raise UserError("sequences side by side, as training and calibration take them, are not supported for models with "
                        "sliding windows, score caps or a scale of the scores of their own")


def heads_first(x: Float[Array, "B S H d"]) -> Float[Array, "B H S d"]:
    return x.transpose(0, 2, 1, 3)


def attention(q: Float[Array, "B S Hq d"], k: Float[Array, "B Hkv T d"], v: Float[Array, "B Hkv T d"],
              mask: Bool[Array, "#B S T"], own: Sequence[tuple[Array, Array]] = ()) -> Float[Array, "B S Hq d"]:
    """Grouped-query attention with an f32 softmax, which can be differentiated.

    Args:
      q: queries.
      k, v: what all rows may see.
      mask: which of them each row sees.
      own: keys and values [B, S, Hkv, d] that each row sees of its own index alone.
    """
    batch, rows, heads, width = q.shape
    grouped = q.reshape(batch, rows, k.shape[1], -1, width)
    scale = width**-0.5
    scores = jnp.einsum("bskgd,bktd->bkgst", grouped, k, preferred_element_type=jnp.float32) * scale
    scores = [jnp.where(mask[:, None, None], scores, -1e30)]
    scores += [jnp.einsum("bskgd,bskd->bkgs", grouped, key, preferred_element_type=jnp.float32)[..., None] * scale
               for key, _ in own]
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(v.dtype)
    shared = k.shape[2]
    mixed = jnp.einsum("bkgst,bktd->bskgd", weights[..., :shared], v, preferred_element_type=jnp.float32)
    for i, (_, value) in enumerate(own):
        mixed += jnp.einsum("bkgs,bskd->bskgd", weights[..., shared + i], value, preferred_element_type=jnp.float32)
    return mixed.reshape(q.shape).astype(q.dtype)
