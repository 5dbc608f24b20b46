"""Rotary embedding of new rows and their append to the key-value cache."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import launch
from pallas_kernels.norm.row_scale import RowScale
from pallas_kernels.rope import kernel, reference
from pallas_kernels.sequences import as_slots


def rope_append(qkv: Float[Array, "S M F"], cos: Float[Array, "M d2"], sin: Float[Array, "M d2"],
                k_cache: Float[Array, "*B L Hkv d"], v_cache: Float[Array, "*B L Hkv d"], length: Int32[Array, "*N"], *,
                heads: int, kv_heads: int, head_dim: int, slots: Int32[Array, "*N"] | None = None,
                row_scale: RowScale | None = None, config: kernel.Config | None = None, implementation: str | None = None
                ) -> tuple[Float[Array, "M Hq d"], Float[Array, "*B L Hkv d"], Float[Array, "*B L Hkv d"]]:
    """Adds up the partial sums of q|k|v, rotates q and k, and writes k and v at cache rows [length, length + M).

    With `slots` the rows are those of N sequences, M / N of each, one sequence behind the other.

    Rotary embedding (arXiv:2104.09864) in GPT-NeoX's half-split layout: (a, b) = (x[j], x[j + d/2]) becomes
    (a cos - b sin, a sin + b cos). On a GPU the caches are updated in place when their buffers may be given up.

    Args:
      qkv: f32 or f16 [S, M, (heads + 2 kv_heads) * head_dim]; columns hold q, then k, then v, head by head.
      cos, sin: f32[M, head_dim / 2] at the rows' positions.
      k_cache, v_cache: [L, kv_heads, head_dim], both of one dtype; with slots [B, L, kv_heads, head_dim].
      length: i32 scalar, or i32[N] of N sequences; length + M / N must not exceed L (a traced value cannot be checked).
      slots: i32 scalar or i32[N], where in the caches each sequence stands; no two in one.
      row_scale: a factor that qkv's rows are still owed.
      config: launch parameters; default the tuned table of this device, then a heuristic.
      implementation: "reference", "kernel", "interpret", or None for the backend's own.

    What is not finite, or leaves the range of the caches' dtype, is NaN in q and k. A value's own place is 0, since a row that
    must not see it would multiply it by 0, and its key's is NaN instead, which attention hides from such a row.

    Returns:
      q [M, heads, head_dim] in the caches' dtype, and the two caches.

    Raises:
      ValueError: shapes or dtypes that do not fit each other, or more rows than the cache has.
    """
    _check(qkv, cos, sin, heads, kv_heads, head_dim)
    rows = qkv.shape[1]
    sequences = 1 if jnp.ndim(length) == 0 else len(length)
    if k_cache.ndim not in (3, 4) or k_cache.shape[-2:] != (kv_heads, head_dim) or k_cache.shape[-3] < rows // sequences:
        raise ValueError(f"k_cache has shape {list(k_cache.shape)}; expected [at least {rows // sequences}, {kv_heads}, "
                         f"{head_dim}]")
    if v_cache.shape != k_cache.shape or v_cache.dtype != k_cache.dtype:
        raise ValueError(f"v_cache is {v_cache.dtype}{list(v_cache.shape)}; expected k_cache's "
                         f"{k_cache.dtype}{list(k_cache.shape)}")
    *caches, lengths, slots = as_slots(k_cache, v_cache, length, slots, rows)
    chosen = launch.choose(implementation)
    if chosen == "reference":
        q, *caches = reference.rope_append(qkv, cos, sin, *caches, lengths, slots, heads=heads, kv_heads=kv_heads,
                                           head_dim=head_dim, row_scale=row_scale)
    else:
        if config is None:
            fields = launch.tuned("rope", tuning_key(rows, heads, kv_heads, head_dim))
            config = kernel.Config(**fields) if fields else kernel.heuristic(rows)
        q, *caches = kernel.rope_append(qkv, cos, sin, *caches, lengths, slots, row_scale, heads=heads, kv_heads=kv_heads,
                                        head_dim=head_dim, config=config, interpret=chosen == "interpret")
    k_cache, v_cache = (cache.reshape(k_cache.shape) for cache in caches)
    return q, k_cache, v_cache


def rotated(qkv: Float[Array, "S M F"], cos: Float[Array, "M d2"], sin: Float[Array, "M d2"], *, heads: int, kv_heads: int,
            head_dim: int, dtype: jnp.dtype, row_scale: RowScale | None = None
            ) -> tuple[Float[Array, "M Hq d"], Float[Array, "M Hkv d"], Float[Array, "M Hkv d"]]:
    """q, k and v in `dtype` as `rope_append` makes them, without a cache to write to; it can be differentiated.

    Raises ValueError for sizes that do not fit each other.
    """
    _check(qkv, cos, sin, heads, kv_heads, head_dim)
    return reference.rotated(qkv, cos, sin, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype,
                             row_scale=row_scale)


def _check(qkv: Array, cos: Array, sin: Array, heads: int, kv_heads: int, head_dim: int) -> None:
    if head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; expected an even number")
    if qkv.ndim != 3 or qkv.shape[0] < 1 or qkv.shape[2] != (heads + 2 * kv_heads) * head_dim:
        raise ValueError(f"qkv has shape {list(qkv.shape)}; expected [S, M, {(heads + 2 * kv_heads) * head_dim}] for "
                         f"{heads} and {kv_heads} heads of {head_dim}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != (qkv.shape[1], head_dim // 2) or table.dtype != jnp.float32:
            raise ValueError(f"{name} is {table.dtype}{list(table.shape)}; expected float32[{qkv.shape[1]}, {head_dim // 2}]")


def tuning_key(rows: int, heads: int, kv_heads: int, head_dim: int) -> str:
    """What a tuned table calls rows of these heads; rows up to the same power of two share a config."""
    return f"{heads + 2 * kv_heads}x{head_dim}/m{launch.power_of_two(rows)}"
