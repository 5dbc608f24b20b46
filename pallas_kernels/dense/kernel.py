"""The dense product, with one order of summation for every number of rows where that is asked for.

A program streams `block_n` columns of one share of K and multiplies up to 64 rows by them, in slabs. One order needs slabs
of 16 even where four could be one: from 64 rows on Triton uses Hopper's warpgroup instruction, which adds up in another
order than the one of 16 rows that a single row gets.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels import launch

SLAB = 16
MOST_ROWS = 64
"""Of a program: more rows are another program's, which reads the weights again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How the product is cut. Of these `split_k` and `slab` alone change the result's bits.

    Attributes:
      block_n: columns a program computes, a power of two of at least 16.
      block_k: rows of the weights in a loop iteration, a power of two of at least 16.
      split_k: shares of K; fewer come out when K has fewer blocks.
      num_warps, num_stages: Triton's.
      slab: rows of one product, a power of two of at least 16; fewer where there are no more.
    """

    block_n: int = 64
    block_k: int = 64
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 4
    slab: int = SLAB

    def __post_init__(self):
        launch.check_powers_of_two(self, block_n=16, block_k=16, slab=SLAB)
        if self.split_k < 1:
            raise ValueError(f"split_k is {self.split_k}; expected at least 1")


def heuristic(inner: int, columns: int, dtype: jnp.dtype) -> Config:
    """A config that starts about two programs for each of about 132 SMs, whatever the number of rows."""
    # Each program reads all of x, so that 64 columns of a large matrix would read as much of x as of weights.
    block_n, block_k = 128 if inner * columns >= 2**23 else 64, 64
    if dtype == jnp.float32:  # twice the bytes a stage, and products outside the tensor cores
        block_n, block_k = 64, 32
    # Four blocks at least: below that a program spends more on its prologue and its partial sum than on weights.
    split_k = min(264 // pl.cdiv(columns, block_n), pl.cdiv(inner, block_k) // 4, 16)
    return Config(block_n=block_n, block_k=block_k, split_k=max(1, split_k))


def candidates(rows: int, inner: int, columns: int) -> list[Config]:
    """Configs of a half-precision product worth timing, with every split that fills a GPU about once."""
    shapes = [{"block_n": block_n, "block_k": block_k, "num_warps": warps}
              for block_n, warps in ((32, 2), (64, 2), (64, 4), (128, 4), (128, 8)) for block_k in (64, 128)]
    configs = [Config(**shape, split_k=split_k, num_stages=stages, slab=max(SLAB, launch.power_of_two(rows)))
               for shape, split_k, stages in itertools.product(shapes, (1, 2, 3, 4, 6, 8, 12), (3, 4, 5))]
    warps = {config: pl.cdiv(columns, config.block_n) * config.split_k * config.num_warps for config in configs
             if _cut(inner, config)[0] == config.split_k}
    least, most = min(500, max(warps.values())), max(3200, min(warps.values()))
    return [config for config, count in warps.items() if least <= count <= most]


def _cut(inner: int, config: Config) -> tuple[int, int]:
    """Number of K shares, none of them empty, and blocks in each but the last, which may have fewer."""
    blocks = pl.cdiv(inner, config.block_k)
    each = pl.cdiv(blocks, config.split_k)
    return pl.cdiv(blocks, each), each


def _body(x_ref, weights_ref, out_ref, *, config: Config, transposed: bool, each: int):
    rows, inner = x_ref.shape
    columns = weights_ref.shape[0 if transposed else 1]
    blocks = pl.cdiv(inner, config.block_k)
    share = pl.program_id(2)
    column = pl.program_id(1) * config.block_n + jnp.arange(config.block_n)
    column_mask = None if columns % config.block_n == 0 else column < columns
    precision = jax.lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None
    slab = min(config.slab, max(SLAB, launch.power_of_two(rows)))
    slabs = [pl.program_id(0) * MOST_ROWS + first + jnp.arange(slab) for first in range(0, min(rows, MOST_ROWS), slab)]

    def both(down: Array | None, across: Array | None) -> Array | None:
        if down is None or across is None:
            return down[:, None] if down is not None else across[None, :] if across is not None else None
        return down[:, None] & across[None, :]

    def row_mask(row: Array) -> Array | None:
        return None if rows % MOST_ROWS == 0 else row < rows

    def load(ref, down: Array, across: Array, mask: Array | None) -> Array:
        return plgpu.load(ref.at[down[:, None], across[None, :]], mask=mask, other=None if mask is None else 0)

    def step(block: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        k = block * config.block_k + jnp.arange(config.block_k)
        k_mask = None if inner % config.block_k == 0 else k < inner
        weights = (load(weights_ref, column, k, both(column_mask, k_mask)) if transposed else
                   load(weights_ref, k, column, both(k_mask, column_mask)))
        return tuple(total + plgpu.dot(load(x_ref, row, k, both(row_mask(row), k_mask)), weights, trans_b=transposed,
                                       precision=precision) for row, total in zip(slabs, totals, strict=True))

    zeros = jnp.zeros((slab, config.block_n), jnp.float32)
    totals = jax.lax.fori_loop(share * each, jnp.minimum((share + 1) * each, blocks), step, (zeros,) * len(slabs))
    for row, total in zip(slabs, totals, strict=True):
        plgpu.store(out_ref.at[(share * rows + row)[:, None], column[None, :]], total,
                    mask=both(row_mask(row), column_mask))


@functools.partial(jax.jit, static_argnames=("transposed", "config", "interpret"))
def matmul_partials(x: Float[Array, "M K"], weights: Float[Array, "A B"], *, transposed: bool, config: Config,
                    interpret: bool) -> Float[Array, "S M N"]:
    """See `api.matmul_partials`."""
    (rows, inner), columns = x.shape, weights.shape[0 if transposed else 1]
    shares, each = _cut(inner, config)
    # Row blocks lie side by side in the grid: the second one finds the weights in the L2 cache.
    [out] = launch.call(
        functools.partial(_body, config=config, transposed=transposed, each=each), (x, weights),
        grid=(pl.cdiv(rows, MOST_ROWS), pl.cdiv(columns, config.block_n), shares), num_warps=config.num_warps,
        num_stages=config.num_stages, interpret=interpret, name="dense",
        out_shape=(jax.ShapeDtypeStruct((shares * rows, columns), jnp.float32),))
    return out.reshape(shares, rows, columns)
