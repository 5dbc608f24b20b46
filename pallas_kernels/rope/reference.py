"""Rotary embedding and cache append in plain jnp."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels import exact
from pallas_kernels.finite import fits, narrowed
from pallas_kernels.norm.row_scale import RowScale
from pallas_kernels.partials import add_up


def rotate(x: Float[Array, "M H d"], cos: Float[Array, "M d2"], sin: Float[Array, "M d2"]) -> Float[Array, "M H d"]:
    """Rotates the pairs (x[j], x[j + d/2]) by the rows' angles (GPT-NeoX's convention)."""
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    a_cos, b_sin, a_sin, b_cos = map(exact.rounded, (a * cos, b * sin, a * sin, b * cos))
    return jnp.concatenate([a_cos - b_sin, a_sin + b_cos], axis=-1)


def rotated(qkv: Float[Array, "S M F"], cos: Float[Array, "M d2"], sin: Float[Array, "M d2"], *, heads: int, kv_heads: int,
            head_dim: int, dtype: jnp.dtype, row_scale: RowScale | None = None
            ) -> tuple[Float[Array, "M Hq d"], Float[Array, "M Hkv d"], Float[Array, "M Hkv d"]]:
    """See `api.rotated`."""
    total = add_up(qkv)
    if row_scale is not None:
        total = total * row_scale.values[:, None]
    total = total.reshape(-1, heads + 2 * kv_heads, head_dim)
    q, k, v = jnp.split(total, (heads, heads + kv_heads), axis=1)
    q, k = (jnp.where(_pairwise(fits(x, jnp.float32)), narrowed(rotate(x, cos, sin), dtype), jnp.nan) for x in (q, k))
    sound = fits(v, dtype)
    return q, jnp.where(_pairwise(sound), k, jnp.nan), jnp.where(sound, v, 0).astype(dtype)


def rope_append(qkv: Float[Array, "S M F"], cos: Float[Array, "M d2"], sin: Float[Array, "M d2"],
                k_cache: Float[Array, "B L Hkv d"], v_cache: Float[Array, "B L Hkv d"], lengths: Int32[Array, "N"],
                slots: Int32[Array, "N"] | None, *, heads: int, kv_heads: int, head_dim: int,
                row_scale: RowScale | None = None
                ) -> tuple[Float[Array, "M Hq d"], Float[Array, "B L Hkv d"], Float[Array, "B L Hkv d"]]:
    """See `api.rope_append`; no slots are one sequence in the only one."""
    q, *parts = rotated(qkv, cos, sin, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=k_cache.dtype,
                        row_scale=row_scale)
    sequences = len(lengths)
    if sequences == 1:
        start = (0 if slots is None else slots[0], lengths[0], 0, 0)
        return q, *(jax.lax.dynamic_update_slice(cache, part[None], start)
                    for cache, part in zip((k_cache, v_cache), parts, strict=True))
    assert slots is not None  # of several sequences
    target = lengths[:, None] + jnp.arange(len(cos) // sequences)
    return q, *(cache.at[slots[:, None], target].set(part.reshape(*target.shape, kv_heads, head_dim), mode="drop")
                for cache, part in zip((k_cache, v_cache), parts, strict=True))


def _pairwise(sound: Bool[Array, "M H d"]) -> Bool[Array, "M H d"]:
    """Whether both of the pair that an element belongs to are."""
    both = jnp.logical_and(*jnp.split(sound, 2, axis=-1))
    return jnp.concatenate([both, both], axis=-1)
