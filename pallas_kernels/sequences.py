"""Rows of several sequences in one launch: N sequences of equally many rows stand one behind the other, each in a slot of the
caches, which hold B of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32, Shaped


def as_slots(k_cache: Float[Array, "*B L Hkv d"], v_cache: Float[Array, "*B L Hkv d"], lengths: Int32[Array, "*N"],
             slots: Int32[Array, "*N"] | None, rows: int
             ) -> tuple[Float[Array, "B L Hkv d"], Float[Array, "B L Hkv d"], Int32[Array, "N"], Int32[Array, "N"] | None]:
    """The caches of all slots, and where each of N sequences stands.

    Caches [L, Hkv, d] are a single slot, whose index no kernel has to read; scalars are those of one sequence.

    Raises:
      ValueError: caches of slots without the sequences' slots, or the other way round, places of other shapes, or rows that
        the sequences can't share.
    """
    lengths = jnp.atleast_1d(jnp.asarray(lengths, jnp.int32))
    if (slots is None) != (k_cache.ndim == 3):
        raise ValueError(f"k_cache has shape {list(k_cache.shape)}; expected [B, L, heads, head_dim] with slots, and "
                         "[L, heads, head_dim] without")
    if slots is None:
        k_cache, v_cache, expected = k_cache[None], v_cache[None], (1,)
    else:
        slots = jnp.atleast_1d(jnp.asarray(slots, jnp.int32))
        expected = slots.shape
    if lengths.ndim != 1 or lengths.shape != expected:
        raise ValueError(f"length has shape {list(lengths.shape)}; expected {list(expected)}, one a sequence")
    if rows % lengths.shape[0]:
        raise ValueError(f"{rows} rows are not those of {lengths.shape[0]} sequences of equally many")
    return k_cache, v_cache, lengths, slots


def places(row: Int32[Array, "*shape"], rows: int, sequences: int, *, mask: Any
           ) -> tuple[Callable[[Any], Shaped[Array, "*shape"]], Int32[Array, "*shape"]]:
    """Inside a kernel: what reads the entry of each row's sequence from a reference to [N], and each row's index in its own.

    Of a single sequence the entry is a scalar.
    """
    if sequences == 1:
        return lambda ref: ref[0], row
    each = rows // sequences
    return lambda ref: plgpu.load(ref.at[row // each], mask=mask, other=0), row % each


def by_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of arrays of rows, each row by itself, whose `vmap` is the function of all rows at once."""
    one = custom_vmap(function)

    @one.def_vmap
    def _(sequences: int, batched: Any, *rows: Shaped[Array, "..."]) -> tuple[Any, Any]:
        every = [part if is_batched else jnp.broadcast_to(part, (sequences, *part.shape))
                 for part, is_batched in zip(rows, batched, strict=True)]
        out = by_rows(function)(*(part.reshape(-1, *part.shape[2:]) for part in every))
        out = jax.tree.map(lambda part: part.reshape(sequences, -1, *part.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return one
