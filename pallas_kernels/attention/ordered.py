"""Tree attention whose bits do not depend on the tree: a row's keys are summed up in the order of their positions.

A row at position p sees one key for each position up to its own, wherever those lie: the committed ones at the cache row
of their position, its ancestors in the tree behind them, in slots that differ from tree to tree. Keys are cut into blocks
that start at fixed positions, and a block's place before the one with p in it decides whose share it is: the last two are
near and a share each, the far ones before them go to the other shares in turn. Every row so goes through the same
products, sums and combinations as when it is decoded alone, whoever reads its keys: committed blocks are read for all
rows at once, and what a row has in the tree is gathered for it alone into the order of positions.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels import launch
from pallas_kernels.attention.kernel import LOG2_E, MASKED

SLAB = 16
BLOCK = 64
NEAR = 2
MOST_DEPTH = BLOCK
"""Levels below the root that a tree may have: then all far keys are committed."""
SUM_COLUMNS = 32
"""More than a slab has rows: else Triton would have every warp compute all columns of every product of the program."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How the work is cut. Of these `splits` alone changes the result's bits, and so must not follow the tree's size.

    Attributes:
      slabs: of 16 (row, head) pairs, which share the committed keys that a program reads. Each is a product of its own:
        one of 64 pairs would be another instruction.
      splits: shares of the far blocks; two less than a power of two combine with the near ones without padding.
      num_warps, num_stages: Triton's.
    """

    slabs: int = 1
    splits: int = 14
    num_warps: int = 4
    num_stages: int = 2

    def __post_init__(self):
        for name in ("slabs", "splits"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")


def heuristic(rows: int, heads: int, kv_heads: int, dtype: jnp.dtype) -> Config:
    # Every warp holds its program's queries: three slabs of them spill, and two in f32, outside the tensor cores.
    most = 1 if dtype == jnp.float32 else 2
    return Config(slabs=min(most, pl.cdiv(rows * heads // kv_heads, SLAB)))


def _first_near(position: Int32[Array, "..."]) -> Int32[Array, "..."]:
    """The first of a row's near blocks; below `BLOCK` there is no second one."""
    return jnp.maximum(position // BLOCK - 1, 0)


class _Slab(NamedTuple):
    """Query rows and heads of the group of a slab's pairs, and which pairs exist."""

    row: Int32[Array, "P"]
    head: Int32[Array, "P"]
    mask: Bool[Array, "P"]


class _Sums(NamedTuple):
    """Of a slab: its weighted values, the largest score, and the sum of weights in each of `SUM_COLUMNS` columns."""

    values: Float[Array, "P d"]
    largest: Float[Array, "P"]
    weights: Float[Array, "P C"]


@dataclasses.dataclass(frozen=True)
class _Operands:
    """A program's arrays, and what programs of either kind do with them."""

    q: Any
    k: Any
    v: Any
    out: tuple[Any, Any, Any]
    rows: int
    sequences: int
    scale: float
    kv_head: Int32[Array, ""]
    sequence: Int32[Array, ""] | int
    slot: Int32[Array, ""] | int

    @property
    def heads(self) -> int:
        return self.q.shape[0] // (self.rows * self.sequences)

    @property
    def group(self) -> int:
        return self.heads // self.k.shape[2]

    @property
    def lane(self) -> Int32[Array, "1 d"]:
        return jnp.arange(self.k.shape[3])[None, :]

    def among_all(self, row: Int32[Array, "..."]) -> Int32[Array, "..."]:
        """The index among all rows of one of the sequence's."""
        return self.sequence * self.rows + row

    def queries(self, slab: _Slab) -> Float[Array, "P d"]:
        q_row = self.among_all(slab.row) * self.heads + self.kv_head * self.group + slab.head
        return plgpu.load(self.q.at[q_row[:, None], self.lane], mask=slab.mask[:, None], other=0)

    def block(self, cache_row: Int32[Array, "B"], mask: Bool[Array, "B"] | None
              ) -> tuple[Float[Array, "B d"], Float[Array, "B d"]]:
        """Keys and values at those rows of the cache."""
        slot, head = (jnp.broadcast_to(index, (1, 1)) for index in (self.slot, self.kv_head))
        index = slot, cache_row[:, None], head, self.lane
        masked = dict(mask=None, other=None) if mask is None else dict(mask=mask[:, None], other=0)
        return plgpu.load(self.k.at[index], **masked), plgpu.load(self.v.at[index], **masked)

    def empty(self) -> _Sums:
        return _Sums(jnp.zeros((SLAB, self.k.shape[3]), jnp.float32), jnp.full((SLAB,), MASKED, jnp.float32),
                     jnp.zeros((SLAB, SUM_COLUMNS), jnp.float32))

    def add(self, sums: _Sums, queries: Float[Array, "P d"], keys: Float[Array, "B d"], values: Float[Array, "B d"],
            seen: Bool[Array, "B"]) -> _Sums:
        precision = jax.lax.Precision.HIGHEST if keys.dtype == jnp.float32 else None
        scores = plgpu.dot(queries, keys, trans_b=True, precision=precision) * (self.scale * LOG2_E)
        scores = jnp.where(seen[None, :], scores, MASKED)
        largest = jnp.maximum(sums.largest, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - largest[:, None]).astype(values.dtype)
        decay = jnp.exp2(sums.largest - largest)[:, None]
        # Weights are summed by a product too, in equal columns: the order of a reduction follows Triton's layouts.
        ones = jnp.ones((BLOCK, SUM_COLUMNS), values.dtype)
        return _Sums(sums.values * decay + plgpu.dot(weights, values, precision=precision), largest,
                     sums.weights * decay + plgpu.dot(weights, ones, precision=precision))

    def store(self, share: Int32[Array, ""], slab: _Slab, sums: _Sums) -> None:
        values, largest, weights = self.out
        row = share * self.rows * self.sequences + self.among_all(slab.row)
        part = (row * self.heads + self.kv_head * self.group + slab.head)[:, None]
        mask = slab.mask[:, None]
        plgpu.store(values.at[part, self.lane], sums.values, mask=mask)
        plgpu.store(largest.at[part], sums.largest[:, None], mask=mask)
        plgpu.store(weights.at[part], jnp.max(sums.weights, axis=1)[:, None], mask=mask)  # all columns are equal


def _body(q_ref, k_ref, v_ref, length_ref, depth_ref, paths_ref, *refs, config: Config, rows: int, scale: float):
    sequences = length_ref.shape[0]
    work, sequence = pl.program_id(0), pl.program_id(2) if sequences > 1 else 0
    *slots_ref, _, _, _ = refs
    length, slot = length_ref[sequence], slots_ref[0][sequence] if slots_ref else 0
    operands = _Operands(q_ref, k_ref, v_ref, refs[-3:], rows, sequences, scale, pl.program_id(1), sequence, slot)
    own = rows * pl.cdiv(operands.group, SLAB)

    @pl.when(work < own)
    def _():
        _own_blocks(operands, work, length, depth_ref, paths_ref, config)

    @pl.when(work >= own)
    def _():
        _common_blocks(operands, work - own, length, depth_ref, config)


def _own_blocks(operands: _Operands, work: Int32[Array, ""], length: Int32[Array, ""], depth_ref, paths_ref,
                config: Config) -> None:
    """Gathers one row's near blocks that are not committed."""
    slabs = pl.cdiv(operands.group, SLAB)
    row, head = work // slabs, work % slabs * SLAB + jnp.arange(SLAB)
    slab = _Slab(jnp.broadcast_to(row, head.shape), head, head < operands.group)
    position = length + plgpu.load(depth_ref.at[operands.among_all(row)])
    queries = operands.queries(slab)

    def gather(near: Array, carry: None) -> None:
        key = (_first_near(position) + near) * BLOCK + jnp.arange(BLOCK)
        behind, seen = key - length, key <= position
        path = jnp.broadcast_to(operands.among_all(row), key.shape)
        node = plgpu.load(paths_ref.at[path, behind], mask=(behind >= 0) & seen, other=0)
        keys, values = operands.block(jnp.where(behind < 0, key, length + node), seen)
        operands.store(config.splits + near, slab, operands.add(operands.empty(), queries, keys, values, seen))

    first_own = length // BLOCK - _first_near(position)  # 1 where the first near block is committed
    jax.lax.fori_loop(first_own, jnp.minimum(position // BLOCK + 1, NEAR), gather, None)


def _common_blocks(operands: _Operands, work: Int32[Array, ""], length: Int32[Array, ""], depth_ref, config: Config
                   ) -> None:
    """One share of the far blocks, or the near block that is committed, for a tile of rows."""
    tile, share = work // (config.splits + 1), work % (config.splits + 1)
    is_near = share == config.splits
    committed = length // BLOCK
    start = jnp.where(is_near, committed - 1, share)

    @pl.when((0 <= start) & (start < committed))
    def _():
        slabs, firsts, last = [], [], jnp.int32(0)
        for i in range(config.slabs):
            pair = (tile * config.slabs + i) * SLAB + jnp.arange(SLAB)
            row, mask = pair // operands.group, pair < operands.rows * operands.group
            first = _first_near(length + plgpu.load(depth_ref.at[operands.among_all(row)], mask=mask, other=0))
            slabs.append(_Slab(row, pair % operands.group, mask))
            firsts.append(first)
            last = jnp.maximum(last, jnp.max(first))
        queries = [operands.queries(slab) for slab in slabs]

        def is_wanted(block: Array, first: Array) -> Array:
            return jnp.where(is_near, first == block, first > block)

        def step(turn: Array, carry: tuple[_Sums, ...]) -> tuple[_Sums, ...]:
            block = start + turn * config.splits
            key = block * BLOCK + jnp.arange(BLOCK)
            keys, values = operands.block(key, None)
            seen = key < length  # all of them: left out, a compiler could fuse other operations here than in `gather`
            result = []
            for query, first, sums in zip(queries, firsts, carry, strict=True):
                added, wanted = operands.add(sums, query, keys, values, seen), is_wanted(block, first)
                result.append(_Sums(*(jnp.where(wanted if a.ndim == 1 else wanted[:, None], a, b)
                                      for a, b in zip(added, sums, strict=True))))
            return tuple(result)

        turns = jnp.where(is_near, 1, pl.cdiv(last - share, config.splits))
        carry = jax.lax.fori_loop(0, turns, step, (operands.empty(),) * config.slabs)
        for slab, first, sums in zip(slabs, firsts, carry, strict=True):
            operands.store(share, slab._replace(mask=slab.mask & is_wanted(start, first)), sums)


def _combine_body(total_ref, largest_ref, sum_ref, length_ref, depth_ref, out_ref, *, splits: int, heads: int):
    q_rows, head_dim = out_ref.shape
    q_row, sequences = pl.program_id(0), length_ref.shape[0]
    sequence = q_row // (q_rows // sequences) if sequences > 1 else 0
    position = length_ref[sequence] + plgpu.load(depth_ref.at[q_row // heads])
    first = _first_near(position)
    split = jnp.arange(launch.power_of_two(splits + NEAR))
    near = split - splits
    # Shares without a key have written nothing.
    mask = jnp.where(near < 0, split < first, (near < NEAR) & ((first + near) * BLOCK <= position))
    part = split * q_rows + q_row
    largest = plgpu.load(largest_ref.at[part], mask=mask, other=MASKED)
    decay = jnp.exp2(largest - jnp.max(largest))
    weight_sum = jnp.sum(decay * plgpu.load(sum_ref.at[part], mask=mask, other=0))
    lane = jnp.arange(head_dim)
    totals = plgpu.load(total_ref.at[part[:, None], lane[None, :]], mask=mask[:, None], other=0)
    total = jnp.sum(totals * decay[:, None], axis=0)
    plgpu.store(out_ref.at[q_row, lane], (total / weight_sum).astype(out_ref.dtype))


@functools.partial(jax.jit, static_argnames=("scale", "config", "interpret"))
def attention(q: Float[Array, "T Hq d"], k_cache: Float[Array, "B L Hkv d"], v_cache: Float[Array, "B L Hkv d"],
              lengths: Int32[Array, "N"], slots: Int32[Array, "N"] | None, depth: Int32[Array, "T"],
              paths: Int32[Array, "T D"], *, scale: float, config: Config, interpret: bool) -> Float[Array, "T Hq d"]:
    """See `api.ordered_attention`; no slots are one sequence in the only one."""
    rows, heads, head_dim = q.shape
    kv_heads, sequences = k_cache.shape[2], len(lengths)
    group, each = heads // kv_heads, rows // sequences
    flat = jax.ShapeDtypeStruct((rows * heads, head_dim), q.dtype)
    parts = (config.splits + NEAR) * rows * heads
    tiles = pl.cdiv(each * group, config.slabs * SLAB)
    named = () if slots is None else (slots,)
    out = launch.call(
        functools.partial(_body, config=config, rows=each, scale=scale),
        (q.reshape(flat.shape), k_cache, v_cache, lengths, depth, paths, *named),
        grid=(each * pl.cdiv(group, SLAB) + tiles * (config.splits + 1), kv_heads, sequences), num_warps=config.num_warps,
        num_stages=config.num_stages, interpret=interpret, name="ordered_attention",
        out_shape=(jax.ShapeDtypeStruct((parts, head_dim), jnp.float32), jax.ShapeDtypeStruct((parts,), jnp.float32),
                   jax.ShapeDtypeStruct((parts,), jnp.float32)))
    [out] = launch.call(
        functools.partial(_combine_body, splits=config.splits, heads=heads), (*out, lengths, depth), out_shape=(flat,),
        grid=(rows * heads,), num_warps=1, num_stages=1, interpret=interpret, name="ordered_attention_combine")
    return out.reshape(q.shape)
