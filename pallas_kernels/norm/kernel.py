"""Residual addition and RMSNorm in one launch, a program per row."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels import launch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """num_warps: warps that share a row."""

    num_warps: int = 8


def heuristic(columns: int) -> Config:
    # A step has few rows, so the launch is as long as one row: 4 to 16 loads in flight a thread.
    return Config(num_warps=4 if columns <= 2048 else 8 if columns <= 4096 else 16)


def _body(*refs, eps: float, block: int, splits: int):
    residual_ref, *inputs, weight_ref, out_ref, normed_ref = refs
    row = pl.program_id(0)
    columns = residual_ref.shape[1]
    lanes = jnp.arange(block)  # not pl.ds: JAX 0.12 refuses a slice past the end, masked or not
    mask = None if block == columns else lanes < columns
    other = None if mask is None else 0.0
    total = plgpu.load(residual_ref.at[row, lanes], mask=mask, other=other)
    for split in range(splits):
        part = inputs[0].at[split * pl.num_programs(0) + row, lanes]
        total += plgpu.load(part, mask=mask, other=other).astype(jnp.float32)
    mean_square = jnp.sum(total * total) / columns
    weight = plgpu.load(weight_ref.at[lanes], mask=mask, other=other)
    normed = total * jax.lax.rsqrt(mean_square + eps) * weight
    plgpu.store(out_ref.at[row, lanes], total, mask=mask)
    plgpu.store(normed_ref.at[row, lanes], normed.astype(normed_ref.dtype), mask=mask)


@functools.partial(jax.jit, static_argnames=("eps", "out_dtype", "config", "interpret"))
def add_rms_norm(residual: Float[Array, "M D"], partials: Float[Array, "S M D"] | None, weight: Float[Array, "D"], *,
                 eps: float, out_dtype: jnp.dtype, config: Config, interpret: bool
                 ) -> tuple[Float[Array, "M D"], Float[Array, "M D"]]:
    """See `api.add_rms_norm`."""
    rows, columns = residual.shape
    splits = 0 if partials is None else partials.shape[0]
    body = functools.partial(_body, eps=eps, block=launch.power_of_two(columns), splits=splits)
    summands = () if partials is None else (partials.reshape(-1, columns),)
    return tuple(launch.call(
        body, (residual, *summands, weight), grid=(rows,), num_warps=config.num_warps, num_stages=1,
        interpret=interpret, name="add_rms_norm",
        out_shape=(jax.ShapeDtypeStruct(residual.shape, jnp.float32),
                   jax.ShapeDtypeStruct(residual.shape, out_dtype))))
