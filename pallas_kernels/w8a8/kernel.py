"""Products of 8-bit integers on the tensor cores, transposed: out^T = W q^T.

Weights lie with K innermost, which is how the tensor core wants 8-bit operands; as its left operand they need no
transposition, and as few as 8 rows of activations make a product.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int8, Int32

from pallas_kernels import launch

MAX_ROWS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How the product is cut.

    Attributes:
      block_n: outputs a program computes, a power of two of at least 16.
      block_k: columns of K in a loop iteration, a power of two of at least 32.
      split_k: shares of K; fewer come out when K has fewer blocks. A share is exact; their scaled sums are f32.
      num_warps, num_stages: Triton's.
    """

    block_n: int = 64
    block_k: int = 128
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 4

    def __post_init__(self):
        launch.check_powers_of_two(self, block_n=16, block_k=32)
        if self.split_k < 1:
            raise ValueError(f"split_k is {self.split_k}; expected at least 1")


def heuristic(inner: int, outputs: int) -> Config:
    """A config that starts about three programs for each of about 132 SMs."""
    config = Config()
    split_k = min(396 // pl.cdiv(outputs, config.block_n), pl.cdiv(inner, config.block_k) // 4, 12)
    return dataclasses.replace(config, split_k=max(1, split_k))


def candidates(rows: int, inner: int, outputs: int) -> list[Config]:
    """Configs worth timing, with every split that fills a GPU about once."""
    shapes = [{"block_n": block_n, "num_warps": warps, "block_k": block_k} for block_n, warps in program_shapes(rows)
              for block_k in (128, 256)]
    return filling(inner, outputs, [Config(**shape, split_k=split_k, num_stages=stages) for shape, split_k, stages in
                                    itertools.product(shapes, SPLITS, (3, 4, 5))])


SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)


def program_shapes(rows: int) -> list[tuple[int, int]]:
    """Outputs and warps of a program."""
    if rows <= 16:
        return [(32, 1), (64, 1), (64, 2), (64, 4), (128, 2), (128, 4)]
    return [(64, 4), (128, 4), (128, 8), (256, 8)]


def filling(inner: int, outputs: int, configs: Sequence[Any]) -> list[Any]:
    """Those with a split that K allows and as many warps as a GPU of about 132 SMs has use for."""
    warps = {config: pl.cdiv(outputs, config.block_n) * config.split_k * config.num_warps for config in configs
             if share_count(inner, config.block_k, config.split_k) == config.split_k}
    least, most = min(500, max(warps.values())), max(3200, min(warps.values()))
    return [config for config, count in warps.items() if least <= count <= most]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """One program's part of out^T: which outputs, which blocks of K, which rows.

    Attributes:
      share: its number among the shares of K.
      first, last: its blocks of K, the last not with it.
      output: i32[block_n], numbers of its outputs; output_mask: which there are, None for all.
      row: i32[block_m], numbers of the rows; row_mask: likewise.
      block_k, inner: columns of K in a block, and all of them.
    """

    share: Int32[Array, ""]
    first: Int32[Array, ""]
    last: Int32[Array, ""]
    output: Int32[Array, "n"]
    output_mask: Array | None
    row: Int32[Array, "m"]
    row_mask: Array | None
    block_k: int
    inner: int

    def column(self, block: Array) -> Int32[Array, "k"]:
        """The columns of K of a block."""
        return block * self.block_k + jnp.arange(self.block_k)

    def inside(self, column: Array) -> Array | None:
        """Which of a block's columns there are, None for all."""
        return None if self.inner % self.block_k == 0 else column < self.inner

    def codes(self, ref: Any, block: Array) -> Int8[Array, "k m"]:
        """The activations' codes of a block, transposed; zero outside."""
        column = self.column(block)
        return load(ref, column[:, None], self.row[None, :], both(self.inside(column), self.row_mask), swapped=True)

    def per_output(self, ref: Any, *leading: Array) -> Array:
        """A vector of the outputs; `leading` are the indices before them."""
        return _load_vector(ref, leading, self.output, self.output_mask)

    def per_row(self, ref: Any, *leading: Array) -> Array:
        """A vector of the rows."""
        return _load_vector(ref, leading, self.row, self.row_mask)

    def store(self, out_ref: Any, values: Float[Array, "n m"], rows: int) -> None:
        """Writes the share's partial product, transposed back."""
        plgpu.store(out_ref.at[(self.share * rows + self.row)[None, :], self.output[:, None]], values,
                    mask=both(self.output_mask, self.row_mask))


def load(ref: Any, down: Array, across: Array, mask: Array | None, *, swapped: bool = False) -> Array:
    """A tile whose first axis is `down`; `swapped` where that is the second one of the array."""
    place = (across, down) if swapped else (down, across)
    return plgpu.load(ref.at[place], mask=mask, other=None if mask is None else 0)


def both(down: Array | None, across: Array | None) -> Array | None:
    """A tile's mask of its two axes'."""
    if down is None or across is None:
        return across[None, :] if down is None and across is not None else None if down is None else down[:, None]
    return down[:, None] & across[None, :]


def _load_vector(ref: Any, leading: tuple[Array, ...], index: Array, mask: Array | None) -> Array:
    place = (*(jnp.broadcast_to(number, index.shape) for number in leading), index)
    return plgpu.load(ref.at[place], mask=mask, other=None if mask is None else 0)


def cut(rows: int, inner: int, outputs: int, *, block_n: int, block_k: int, shares: int) -> Cut:
    """The present program's part, inside a kernel."""
    blocks = pl.cdiv(inner, block_k)
    each = pl.cdiv(blocks, shares)
    share = pl.program_id(1)
    output = pl.program_id(0) * block_n + jnp.arange(block_n)
    block_m = max(8, launch.power_of_two(rows))
    row = jnp.arange(block_m)
    return Cut(share=share, first=share * each, last=jnp.minimum((share + 1) * each, blocks), output=output,
               output_mask=None if outputs % block_n == 0 else output < outputs, row=row,
               row_mask=None if rows == block_m else row < rows, block_k=block_k, inner=inner)


def share_count(inner: int, block_k: int, split_k: int) -> int:
    """Shares of K, none of them empty."""
    blocks = pl.cdiv(inner, block_k)
    return pl.cdiv(blocks, pl.cdiv(blocks, split_k))


def _body(q_ref, row_scales_ref, values_ref, scales_ref, out_ref, *, config: Config, shares: int):
    rows, inner = q_ref.shape
    mine = cut(rows, inner, values_ref.shape[0], block_n=config.block_n, block_k=config.block_k, shares=shares)

    def step(block: Array, total: Array) -> Array:
        column = mine.column(block)
        weights = load(values_ref, mine.output[:, None], column[None, :], both(mine.output_mask, mine.inside(column)))
        return total + plgpu.dot(weights, mine.codes(q_ref, block))

    zeros = jnp.zeros((config.block_n, len(mine.row)), jnp.int32)
    total = jax.lax.fori_loop(mine.first, mine.last, step, zeros)
    mine.store(out_ref, scaled(total, mine.per_output(scales_ref), mine.per_row(row_scales_ref)), rows)


def scaled(total: Int32[Array, "n m"], scales: Float[Array, "n"], row_scales: Float[Array, "m"]) -> Float[Array, "n m"]:
    """The product that a sum of codes' products stands for."""
    return total.astype(jnp.float32) * scales[:, None] * row_scales[None, :]


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def matmul_partials(q: Int8[Array, "M K"], row_scales: Float[Array, "M"], values: Int8[Array, "N K"],
                    scales: Float[Array, "N"], *, config: Config, interpret: bool) -> Float[Array, "S M N"]:
    """Scaled partial products over the shares of K; M at most `MAX_ROWS`."""
    shares = share_count(q.shape[1], config.block_k, config.split_k)
    return launch_product(functools.partial(_body, config=config, shares=shares), (q, row_scales, values, scales),
                          outputs=values.shape[0], shares=shares, config=config, interpret=interpret, name="w8a8")


def launch_product(body: Callable[..., None], operands: tuple[Array, ...], *, outputs: int, shares: int, config: Any,
                   interpret: bool, name: str) -> Float[Array, "S M N"]:
    """Runs a product's body, a program for each block of outputs and share of K; `operands[0]` has the rows."""
    rows = len(operands[0])
    [out] = launch.call(
        body, operands, grid=(pl.cdiv(outputs, config.block_n), shares), num_warps=config.num_warps,
        num_stages=config.num_stages, interpret=interpret, name=name,
        out_shape=(jax.ShapeDtypeStruct((shares * rows, outputs), jnp.float32),))
    return out.reshape(shares, rows, outputs)
