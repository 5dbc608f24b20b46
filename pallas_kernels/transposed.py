"""How products with up to 512 rows of activations are cut into programs.

They are computed transposed, out^T = W x^T: as the tensor core's left operand the weights stay in registers, and as few as 8
rows of activations make a product. A program takes up to `block_m` rows, `block_n` outputs and one share of K.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels import launch
from pallas_kernels.partials import stored

SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
BLOCK_ROWS = 64
"""Rows of a program that weights from memory keep busy; more are worth weights that are unpacked for all of them at once."""
MAX_ROWS = 512
"""More rows cost less by weights that are unpacked once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How a product is cut, whatever its weights are.

    Attributes:
      block_m: rows a program computes at most, a power of two of at least 16. The others are another program's, which finds the
        weights in the L2 cache.
      block_n: outputs a program computes, a power of two of at least 16.
      split_k: shares of K; fewer come out when K has fewer blocks.
      num_warps: they share the outputs of a program.
      num_stages: blocks whose loads are in flight.
    """

    block_m: int = BLOCK_ROWS
    block_n: int = 64
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 4

    def __post_init__(self):
        launch.check_powers_of_two(self, block_m=16, block_n=16)
        if self.split_k < 1:
            raise ValueError(f"split_k is {self.split_k}; expected at least 1")


def program_shapes(rows: int) -> list[dict[str, int]]:
    """Rows, outputs and warps of a program that are worth timing."""
    if rows <= 16:
        shapes = [(BLOCK_ROWS, 32, 1), (BLOCK_ROWS, 64, 1), (BLOCK_ROWS, 64, 2), (BLOCK_ROWS, 64, 4), (BLOCK_ROWS, 128, 2),
                  (BLOCK_ROWS, 128, 4)]
    elif rows <= BLOCK_ROWS:
        shapes = [(BLOCK_ROWS, 64, 4), (BLOCK_ROWS, 128, 4), (BLOCK_ROWS, 128, 8), (BLOCK_ROWS, 256, 8)]
    else:
        shapes = [(64, 128, 4), (128, 64, 4), (128, 128, 4), (128, 128, 8), (128, 256, 8), (256, 64, 4), (256, 128, 8),
                  (256, 256, 16)]
    return [{"block_m": block_m, "block_n": block_n, "num_warps": warps} for block_m, block_n, warps in shapes
            if block_m <= max(BLOCK_ROWS, tuned_rows(rows))]


def tuned_rows(rows: int) -> int:
    """The power of two by which tuned tables know a product."""
    return max(8, launch.power_of_two(min(rows, MAX_ROWS)))


def filling(rows: int, inner: int, outputs: int, configs: Sequence[Any]) -> list[Any]:
    """Those with a split that K allows and as many warps as a GPU of about 132 SMs has use for; more where nothing is split."""
    warps = {config: math.prod(grid(rows, outputs, config, shares=config.split_k)) * config.num_warps for config in configs
             if share_count(inner, config.block_k, config.split_k) == config.split_k}
    least, most = min(500, max(warps.values())), max(3200, min(warps.values()))
    return [config for config, count in warps.items() if least <= count and (count <= most or config.split_k == 1)]


def three_an_sm(config: Any, rows: int, inner: int, outputs: int) -> Any:
    """The config with a split of K that starts about three programs for each of about 132 SMs; one where many rows want a
    larger one."""
    programs = 396
    if rows > BLOCK_ROWS:
        config, programs = dataclasses.replace(config, block_m=128, block_n=128, num_warps=8, num_stages=3), 132
    split_k = min(programs // math.prod(grid(rows, outputs, config, shares=1)), pl.cdiv(inner, config.block_k) // 4, 12)
    return dataclasses.replace(config, split_k=max(1, split_k))


def byte_candidates(kind: type[Config], rows: int, inner: int, outputs: int, *, block_k: Sequence[int]) -> list[Any]:
    """Configs worth timing of a product with 8-bit weights, with every split that fills a GPU about once."""
    return filling(rows, inner, outputs, [
        kind(**shape, block_k=columns, split_k=split_k, num_stages=stages)
        for shape, columns, split_k, stages in itertools.product(program_shapes(rows), block_k, SPLITS, (3, 4, 5))])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """One program's part of out^T: which outputs, which blocks of K, which rows.

    Attributes:
      share: its number among the shares of K.
      first, last: its blocks of K, the last not with it.
      output: i32[block_n], numbers of its outputs; output_mask: which there are, None for all.
      row: i32[m], numbers of the rows, a power of two of them; row_mask: likewise.
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

    def activations(self, ref: Any, column: Int32[Array, "k"]) -> Array:
        """The rows' values at these columns of K, transposed: [k, m], zero outside."""
        return load(ref, column[:, None], self.row[None, :], both(self.inside(column), self.row_mask), swapped=True)

    def tile(self, ref: Any, block: Array, across: Array) -> Array:
        """What [block, output, across] holds, [n, len(across)]."""
        mask = both(self.output_mask, None)
        place = jnp.broadcast_to(block, (1, 1)), self.output[:, None], across[None, :]
        return plgpu.load(ref.at[place], mask=mask, other=None if mask is None else 0)

    def per_output(self, ref: Any, *leading: Array) -> Array:
        """A vector of the outputs; `leading` are the indices before them."""
        return _load_vector(ref, leading, self.output, self.output_mask)

    def per_output_ahead(self, ref: Any, index: Array, *, num_warps: int) -> Array:
        """The vector `index` of [index, output], in a form that Triton loads ahead of time where a product's operand depends on
        it and something behind the product reads it, too.

        A load of fewer elements than a program has threads counts as cheap: it is made again, in the loop, in each other layout
        that is asked for. So the vectors behind this one are loaded with it, and nobody reads them.
        """
        copies = 32 * num_warps // len(self.output)
        if copies <= 1:
            return self.per_output(ref, index)
        which = jnp.arange(copies)[None, :]
        place = jnp.minimum(index + which, ref.shape[0] - 1), self.output[:, None]
        mask = both(self.output_mask, None)
        numbers = plgpu.load(ref.at[place], mask=mask, other=None if mask is None else 0)
        return jnp.sum(jnp.where(which == 0, numbers, 0), axis=1, dtype=numbers.dtype)

    def per_row(self, ref: Any, *leading: Array) -> Array:
        """A vector of the rows."""
        return _load_vector(ref, leading, self.row, self.row_mask)

    def store(self, out_ref: Any, values: Float[Array, "n m"], rows: int) -> None:
        """Writes the share's partial product, transposed back, in out_ref's dtype."""
        plgpu.store(out_ref.at[(self.share * rows + self.row)[None, :], self.output[:, None]], stored(values, out_ref.dtype),
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


def cut(rows: int, inner: int, outputs: int, config: Config, *, block_k: int, shares: int, least_rows: int = 8) -> list[Cut]:
    """The present program's part, inside a kernel on a `grid`, once for each of its `row_parts` of at least `least_rows`."""
    blocks = pl.cdiv(inner, block_k)
    each = pl.cdiv(blocks, shares)
    share = pl.program_id(2)
    output = pl.program_id(1) * config.block_n + jnp.arange(config.block_n)
    sizes = row_parts(rows, config)
    found = []
    for size, start in zip(sizes, itertools.accumulate(sizes, initial=0), strict=False):
        row = start + jnp.arange(max(least_rows, size))
        if rows > config.block_m:
            row += pl.program_id(0) * sum(sizes)
        found.append(Cut(
            share=share, first=share * each, last=jnp.minimum((share + 1) * each, blocks), output=output,
            output_mask=None if outputs % config.block_n == 0 else output < outputs, row=row,
            row_mask=None if rows % max(least_rows, sum(sizes)) == 0 else row < rows, block_k=block_k, inner=inner))
    return found


def accumulated(totals: Sequence[Array], weights: Array, ref: Any, column: Int32[Array, "k"], parts: Sequence[Cut]
                ) -> list[Array]:
    """The sums of all parts, with the product of weights [n, k] and the rows' values at these columns of K."""
    return [total + plgpu.dot(weights, part.activations(ref, column)) for total, part in zip(totals, parts, strict=True)]


def zeros(parts: Sequence[Cut], dtype: Any) -> list[Array]:
    """Sums of nothing, [n, m] of each part."""
    return [jnp.zeros((len(part.output), len(part.row)), dtype) for part in parts]


def in_one_order(config: Any, rows: int) -> Any:
    """A config for so many rows that adds up as `config` does for up to `BLOCK_ROWS` of them.

    What keeps the order is the cut of K, and one instruction: a warpgroup's product adds up alike for any number of rows, and
    other than a warp's does.
    """
    if rows <= BLOCK_ROWS or config.block_n < 64 or config.num_warps % 4:
        return config
    return dataclasses.replace(config, block_m=2 * BLOCK_ROWS, num_stages=min(3, config.num_stages))


def row_parts(rows: int, config: Config) -> tuple[int, ...]:
    """Rows of a program, in one power of two or in two, so that 96 and 192 rows don't cost what 128 and 256 do."""
    each = pl.cdiv(rows, pl.cdiv(rows, config.block_m))
    whole = max(8, launch.power_of_two(each))
    half, quarter = whole // 2, whole // 4
    if whole > BLOCK_ROWS and each <= half + quarter:
        return half, quarter
    return (whole,)


def grid(rows: int, outputs: int, config: Config, *, shares: int) -> tuple[int, int, int]:
    """Blocks of rows, which lie side by side, blocks of outputs, shares of K."""
    return pl.cdiv(rows, config.block_m), pl.cdiv(outputs, config.block_n), shares


def share_count(inner: int, block_k: int, split_k: int) -> int:
    """Shares of K, none of them empty."""
    blocks = pl.cdiv(inner, block_k)
    return pl.cdiv(blocks, pl.cdiv(blocks, split_k))


def launch_product(body: Callable[..., None], operands: tuple[Array, ...], *, outputs: int, shares: int, config: Config,
                   interpret: bool, name: str, out_dtype: Any = jnp.float32) -> Float[Array, "S M N"]:
    """Runs a product's body, a program for each block of outputs and share of K; `operands[0]` has the rows."""
    rows = len(operands[0])
    [out] = launch.call(
        body, operands, grid=grid(rows, outputs, config, shares=shares), num_warps=config.num_warps,
        num_stages=config.num_stages, interpret=interpret, name=name,
        out_shape=(jax.ShapeDtypeStruct((shares * rows, outputs), out_dtype),))
    return out.reshape(shares, rows, outputs)
