"""Rotary embedding and cache append in one launch; the caches are written in place."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels import launch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """rows: rows a program handles, of one head, a power of two."""

    rows: int = 1
    num_warps: int = 1

    def __post_init__(self):
        if not launch.is_power_of_two(self.rows):
            raise ValueError(f"rows is {self.rows}; expected a power of two")


def heuristic(rows: int) -> Config:
    # Up to a tree's worth of rows every (row, head) gets its own warp; a prompt would start tens of thousands of them.
    return Config() if rows <= 128 else Config(rows=16, num_warps=4)


def _body(qkv_ref, cos_ref, sin_ref, length_ref, k_in, v_in, q_ref, k_ref, v_ref, *, config: Config, splits: int,
          heads: int, kv_heads: int, head_dim: int):
    del k_in, v_in  # the same memory as k_ref and v_ref
    rows = q_ref.shape[0]
    head = pl.program_id(1)
    half = head_dim // 2
    row = pl.program_id(0) * config.rows + jnp.arange(config.rows)[:, None]
    lane = jnp.arange(launch.power_of_two(half))[None, :]
    mask = (row < rows) & (lane < half)

    def half_head(offset: int) -> Array:
        column = head * head_dim + offset + lane
        total = plgpu.load(qkv_ref.at[row, column], mask=mask, other=0).astype(jnp.float32)
        for split in range(1, splits):
            total += plgpu.load(qkv_ref.at[split * rows + row, column], mask=mask, other=0).astype(jnp.float32)
        return total

    a, b = half_head(0), half_head(half)
    cos = plgpu.load(cos_ref.at[row, lane], mask=mask, other=0)
    sin = plgpu.load(sin_ref.at[row, lane], mask=mask, other=0)
    low, high = a * cos - b * sin, a * sin + b * cos

    def write(ref, target_row: Array, target_head: Array, low: Array, high: Array, mask: Array) -> None:
        plgpu.store(ref.at[target_row, target_head, lane], low.astype(ref.dtype), mask=mask)
        plgpu.store(ref.at[target_row, target_head, lane + half], high.astype(ref.dtype), mask=mask)

    target = length_ref[0] + row
    in_cache = mask & (target < k_ref.shape[0])  # a row past the end must not touch foreign memory

    @pl.when(head < heads)
    def _():
        write(q_ref, row, head, low, high, mask)

    @pl.when((head >= heads) & (head < heads + kv_heads))
    def _():
        write(k_ref, target, head - heads, low, high, in_cache)

    @pl.when(head >= heads + kv_heads)
    def _():
        write(v_ref, target, head - heads - kv_heads, a, b, in_cache)


@functools.partial(jax.jit, static_argnames=("heads", "kv_heads", "head_dim", "config", "interpret"))
def rope_append(qkv: Float[Array, "S M F"], cos: Float[Array, "M d2"], sin: Float[Array, "M d2"],
                k_cache: Float[Array, "L Hkv d"], v_cache: Float[Array, "L Hkv d"], length: Int32[Array, ""], *,
                heads: int, kv_heads: int, head_dim: int, config: Config, interpret: bool
                ) -> tuple[Float[Array, "M Hq d"], Float[Array, "L Hkv d"], Float[Array, "L Hkv d"]]:
    """See `api.rope_append`."""
    splits, rows, features = qkv.shape
    body = functools.partial(_body, config=config, splits=splits, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    return tuple(launch.call(
        body, (qkv.reshape(splits * rows, features), cos, sin, length.reshape(1), k_cache, v_cache),
        aliases={4: 1, 5: 2},
        grid=(pl.cdiv(rows, config.rows), heads + 2 * kv_heads), num_warps=config.num_warps, num_stages=1,
        interpret=interpret, name="rope_append",
        out_shape=(jax.ShapeDtypeStruct((rows, heads, head_dim), k_cache.dtype),
                   jax.ShapeDtypeStruct(k_cache.shape, k_cache.dtype),
                   jax.ShapeDtypeStruct(v_cache.shape, v_cache.dtype))))
