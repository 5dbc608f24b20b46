"""The W4A8 product on the tensor cores: 4-bit weights become 8-bit integers in registers, on their way to it."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int8, Int32, UInt8

from pallas_kernels import transposed
from pallas_kernels.partials import sums_dtype
from pallas_kernels.w4a8.dequantise import centred_of, codes_of, rounded_of
from pallas_kernels.w4a8.layout import BLOCK, HALF
from pallas_kernels.w4a16.dequantise import joined
from pallas_kernels.w8a8.kernel import scaled


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(transposed.Config):
    """How the product is cut, over blocks of 128 columns of K. A share is exact; the shares' scaled sums are f32.

    Attributes:
      pipelined_scales: loads the scales of groups with zeros together with their weights, `num_stages` ahead, which few rows
        want; else with those of the block before. Scales without zeros are always loaded so.
      inline_asm: dequantises in PTX, four weights an instruction; never in interpret mode.
    """

    pipelined_scales: bool = True
    inline_asm: bool = True

    block_k: ClassVar[int] = BLOCK


def heuristic(rows: int, inner: int, outputs: int) -> Config:
    """A config that starts about three programs for each of about 132 SMs."""
    return transposed.three_an_sm(Config(pipelined_scales=rows <= 16), rows, inner, outputs)


def candidates(rows: int, inner: int, outputs: int) -> list[Config]:
    """Configs worth timing, with every split that fills a GPU about once."""
    return transposed.filling(rows, inner, outputs, [
        Config(**shape, split_k=split_k, num_stages=stages, pipelined_scales=rows <= 16)
        for shape, split_k, stages in itertools.product(transposed.program_shapes(rows), transposed.SPLITS, (3, 4))])


def _cut(q_ref, packed_ref, config: Config, shares: int) -> transposed.Cut:
    rows, inner = q_ref.shape
    return transposed.cut(rows, inner, packed_ref.shape[1], config, block_k=BLOCK, shares=shares)


def _packed(mine: transposed.Cut, packed_ref, block: Array) -> UInt8[Array, "n b"]:
    return mine.tile(packed_ref, block, jnp.arange(HALF))


def _start(mine: transposed.Cut) -> Int32[Array, "n m"]:
    return jnp.zeros((len(mine.output), len(mine.row)), jnp.int32)


def _channel_body(q_ref, row_scales_ref, packed_ref, scales_ref, *refs, config: Config, shares: int, inline_asm: bool):
    *zeros_refs, out_ref = refs
    mine = _cut(q_ref, packed_ref, config, shares)

    def step(block: Array, total: Array) -> Array:
        weights = joined(list(centred_of(_packed(mine, packed_ref, block), inline_asm=inline_asm)))
        return total + plgpu.dot(weights, mine.activations(q_ref, mine.column(block)))

    total = jax.lax.fori_loop(mine.first, mine.last, step, _start(mine)) >> 4  # every integer is 16-fold
    scales, row_scales = mine.per_output(scales_ref), mine.per_row(row_scales_ref)
    product = scaled(total, scales, row_scales)
    if zeros_refs:
        sums_ref, offsets_ref = zeros_refs
        parts = sum(mine.per_row(sums_ref, part) for part in range(sums_ref.shape[0]))
        # one share answers for all that was centred
        sums = jnp.where(mine.share == 0, parts, 0).astype(jnp.float32) * row_scales
        product += sums[None, :] * (8 * scales - mine.per_output(offsets_ref))[:, None]
    mine.store(out_ref, product, q_ref.shape[0])


def _scaled_groups_body(q_ref, row_scales_ref, packed_ref, groups_ref, channel_scales_ref, saturates_ref, out_ref, *,
                        config: Config, shares: int, inline_asm: bool):
    mine = _cut(q_ref, packed_ref, config, shares)

    def summed(saturating: bool) -> Int32[Array, "n m"]:
        def step(block: Array, total: Array) -> Array:
            halves = rounded_of(_packed(mine, packed_ref, block), mine.per_output(groups_ref, block), saturating=saturating,
                                inline_asm=inline_asm)
            return total + plgpu.dot(joined(list(halves)), mine.activations(q_ref, mine.column(block)))

        return jax.lax.fori_loop(mine.first, mine.last, step, _start(mine))

    # few tensors have an integer past 8 bits, and holding it there is a third of the work
    total = jax.lax.cond(saturates_ref[0] != 0, lambda: summed(True), lambda: summed(False))
    mine.store(out_ref, scaled(total, mine.per_output(channel_scales_ref), mine.per_row(row_scales_ref)),
               q_ref.shape[0])


def _zeroed_groups_body(q_ref, row_scales_ref, packed_ref, groups_ref, channel_scales_ref, sums_ref, out_ref, *,
                        config: Config, shares: int, inline_asm: bool):
    mine = _cut(q_ref, packed_ref, config, shares)
    last_group = sums_ref.shape[0] - 1

    def numbers(block: Array) -> tuple[Array, Array]:
        block = jnp.minimum(block, last_group)  # past the last group nobody reads them
        return mine.per_row(sums_ref, block), mine.per_output(groups_ref, block)

    def step(block: Array, carry: tuple[Array, tuple[Array, Array]]) -> tuple[Array, tuple[Array, Array]]:
        total, (sums, words) = carry
        following = numbers(block + 1)
        if config.pipelined_scales:
            words = mine.per_output_ahead(groups_ref, block, num_warps=config.num_warps)
        codes = codes_of(_packed(mine, packed_ref, block), words if config.pipelined_scales else None, inline_asm=inline_asm)
        # The sum of q * scale + zero is taken apart, so that a weight costs no more than its unpacking.
        part = plgpu.dot(joined(list(codes)), mine.activations(q_ref, mine.column(block)))
        return total + part * (words & 0xFFFF)[:, None] + (words >> 16)[:, None] * sums[None, :], following

    total, _ = jax.lax.fori_loop(mine.first, mine.last, step, (_start(mine), numbers(mine.first)))
    mine.store(out_ref, scaled(total, mine.per_output(channel_scales_ref), mine.per_row(row_scales_ref)),
               q_ref.shape[0])


@functools.partial(jax.jit, static_argnames=("halves", "config", "interpret"))
def channel_partials(q: Int8[Array, "M K"], row_scales: Float[Array, "M"], sums: Int32[Array, "P M"] | None,
                     packed: UInt8[Array, "B N 64"], scales: Float[Array, "N"], offsets: Float[Array, "N"] | None, *,
                     halves: bool, config: Config, interpret: bool) -> Float[Array, "S M N"]:
    """Scaled partial products over the shares of K; M at most `transposed.MAX_ROWS`."""
    zeros = () if offsets is None else (sums, offsets)
    return _launch(_channel_body, (q, row_scales, packed, scales, *zeros), halves, config=config, interpret=interpret)


@functools.partial(jax.jit, static_argnames=("halves", "config", "interpret"))
def group_partials(q: Int8[Array, "M K"], row_scales: Float[Array, "M"], sums: Int32[Array, "G M"] | None,
                   packed: UInt8[Array, "B N 64"], groups: Int32[Array, "G N"], channel_scales: Float[Array, "N"],
                   saturates: Int32[Array, "1"] | None, *, halves: bool, config: Config, interpret: bool
                   ) -> Float[Array, "S M N"]:
    """Scaled partial products over the shares of K; M at most `transposed.MAX_ROWS`."""
    body, last = (_zeroed_groups_body, sums) if saturates is None else (_scaled_groups_body, saturates)
    return _launch(body, (q, row_scales, packed, groups, channel_scales, last), halves, config=config,
                   interpret=interpret)


def _launch(body: Callable[..., None], operands: tuple[Array, ...], halves: bool, *, config: Config,
            interpret: bool) -> Float[Array, "S M N"]:
    q, packed = operands[0], operands[2]
    shares = transposed.share_count(q.shape[1], BLOCK, config.split_k)
    body = functools.partial(body, config=config, shares=shares, inline_asm=config.inline_asm and not interpret)
    return transposed.launch_product(body, operands, outputs=packed.shape[1], shares=shares, config=config,
                                     interpret=interpret, name="w4a8", out_dtype=sums_dtype(halves))
