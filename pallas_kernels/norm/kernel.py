"""Residual addition and RMSNorm in one launch: a program per row, or one per chunk of a row that leaves the scale open."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels import launch
from pallas_kernels.finite import magnitudes, narrowed
from pallas_kernels.norm.row_scale import inverse_rms

_BATCH = 8  # partial sums in flight, which is what registers have room for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """num_warps: warps that share a row."""

    num_warps: int = 8


def heuristic(columns: int) -> Config:
    # A step has few rows, so the launch is as long as one row: as many threads as its loads can fill.
    return Config(num_warps=4 if columns <= 1024 else 8 if columns <= 2048 else 16)


def _body(*refs, eps: float, block: int, splits: int):
    residual_ref, *inputs, weight_ref, out_ref, normed_ref = refs
    row = pl.program_id(0)
    columns = residual_ref.shape[1]
    lanes = jnp.arange(block)  # not pl.ds: JAX 0.12 refuses a slice past the end, masked or not
    mask = None if block == columns else lanes < columns
    other = None if mask is None else 0.0
    weight = plgpu.load(weight_ref.at[lanes], mask=mask, other=other)
    total = plgpu.load(residual_ref.at[row, lanes], mask=mask, other=other)
    # The compiler keeps loads in order and waits before an addition: all of a batch are asked for first.
    for first in range(0, splits, _BATCH):
        parts = [plgpu.load(inputs[0].at[split * pl.num_programs(0) + row, lanes], mask=mask, other=other)
                 for split in range(first, min(first + _BATCH, splits))]
        for part in parts:
            total += part.astype(jnp.float32)
    normed = total * inverse_rms(jnp.sum(total * total), columns, eps) * weight
    plgpu.store(out_ref.at[row, lanes], total, mask=mask)
    plgpu.store(normed_ref.at[row, lanes], narrowed(normed, normed_ref.dtype), mask=mask)


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


def _scale_body(*refs, chunk: int, splits: int, with_peaks: bool):
    outputs = 4 if with_peaks else 3
    (residual_ref, *inputs, weight_ref), (out_ref, scaled_ref, squares_ref, *peaks_refs) = refs[:-outputs], refs[-outputs:]
    row, part = pl.program_id(0), pl.program_id(1)
    columns = residual_ref.shape[1]
    lanes = part * chunk + jnp.arange(chunk)
    mask = None if columns % chunk == 0 else lanes < columns
    other = None if mask is None else 0.0
    weight = plgpu.load(weight_ref.at[lanes], mask=mask, other=other)
    total = plgpu.load(residual_ref.at[row, lanes], mask=mask, other=other)
    parts = [plgpu.load(inputs[0].at[split * pl.num_programs(0) + row, lanes], mask=mask, other=other)
             for split in range(splits)]
    for each in parts:
        total += each.astype(jnp.float32)
    scaled = narrowed(total * weight, scaled_ref.dtype)
    plgpu.store(out_ref.at[row, lanes], total, mask=mask)
    plgpu.store(scaled_ref.at[row, lanes], scaled, mask=mask)
    plgpu.store(squares_ref.at[row, part], jnp.sum(total * total))
    for peaks_ref in peaks_refs:
        plgpu.store(peaks_ref.at[row, part], jnp.max(magnitudes(scaled.astype(jnp.float32))))


@functools.partial(jax.jit, static_argnames=("out_dtype", "chunk", "with_peaks", "interpret"))
def add_scale(residual: Float[Array, "M D"], partials: Float[Array, "S M D"] | None, weight: Float[Array, "D"], *,
              out_dtype: jnp.dtype, chunk: int, with_peaks: bool, interpret: bool) -> tuple[Array, ...]:
    """The summed residual f32[M, D], that times the weight, out_dtype[M, D], and of each chunk of `chunk` columns the sum of
    the first one's squares, f32[M, C], and with `with_peaks` the second one's largest magnitude, f32[M, C]."""
    rows, columns = residual.shape
    splits = 0 if partials is None else partials.shape[0]
    summands = () if partials is None else (partials.reshape(-1, columns),)
    chunks = pl.cdiv(columns, chunk)
    of_chunks = jax.ShapeDtypeStruct((rows, chunks), jnp.float32)
    return tuple(launch.call(
        functools.partial(_scale_body, chunk=chunk, splits=splits, with_peaks=with_peaks), (residual, *summands, weight),
        grid=(rows, chunks), num_warps=max(1, chunk // 128), num_stages=1, interpret=interpret, name="add_scale",
        out_shape=(jax.ShapeDtypeStruct(residual.shape, jnp.float32), jax.ShapeDtypeStruct(residual.shape, out_dtype),
                   of_chunks) + (of_chunks,) * with_peaks))
