"""The W4A16 product on the tensor cores.

A program computes all rows of x against `block_n` columns over one share of K. It reads each packed word once, turns
it into eight half-precision planes by bit operations, and scales either the f32 partial product of a group or its
weights.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels import launch
from pallas_kernels.w4a16.dequantise import joined, multiply_add, planes_of
from pallas_kernels.w4a16.layout import BLOCK, PLANE_ROWS, PLANES

MAX_ROWS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How the product is cut.

    Attributes:
      block_n: columns a program computes, a power of two of at least 16.
      rows: packed rows (of 8 weights each) that one loop iteration reads, a multiple of 16.
      split_k: shares of K; fewer come out when K has fewer loop iterations.
      num_warps: they share the columns of a program, and its rows of x.
      num_stages: loop iterations whose loads are in flight.
      transposed: computes out^T = W^T x^T: the weights become the tensor core's left operand, which stays in registers
        on Hopper, and up to 8 rows of x its narrower right one, which halves registers and products.
      scale_planes: scales the weights, in f16, instead of each group's f32 partial product: fewer registers and one
        uninterrupted accumulation, worth its roundings (2^-12 of a weight) from about 32 rows on; f16 activations only.
      pipelined_scales: loads f32 scales together with their weights, `num_stages` ahead; else with the iteration before.
      least_rows: of x in a product, 8 or 16, where `transposed` allows 8. A warpgroup's product has no fewer than 16 here, so
        that 8 are multiplied by another instruction, which may round in another order.
      inline_asm: dequantises in PTX, two weights an instruction; never in interpret mode.
    """

    block_n: int = 64
    rows: int = 16
    split_k: int = 1
    num_warps: int = 1
    num_stages: int = 4
    transposed: bool = False
    scale_planes: bool = False
    pipelined_scales: bool = False
    least_rows: int = 8
    inline_asm: bool = True

    def __post_init__(self):
        launch.check_powers_of_two(self, block_n=16)
        if self.rows < PLANE_ROWS or self.rows % PLANE_ROWS:
            raise ValueError(f"rows is {self.rows}; expected a multiple of {PLANE_ROWS}")
        if self.split_k < 1:
            raise ValueError(f"split_k is {self.split_k}; expected at least 1")
        if self.least_rows not in (8, 16):
            raise ValueError(f"least_rows is {self.least_rows}; expected 8 or 16")


def block_m(rows: int, config: Config) -> int:
    """Rows of the accumulator: the tensor core wants 16 of its left operand and 8 of its right one."""
    return max(config.least_rows if config.transposed else 16, launch.power_of_two(rows))


def heuristic(rows: int, inner: int, columns: int) -> Config:
    """A config for [rows, inner] @ [inner, columns] that fills about 132 SMs once.

    One wave matters most: a second one that is half empty costs as much as a full one.
    """
    blocks = pl.cdiv(inner, BLOCK)
    block_n = 128
    warps, programs = (2, 512) if rows <= 8 else (4, 384) if rows <= 16 else (4, 264)
    while block_n > 32 and pl.cdiv(columns, block_n) * blocks < programs:
        block_n //= 2
    split_k = max(1, min(programs // pl.cdiv(columns, block_n), blocks // 2, 12))
    # A warpgroup's product wants 64 columns; below that, and beyond 8 rows, the weights do better on the right.
    return Config(block_n=block_n, split_k=split_k, num_warps=max(1, min(warps, block_n // 32)), num_stages=3,
                  transposed=rows <= 8 or block_n >= 64, pipelined_scales=rows <= 32)


def candidates(rows: int, inner: int, columns: int) -> list[Config]:
    """Configs worth timing: shapes of a program that have won somewhere, with every split that fills the GPU about once."""
    if rows <= 16:
        shapes = [{"block_n": 32 * wide, "num_warps": warps, "transposed": transposed, "scale_planes": scaled}
                  for wide, warps in ((2, 1), (4, 2), (4, 4), (8, 4))
                  for transposed, scaled in ((True, False), (True, True), (False, False))[:1 if rows <= 8 else 3]]
        warps_in_flight = 500, 3000
    else:
        shapes = [{"block_n": block_n, "num_warps": warps, "transposed": True, "scale_planes": scaled}
                  for block_n, warps in ((128, 4), (256, 4), (256, 8)) for scaled in (True, False)]
        warps_in_flight = 400, 2400
    configs = [Config(**shape, split_k=split_k, num_stages=stages, pipelined_scales=pipelined)
               for shape, split_k, stages, pipelined in
               itertools.product(shapes, (1, 2, 3, 4, 6, 8, 10, 12, 16), (3, 4), (True, False))]
    warps = {config: pl.cdiv(columns, config.block_n) * config.split_k * config.num_warps for config in configs
             if shares(inner, config) == config.split_k}
    least, most = min(warps_in_flight[0], max(warps.values())), max(warps_in_flight[1], min(warps.values()))
    return [config for config, count in warps.items() if least <= count <= most]


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
    scale_planes = config.scale_planes and x_ref.dtype == jnp.float16
    pipelined_scales = (config.pipelined_scales and inline_asm and group_size != -1
                        and scales_ref.dtype == jnp.float32)
    group_planes = PLANES if group_size == -1 else group_size // PLANE_ROWS

    def along(index: Array, axis: int) -> Array:
        return jnp.expand_dims(index, 1 - axis)

    def load(ref, row: Array, column: Array, mask: Array | None) -> Array:
        return plgpu.load(ref.at[row, column], mask=mask, other=None if mask is None else 0)

    share = pl.program_id(1)
    column = pl.program_id(0) * config.block_n + jnp.arange(config.block_n)
    column_mask = None if columns % config.block_n == 0 else column < columns
    row = jnp.arange(block_m(rows, config))
    row_mask = None if rows == block_m(rows, config) else row < rows
    # Words past the end (a short last share) and rows of x past K are both answered with zero rows of x.
    ragged_share = iterations * shares * config.rows != words
    ragged_inner = ragged_share or inner % BLOCK

    def both(mask: Array | None, axis: int, other: Array | None) -> Array | None:
        spread = None if mask is None else along(mask, axis)
        other = None if other is None else along(other, 1 - axis)
        return other if spread is None else spread if other is None else spread & other

    def product(x: Array, plane: Array) -> Array:
        return plgpu.dot(plane, x) if config.transposed else plgpu.dot(x, plane)

    def scales_of(block: Array) -> list[Array]:
        """A block's scales, a vector of columns for each of its groups; past the last group nobody reads them."""
        first, last = block * PLANES // group_planes, scales_ref.shape[0] - 1
        return [load(scales_ref, jnp.broadcast_to(jnp.minimum(first + group, last), column.shape), column, column_mask)
                for group in range(PLANES // group_planes)]

    def add_block(block: Array, total: Array, scales: list[Array]) -> Array:
        word = block * PLANE_ROWS + jnp.arange(PLANE_ROWS)
        packed = load(packed_ref, along(word, row_axis), along(column, column_axis),
                      both(column_mask, column_axis, word < words if ragged_share else None))
        beside = [jnp.broadcast_to(along(scale, column_axis), packed.shape) for scale in scales] if pipelined_scales else []
        planes = planes_of(packed, x_ref.dtype, beside, inline_asm=inline_asm)
        for group in range(PLANES // group_planes):
            own = planes[group * group_planes:(group + 1) * group_planes]
            if scales and scale_planes:
                own = [plane * along(scales[group].astype(plane.dtype), column_axis) for plane in own]
            k = block * BLOCK + group * group_planes * PLANE_ROWS + jnp.arange(group_planes * PLANE_ROWS)
            mask = both(row_mask, row_axis, k < inner if ragged_inner else None)
            part = product(load(x_ref, along(row, row_axis), along(k, column_axis), mask), joined(own, row_axis))
            if scales and not scale_planes:
                scale = along(scales[group].astype(jnp.float32), column_axis)
                total = multiply_add(part, scale, total, inline_asm=inline_asm)
            else:
                total += part
        return total

    def scales_at(iteration: Array) -> list[list[Array]]:
        first = (share * iterations + iteration) * blocks_each
        return [] if group_size == -1 else [scales_of(first + offset) for offset in range(blocks_each)]

    def step(iteration: Array, carry: tuple[Array, list[list[Array]]]) -> tuple[Array, list[list[Array]]]:
        total, scales = carry
        if pipelined_scales:
            scales, following = scales_at(iteration), []
        else:
            # The next iteration's scales are asked for before this one's weights are used: no pipeline does it for them.
            following = scales_at(iteration + 1)
        first = (share * iterations + iteration) * blocks_each
        for offset in range(blocks_each):
            total = add_block(first + offset, total, scales[offset] if scales else [])
        return total, following

    shape = (block_m(rows, config), config.block_n)
    zeros = jnp.zeros(shape[::-1] if config.transposed else shape, jnp.float32)
    total, _ = jax.lax.fori_loop(0, iterations, step, (zeros, [] if pipelined_scales else scales_at(jnp.int32(0))))
    if group_size == -1:
        total *= along(scales_of(jnp.int32(0))[0].astype(jnp.float32), column_axis)
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
