"""Rows rounded to 8 bits, a program each."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels import launch
from pallas_kernels.w8a8.reference import GROUP, LARGEST


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


def _body(x_ref, codes_ref, scales_ref, *sums_refs, block: int, interpret: bool):
    row, lanes = pl.program_id(0), jnp.arange(block)
    mask, only = lanes < x_ref.shape[1], jnp.broadcast_to(pl.program_id(0), (1,))
    values = plgpu.load(x_ref.at[row, lanes], mask=mask, other=0).astype(jnp.float32)
    largest = jnp.max(jnp.abs(values))
    is_zero = largest == 0  # such a row stays one
    steps = jnp.where(is_zero, 0.0, _quotient(LARGEST, jnp.where(is_zero, 1.0, largest), interpret))
    codes = jnp.minimum(jnp.maximum(_rounded(values * steps, interpret), -LARGEST), LARGEST)
    plgpu.store(codes_ref.at[row, lanes], codes.astype(jnp.int8), mask=mask)
    plgpu.store(scales_ref.at[only], _quotient(largest, LARGEST, interpret))
    for sums_ref in sums_refs:
        if sums_ref.shape[0] == 1:
            plgpu.store(sums_ref.at[0, only], jnp.broadcast_to(jnp.sum(codes.astype(jnp.int32)), (1,)))
            continue
        group = jnp.arange(block // GROUP)
        plgpu.store(sums_ref.at[group, jnp.broadcast_to(row, group.shape)],
                    jnp.sum(codes.astype(jnp.int32).reshape(-1, GROUP), axis=1), mask=group < sums_ref.shape[0])


@functools.partial(jax.jit, static_argnames=("sums", "interpret"))
def quantise_rows(x: Float[Array, "M K"], *, sums: int | None, interpret: bool) -> tuple[Array, ...]:
    """See `api.quantise_rows`."""
    rows, columns = x.shape
    block = max(GROUP, launch.power_of_two(columns))
    shape = () if sums is None else (jax.ShapeDtypeStruct((1 if sums == -1 else pl.cdiv(columns, sums), rows), jnp.int32),)
    return tuple(launch.call(
        functools.partial(_body, block=block, interpret=interpret), (x,), grid=(rows,),
        num_warps=min(32, max(1, block // 512)), num_stages=1, interpret=interpret, name="quantise_rows",
        out_shape=(jax.ShapeDtypeStruct(x.shape, jnp.int8), jax.ShapeDtypeStruct((rows,), jnp.float32), *shape)))
