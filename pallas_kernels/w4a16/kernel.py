"""The W4A16 product on the tensor cores.

A program computes all rows of x against `block_n` columns over one share of K. It reads each packed word once, turns
it into eight half-precision planes by bit operations, and scales the f32 partial product of a group, not its weights.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels import launch
from pallas_kernels.w4a16.dequantise import planes_of
from pallas_kernels.w4a16.layout import BLOCK, PLANE_ROWS, PLANES

MAX_ROWS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How the product is cut.

    Attributes:
      block_n: columns a program computes, a power of two of at least 16.
      rows: packed rows (of 8 weights each) that one loop iteration reads, a multiple of 16.
      split_k: shares of K; fewer come out when K has fewer loop iterations.
      num_warps: 1 avoids every barrier around Triton's layout conversions and wants thousands of programs.
      num_stages: loop iterations whose loads are in flight.
      transposed: computes out^T = W^T x^T, which puts the weights in the left operand.
      inline_asm: dequantises in PTX, two weights an instruction; never in interpret mode.
    """

    block_n: int = 64
    rows: int = 16
    split_k: int = 1
    num_warps: int = 1
    num_stages: int = 4
    transposed: bool = False
    inline_asm: bool = True

    def __post_init__(self):
        if self.block_n < 16 or not launch.is_power_of_two(self.block_n):
            raise ValueError(f"block_n is {self.block_n}; expected a power of two of at least 16")
        if self.rows < PLANE_ROWS or self.rows % PLANE_ROWS:
            raise ValueError(f"rows is {self.rows}; expected a multiple of {PLANE_ROWS}")
        if self.split_k < 1:
            raise ValueError(f"split_k is {self.split_k}; expected at least 1")


def block_m(rows: int) -> int:
    """Rows of the accumulator: the tensor core wants 16 at least."""
    return max(16, launch.power_of_two(rows))


def heuristic(rows: int, inner: int, columns: int) -> Config:
    """A config for [rows, inner] @ [inner, columns] that aims at a few waves of programs on about 132 SMs."""
    blocks = pl.cdiv(inner, BLOCK)
    narrow = columns * blocks < 64 * 64 * 8
    block_n = 32 if narrow else 64
    programs, warps = (2048, 1) if rows <= 16 else (1024, 2) if rows <= 32 else (528, 4)
    # Four blocks at least: below that a program spends more on its prologue and its partial sum than on weights.
    split_k = min(pl.cdiv(programs, pl.cdiv(columns, block_n)), max(1, blocks // 4), 16)
    transposed = rows > 32 and not narrow
    return Config(block_n=block_n, split_k=split_k, num_warps=warps, transposed=transposed)


def _cut(inner: int, config: Config) -> tuple[int, int]:
    """Number of K shares, none of them empty, and loop iterations in each."""
    iterations = pl.cdiv(inner, BLOCK * config.rows // PLANE_ROWS)
    each = pl.cdiv(iterations, config.split_k)
    return pl.cdiv(iterations, each), each


def shares(inner: int, config: Config) -> int:
    """The first axis of the partial sums."""
    return _cut(inner, config)[0]


def _body(x_ref, packed_ref, scales_ref, out_ref, *, config: Config, group_size: int, iterations: int, shares: int,
          interpret: bool):
    rows, inner = x_ref.shape
    words, columns = packed_ref.shape
    blocks_each = config.rows // PLANE_ROWS
    column_axis, row_axis = (0, 1) if config.transposed else (1, 0)
    inline_asm = config.inline_asm and not interpret

    def along(index: Array, axis: int) -> Array:
        return jnp.expand_dims(index, 1 - axis)

    def load(ref, row: Array, column: Array, mask: Array | None) -> Array:
        return plgpu.load(ref.at[row, column], mask=mask, other=None if mask is None else 0)

    share = pl.program_id(1)
    column = pl.program_id(0) * config.block_n + jnp.arange(config.block_n)
    column_mask = None if columns % config.block_n == 0 else column < columns
    row = jnp.arange(block_m(rows))
    row_mask = None if rows == block_m(rows) else row < rows
    # Words past the end (a short last share) and rows of x past K are both answered with zero rows of x.
    ragged_share = iterations * shares * config.rows != words
    ragged_inner = ragged_share or inner % BLOCK

    def both(mask: Array | None, axis: int, other: Array | None) -> Array | None:
        spread = None if mask is None else along(mask, axis)
        other = None if other is None else along(other, 1 - axis)
        return other if spread is None else spread if other is None else spread & other

    def product(x: Array, plane: Array) -> Array:
        return plgpu.dot(plane, x) if config.transposed else plgpu.dot(x, plane)

    def add_block(block: Array, total: Array) -> Array:
        word = block * PLANE_ROWS + jnp.arange(PLANE_ROWS)
        word_mask = word < words if ragged_share else None
        packed = load(packed_ref, along(word, row_axis), along(column, column_axis),
                      both(column_mask, column_axis, word_mask))
        planes = planes_of(packed, x_ref.dtype, inline_asm=inline_asm)
        group_planes = PLANES if group_size == -1 else group_size // PLANE_ROWS
        for first in range(0, PLANES, group_planes):
            part = jnp.zeros(total.shape, jnp.float32)
            for plane in range(first, first + group_planes):
                k = block * BLOCK + plane * PLANE_ROWS + jnp.arange(PLANE_ROWS)
                mask = both(row_mask, row_axis, k < inner if ragged_inner else None)
                part += product(load(x_ref, along(row, row_axis), along(k, column_axis), mask), planes[plane])
            total += part if group_size == -1 else part * scale_of((block * PLANES + first) // group_planes)
        return total

    def scale_of(group: Array | int) -> Array:
        mask = column_mask
        if group_size != -1 and (ragged_share or scales_ref.shape[0] * group_size != words * PLANES):
            inside = jnp.broadcast_to(group < scales_ref.shape[0], column.shape)
            mask = inside if mask is None else mask & inside
        group = jnp.broadcast_to(group, column.shape)
        return along(load(scales_ref, group, column, mask).astype(jnp.float32), column_axis)

    def step(iteration: Array, total: Array) -> Array:
        first = (share * iterations + iteration) * blocks_each
        for offset in range(blocks_each):
            total = add_block(first + offset, total)
        return total

    shape = (config.block_n, block_m(rows)) if config.transposed else (block_m(rows), config.block_n)
    total = jax.lax.fori_loop(0, iterations, step, jnp.zeros(shape, jnp.float32))
    if group_size == -1:
        total *= scale_of(jnp.int32(0))
    plgpu.store(out_ref.at[share * rows + along(row, row_axis), along(column, column_axis)],
                total.astype(out_ref.dtype), mask=both(column_mask, column_axis, row_mask))


@functools.partial(jax.jit, static_argnames=("group_size", "out_dtype", "config", "interpret"))
def matmul_partials(x: Float[Array, "M K"], packed: Int32[Array, "K8 N"], scales: Float[Array, "G N"], *,
                    group_size: int, out_dtype: jnp.dtype, config: Config, interpret: bool) -> Float[Array, "S M N"]:
    """Partial sums over the shares of K; M at most `MAX_ROWS`, x f16 or bf16."""
    (rows, inner), columns = x.shape, packed.shape[1]
    share_count, iterations = _cut(inner, config)
    body = functools.partial(_body, config=config, group_size=group_size, iterations=iterations, shares=share_count,
                             interpret=interpret)
    [out] = launch.call(
        body, (x, packed, scales), grid=(pl.cdiv(columns, config.block_n), share_count), num_warps=config.num_warps,
        num_stages=config.num_stages, interpret=interpret, name="w4a16",
        out_shape=(jax.ShapeDtypeStruct((share_count * rows, columns), out_dtype),))
    return out.reshape(share_count, rows, columns)
