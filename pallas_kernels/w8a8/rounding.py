"""Rows rounded to 8 bits."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels import launch
from pallas_kernels.finite import fits, magnitudes
from pallas_kernels.w8a8.reference import GROUP, LARGEST

_CHUNK = 1024  # columns a program, where it need not look for the row's largest itself


def _ptx(asm: str, *args: Array) -> Float[Array, "n"]:
    [result] = plgpu.elementwise_inline_asm(asm, args=list(args), constraints="=f" + ",f" * len(args), pack=1,
                                            result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, jnp.float32)])
    return result


def _rounded(values: Float[Array, "n"], interpret: bool) -> Float[Array, "n"]:
    """Halves to the even neighbour, for which Pallas has no operation on a GPU."""
    return jnp.round(values) if interpret else _ptx("cvt.rni.f32.f32 $0, $1;", values)


def _quotient(dividend: Array | int, divisor: Array | int, interpret: bool) -> Float[Array, "1"]:
    """As IEEE 754 has it: a compiler's own division may err in the last bit, which can move a code."""
    dividend, divisor = (jnp.broadcast_to(jnp.asarray(value, jnp.float32), (1,)) for value in (dividend, divisor))
    return dividend / divisor if interpret else _ptx("div.rn.f32 $0, $1, $2;", dividend, divisor)


def _body(x_ref, *refs, chunk: int, summed: int | None, with_peaks: bool, interpret: bool):
    peaks_ref, refs = (refs[0], refs[1:]) if with_peaks else (None, refs)
    codes_ref, scales_ref, *sums_refs = refs
    part, row = pl.program_id(0), pl.program_id(1)
    lanes, only = part * chunk + jnp.arange(chunk), jnp.broadcast_to(row, (1,))
    mask = lanes < x_ref.shape[1]
    values = plgpu.load(x_ref.at[row, lanes], mask=mask, other=0).astype(jnp.float32)
    sizes = magnitudes(values)
    if peaks_ref is not None:
        number = jnp.arange(launch.power_of_two(peaks_ref.shape[1]))
        sizes = plgpu.load(peaks_ref.at[row, number], mask=number < peaks_ref.shape[1], other=0)
    largest = jnp.max(sizes)
    largest = jnp.where(fits(largest, jnp.float32), largest, jnp.nan)
    is_zero = largest == 0  # such a row stays one
    steps = jnp.where(is_zero, 0.0, _quotient(LARGEST, jnp.where(is_zero, 1.0, largest), interpret))
    codes = jnp.minimum(jnp.maximum(_rounded(values * steps, interpret), -LARGEST), LARGEST)
    plgpu.store(codes_ref.at[row, lanes], codes.astype(jnp.int8), mask=mask)
    plgpu.store(scales_ref.at[only], _quotient(largest, LARGEST, interpret))  # the same from each program of a row
    for sums_ref in sums_refs:
        sums = jnp.sum(codes.astype(jnp.int32).reshape(-1, summed), axis=1)
        group = part * len(sums) + jnp.arange(len(sums))
        plgpu.store(sums_ref.at[group, jnp.broadcast_to(row, group.shape)], sums, mask=group < sums_ref.shape[0])


@functools.partial(jax.jit, static_argnames=("sums", "interpret"))
def quantise_rows(x: Float[Array, "M K"], peaks: Float[Array, "M C"] | None, *, sums: int | None, interpret: bool
                  ) -> tuple[Array, ...]:
    """See `api.quantise_rows`; a program for each `_CHUNK` columns where the peaks are known, else for each row."""
    rows, columns = x.shape
    chunk = max(GROUP, launch.power_of_two(columns))
    if peaks is not None:
        chunk = min(chunk, _CHUNK)
    chunks = pl.cdiv(columns, chunk)
    shape = () if sums is None else (jax.ShapeDtypeStruct((chunks if sums == -1 else pl.cdiv(columns, sums), rows), jnp.int32),)
    return tuple(launch.call(
        functools.partial(_body, chunk=chunk, summed=chunk if sums == -1 else sums, with_peaks=peaks is not None,
                          interpret=interpret),
        (x,) if peaks is None else (x, peaks), grid=(chunks, rows),
        num_warps=min(32, max(1, chunk // (512 if peaks is None else 256))), num_stages=1, interpret=interpret,
        name="quantise_rows",
        out_shape=(jax.ShapeDtypeStruct(x.shape, jnp.int8), jax.ShapeDtypeStruct((rows,), jnp.float32), *shape)))
