"""Rotary embedding and cache append in one launch; the caches are written in place."""

import dataclasses
import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels import launch
from pallas_kernels.finite import fits, narrowed
from pallas_kernels.norm.row_scale import RowScale, inverse_rms
from pallas_kernels.sequences import places


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


def _body(qkv_ref, cos_ref, sin_ref, length_ref, _k_in, _v_in, *refs, config: Config, splits: int, heads: int,
          kv_heads: int, head_dim: int, inverse_rms: Callable[[Array], Array] | None, is_slotted: bool):
    slots_ref = refs[0] if is_slotted else None
    squares_ref = refs[-4] if inverse_rms is not None else None
    q_ref, k_ref, v_ref = refs[-3:]  # the caches' memory is that of `_k_in` and `_v_in`
    rows = q_ref.shape[0]
    head = pl.program_id(1)
    half = head_dim // 2
    row = pl.program_id(0) * config.rows + jnp.arange(config.rows)[:, None]
    lane = jnp.arange(launch.power_of_two(half))[None, :]
    mask = (row < rows) & (lane < half)

    is_key = head >= heads  # a program of a key has the value of the same head, too

    def half_head(offset: int, mask: Array) -> list[Array]:
        column = head * head_dim + offset + lane
        return [plgpu.load(qkv_ref.at[split * rows + row, column], mask=mask, other=0) for split in range(splits)]

    # The compiler keeps loads in order and waits before an addition: all are asked for first.
    of, within = places(row, rows, length_ref.shape[0], mask=row < rows)
    length, slot = of(length_ref), 0 if slots_ref is None else of(slots_ref)
    cos = plgpu.load(cos_ref.at[row, lane], mask=mask, other=0)
    sin = plgpu.load(sin_ref.at[row, lane], mask=mask, other=0)
    values = kv_heads * head_dim
    parts = (half_head(0, mask), half_head(half, mask), half_head(values, mask & is_key),
             half_head(values + half, mask & is_key))
    if squares_ref is not None:
        chunk = jnp.arange(launch.power_of_two(squares_ref.shape[1]))[None, :]
        inside = (chunk < squares_ref.shape[1]) & (row < rows)
        squares = plgpu.load(squares_ref.at[row, chunk], mask=inside, other=0.0)
    sums = [functools.reduce(operator.add, (part.astype(jnp.float32) for part in half_parts)) for half_parts in parts]
    if squares_ref is not None:
        scale = inverse_rms(jnp.sum(squares, axis=1))[:, None]
        sums = [part * scale for part in sums]
    a, b, low_value, high_value = sums
    low, high = (narrowed(part, q_ref.dtype) for part in (a * cos - b * sin, a * sin + b * cos))

    def write(ref, *target: Array | int, low: Array, high: Array, mask: Array) -> None:
        plgpu.store(ref.at[*target, lane], low, mask=mask)
        plgpu.store(ref.at[*target, lane + half], high, mask=mask)

    target = length + within
    in_cache = mask & (target < k_ref.shape[1])  # a row past the end must not touch foreign memory

    @pl.when(~is_key)
    def _():
        write(q_ref, row, head, low=low, high=high, mask=mask)

    @pl.when(is_key)
    def _():
        sound = fits(low_value, v_ref.dtype) & fits(high_value, v_ref.dtype)
        keys = (jnp.where(sound, part, jnp.nan) for part in (low, high))
        values = (jnp.where(fits(part, v_ref.dtype), part, 0).astype(v_ref.dtype) for part in (low_value, high_value))
        for ref, (low_part, high_part) in ((k_ref, keys), (v_ref, values)):
            write(ref, slot, target, head - heads, low=low_part, high=high_part, mask=in_cache)


@functools.partial(jax.jit, static_argnames=("heads", "kv_heads", "head_dim", "config", "interpret"))
def rope_append(qkv: Float[Array, "S M F"], cos: Float[Array, "M d2"], sin: Float[Array, "M d2"],
                k_cache: Float[Array, "B L Hkv d"], v_cache: Float[Array, "B L Hkv d"], lengths: Int32[Array, "N"],
                slots: Int32[Array, "N"] | None, row_scale: RowScale | None, *, heads: int, kv_heads: int, head_dim: int,
                config: Config, interpret: bool
                ) -> tuple[Float[Array, "M Hq d"], Float[Array, "B L Hkv d"], Float[Array, "B L Hkv d"]]:
    """See `api.rope_append`; no slots are one sequence in the only one."""
    splits, rows, features = qkv.shape
    squares, factor = (), None
    if row_scale is not None:
        squares = (row_scale.squares,)
        factor = functools.partial(inverse_rms, columns=row_scale.columns, eps=row_scale.eps)
    body = functools.partial(_body, config=config, splits=splits, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
                             inverse_rms=factor, is_slotted=slots is not None)
    named = () if slots is None else (slots,)
    return tuple(launch.call(
        body, (qkv.reshape(splits * rows, features), cos, sin, lengths, k_cache, v_cache, *named, *squares),
        aliases={4: 1, 5: 2},
        grid=(pl.cdiv(rows, config.rows), heads + kv_heads), num_warps=config.num_warps, num_stages=1,
        interpret=interpret, name="rope_append",
        out_shape=(jax.ShapeDtypeStruct((rows, heads, head_dim), k_cache.dtype),
                   jax.ShapeDtypeStruct(k_cache.shape, k_cache.dtype),
                   jax.ShapeDtypeStruct(v_cache.shape, v_cache.dtype))))
