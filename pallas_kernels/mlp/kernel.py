"""The gated activation in one launch, which also finds the largest magnitudes of what it writes."""

import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels import launch
from pallas_kernels.finite import magnitudes, narrowed
from pallas_kernels.norm.row_scale import RowScale, inverse_rms

_CHUNK = 1024  # columns a program


def _body(gate_up_ref, *refs, chunk: int, splits: int, inverse_rms: Callable[[Array], Array] | None):
    squares_ref = None if inverse_rms is None else refs[0]
    out_ref, peaks_ref = refs[-2:]
    part, row = pl.program_id(0), pl.program_id(1)
    rows, inner = out_ref.shape
    lanes = part * chunk + jnp.arange(chunk)
    mask = None if inner % chunk == 0 else lanes < inner
    other = None if mask is None else 0.0

    def half(first: int) -> list[Array]:
        return [plgpu.load(gate_up_ref.at[split * rows + row, first + lanes], mask=mask, other=other)
                for split in range(splits)]

    # The compiler keeps loads in order and waits before an addition: all are asked for first.
    halves = half(0), half(inner)
    if squares_ref is not None:
        number = jnp.arange(launch.power_of_two(squares_ref.shape[1]))
        squares = plgpu.load(squares_ref.at[row, number], mask=number < squares_ref.shape[1], other=0.0)
    gate, up = (functools.reduce(operator.add, (part.astype(jnp.float32) for part in parts)) for parts in halves)
    if squares_ref is not None:
        scale = inverse_rms(jnp.sum(squares))
        gate, up = gate * scale, up * scale
    values = narrowed(jax.nn.silu(gate) * up, out_ref.dtype)
    plgpu.store(out_ref.at[row, lanes], values, mask=mask)
    plgpu.store(peaks_ref.at[row, part], jnp.max(magnitudes(values.astype(jnp.float32))))


@functools.partial(jax.jit, static_argnames=("out_dtype", "interpret"))
def silu_mul(gate_up: Float[Array, "S M 2I"], row_scale: RowScale | None, *, out_dtype: jnp.dtype, interpret: bool
             ) -> tuple[Float[Array, "M I"], Float[Array, "M C"]]:
    """See `api.silu_mul`."""
    splits, rows, columns = gate_up.shape
    inner = columns // 2
    chunk = min(_CHUNK, launch.power_of_two(inner))
    chunks = pl.cdiv(inner, chunk)
    squares, factor = (), None
    if row_scale is not None:
        squares = (row_scale.squares,)
        factor = functools.partial(inverse_rms, columns=row_scale.columns, eps=row_scale.eps)
    return tuple(launch.call(
        functools.partial(_body, chunk=chunk, splits=splits, inverse_rms=factor), (gate_up.reshape(-1, columns), *squares),
        grid=(chunks, rows), num_warps=max(1, chunk // 256), num_stages=1, interpret=interpret, name="silu_mul",
        out_shape=(jax.ShapeDtypeStruct((rows, inner), out_dtype), jax.ShapeDtypeStruct((rows, chunks), jnp.float32))))
