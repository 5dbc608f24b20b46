"""The W4A16 product on the tensor cores.

A program reads each packed word once, turns it into half-precision planes by bit operations, and scales either the f32
partial product of a group or its weights.
"""

import dataclasses
import functools
import itertools
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32, Shaped

from pallas_kernels import transposed
from pallas_kernels.w4a16 import layout
from pallas_kernels.w4a16.dequantise import joined, multiply_add, planes_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(transposed.Config):
    """How the product is cut, over blocks of 128 rows of K.

    Attributes:
      scale_planes: scales the weights, in f16, instead of each group's f32 partial product: fewer registers and one
        uninterrupted accumulation, worth its roundings (2^-12 of a weight) at most from about 32 rows on; in f16 and groups of
        128 only.
      pipelined_scales: loads the scales of groups together with their weights, `num_stages` ahead; else with the block before.
      least_rows: of x in a product, 8 or 16. A warpgroup's product has no fewer than 16 here, so that 8 are multiplied by
        another instruction, which may round in another order.
      inline_asm: dequantises in PTX, two weights an instruction; never in interpret mode.
    """

    num_warps: int = 1
    scale_planes: bool = False
    pipelined_scales: bool = True
    least_rows: int = 8
    inline_asm: bool = True

    block_k: ClassVar[int] = layout.BLOCK

    def __post_init__(self):
        super().__post_init__()
        if self.least_rows not in (8, 16):
            raise ValueError(f"least_rows is {self.least_rows}; expected 8 or 16")


def heuristic(rows: int, inner: int, columns: int) -> Config:
    """A config for [rows, inner] @ [inner, columns] that fills about 132 SMs once.

    One wave matters most: a second one that is half empty costs as much as a full one.
    """
    blocks = layout.packed_blocks(inner)
    if rows > transposed.BLOCK_ROWS:
        return dataclasses.replace(transposed.three_an_sm(Config(scale_planes=True), rows, inner, columns),
                                   num_warps=4)
    block_n, warps, programs = (128, 2, 512) if rows <= 16 else (128, 4, 264)
    while block_n > 32 and pl.cdiv(columns, block_n) * blocks < programs:
        block_n //= 2
    split_k = max(1, min(programs // pl.cdiv(columns, block_n), blocks // 2, 12))
    return Config(block_n=block_n, split_k=split_k, num_warps=max(1, min(warps, block_n // 32)), num_stages=3)


def in_one_order(config: Config, rows: int) -> Config:
    """As `transposed.in_one_order`."""
    config = dataclasses.replace(transposed.in_one_order(config, rows), least_rows=16)
    # a sum and a product beside it
    return config if config.scale_planes or config.block_m <= transposed.BLOCK_ROWS else dataclasses.replace(
        config, block_n=64, num_warps=4)


def candidates(rows: int, inner: int, columns: int) -> list[Config]:
    """Configs worth timing: shapes of a program that have won somewhere, with every split that fills the GPU about once."""
    if rows <= 16:
        shapes = [{"block_n": block_n, "num_warps": warps}
                  for block_n, warps in ((64, 1), (64, 4), (128, 2), (128, 4), (128, 8), (256, 4))]
    elif rows <= transposed.BLOCK_ROWS:
        shapes = [{"block_n": block_n, "num_warps": warps, "scale_planes": scaled}
                  for block_n, warps in ((64, 4), (128, 4), (128, 8), (256, 8), (256, 16)) for scaled in (False, True)]
    else:
        shapes = [{**shape, "scale_planes": True} for shape in transposed.program_shapes(rows)]
    return transposed.filling(rows, inner, columns, [
        Config(**shape, split_k=split_k, num_stages=stages)
        for shape, split_k, stages in itertools.product(shapes, (1, 2, 3, 4, 5, 6, 8, 10, 12, 16), (3, 4))])


def shares(inner: int, config: Config) -> int:
    """The first axis of the partial sums."""
    return transposed.share_count(inner, layout.BLOCK, config.split_k)


def _body(x_ref, packed_ref, scales_ref, out_ref, *, config: Config, group_size: int, shares: int, interpret: bool):
    rows, inner = x_ref.shape
    columns = packed_ref.shape[1]
    parts = transposed.cut(rows, inner, columns, config, block_k=layout.BLOCK, shares=shares, least_rows=config.least_rows)
    mine = parts[0]
    inline_asm = config.inline_asm and not interpret
    scaled = group_size != -1
    pipelined_scales = config.pipelined_scales and scaled
    group_planes = group_size // layout.PLANE_ROWS if scaled else layout.PLANES
    groups = layout.PLANES // group_planes  # of a block
    group_rows = layout.BLOCK // groups
    # Triton leaves a product whose sum only another product reads in flight beyond the loop's end, where ptxas before 13.5
    # overwrites the weights in its registers: several products a block are read by their scaling (LOG).
    scale_planes = config.scale_planes and x_ref.dtype == jnp.float16 and groups == 1

    def words_of(block: Array) -> list[Array]:
        """The words that hold a block's scales, vectors of columns; past the last group nobody reads them."""
        numbers = [jnp.minimum((block * groups + group) // 2, scales_ref.shape[0] - 1) for group in range(0, groups, 2)]
        if pipelined_scales:
            return [mine.per_output_ahead(scales_ref, number, num_warps=config.num_warps) for number in numbers]
        return [mine.per_output(scales_ref, number) for number in numbers]

    def scales_of(words: list[Array], block: Array, group: int) -> Array:
        return layout.half_of(words[group // 2], 16 * (block % 2 if groups == 1 else group % 2))

    def step(block: Array, carry: tuple[list[Array], list[Array]]) -> tuple[list[Array], list[Array]]:
        totals, words = carry
        if pipelined_scales:
            words = words_of(block)
        # The next block's scales are asked for before this one's weights are used, where no pipeline does it for them.
        following = words_of(block + 1) if words and not pipelined_scales else []
        planes = planes_of(mine.tile(packed_ref, block, jnp.arange(layout.WORDS)), x_ref.dtype,
                           words if pipelined_scales else [], inline_asm=inline_asm)
        for group in range(groups):
            own = planes[group * group_planes:(group + 1) * group_planes]
            scales = scales_of(words, block, group) if scaled else None
            if scaled and scale_planes:
                own = [plane * scales.astype(plane.dtype)[:, None] for plane in own]
            weights, k = joined(own), block * layout.BLOCK + group * group_rows + jnp.arange(group_rows)
            if scaled and not scale_planes:
                factors = scales.astype(jnp.float32)[:, None]
                totals = [multiply_add(plgpu.dot(weights, part.activations(x_ref, k)), factors, total, inline_asm=inline_asm)
                          for part, total in zip(parts, totals, strict=True)]
            else:
                totals = transposed.accumulated(totals, weights, x_ref, k, parts)
        return totals, following

    start = words_of(mine.first) if scaled and not pipelined_scales else []
    totals, _ = jax.lax.fori_loop(mine.first, mine.last, step, (transposed.zeros(parts, jnp.float32), start))
    for part, total in zip(parts, totals, strict=True):
        part.store(out_ref, total if scaled else total * mine.per_output(scales_ref, jnp.int32(0))[:, None], rows)


@functools.partial(jax.jit, static_argnames=("group_size", "out_dtype", "config", "interpret"))
def matmul_partials(x: Float[Array, "M K"], packed: Int32[Array, "B N 16"], scales: Shaped[Array, "H N"], *,
                    group_size: int, out_dtype: jnp.dtype, config: Config, interpret: bool) -> Float[Array, "S M N"]:
    """Partial sums over the shares of K; M at most `transposed.MAX_ROWS`, x f16 or bf16."""
    share_count = shares(x.shape[1], config)
    body = functools.partial(_body, config=config, group_size=group_size, shares=share_count, interpret=interpret)
    return transposed.launch_product(body, (x, packed, scales), outputs=packed.shape[1], shares=share_count, config=config,
                                     interpret=interpret, name="w4a16", out_dtype=out_dtype)
