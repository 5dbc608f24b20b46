"""Rotary embedding and cache append in plain jnp."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import exact
from pallas_kernels.norm.row_scale import RowScale
from pallas_kernels.partials import add_up


def rotate(x: Float[Array, "M H d"], cos: Float[Array, "M d2"], sin: Float[Array, "M d2"]) -> Float[Array, "M H d"]:
    """Rotates the pairs (x[j], x[j + d/2]) by the rows' angles (GPT-NeoX's convention)."""
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    a_cos, b_sin, a_sin, b_cos = map(exact.rounded, (a * cos, b * sin, a * sin, b * cos))
    return jnp.concatenate([a_cos - b_sin, a_sin + b_cos], axis=-1)


def rope_append(qkv: Float[Array, "S M F"], cos: Float[Array, "M d2"], sin: Float[Array, "M d2"],
                k_cache: Float[Array, "L Hkv d"], v_cache: Float[Array, "L Hkv d"], length: Int32[Array, ""], *,
                heads: int, kv_heads: int, head_dim: int, row_scale: RowScale | None = None
                ) -> tuple[Float[Array, "M Hq d"], Float[Array, "L Hkv d"], Float[Array, "L Hkv d"]]:
    """See `api.rope_append`."""
    rows = qkv.shape[1]
    total = add_up(qkv)
    if row_scale is not None:
        total = total * row_scale.values[:, None]
    total = total.reshape(rows, heads + 2 * kv_heads, head_dim)
    q = rotate(total[:, :heads], cos, sin)
    k = rotate(total[:, heads:heads + kv_heads], cos, sin)
    v = total[:, heads + kv_heads:]
    start = (length, 0, 0)
    return (q.astype(k_cache.dtype), jax.lax.dynamic_update_slice(k_cache, k.astype(k_cache.dtype), start),
            jax.lax.dynamic_update_slice(v_cache, v.astype(v_cache.dtype), start))
