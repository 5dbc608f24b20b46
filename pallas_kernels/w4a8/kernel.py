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


def _cut(q_ref, packed_ref, config: Config, shares: int) -> list[transposed.Cut]:
    rows, inner = q_ref.shape
    return transposed.cut(rows, inner, packed_ref.shape[1], config, block_k=BLOCK, shares=shares)


def _packed(mine: transposed.Cut, packed_ref, block: Array) -> UInt8[Array, "n b"]:
    return mine.tile(packed_ref, block, jnp.arange(HALF))


def _channel_body(q_ref, row_scales_ref, packed_ref, scales_ref, *refs, config: Config, shares: int, inline_asm: bool):
    *zeros_refs, out_ref = refs
    parts = _cut(q_ref, packed_ref, config, shares)
    mine = parts[0]

    def step(block: Array, totals: list[Array]) -> list[Array]:
        weights = joined(list(centred_of(_packed(mine, packed_ref, block), inline_asm=inline_asm)))
        return transposed.accumulated(totals, weights, q_ref, mine.column(block), parts)

    totals = jax.lax.fori_loop(mine.first, mine.last, step, transposed.zeros(parts, jnp.int32))
    scales = mine.per_output(scales_ref)
    for part, total in zip(parts, totals, strict=True):
        row_scales = part.per_row(row_scales_ref)
        product = scaled(total >> 4, scales, row_scales)  # every integer is 16-fold
        if zeros_refs:
            sums_ref, offsets_ref = zeros_refs
            row_sums = sum(part.per_row(sums_ref, chunk) for chunk in range(sums_ref.shape[0]))
            # one share answers for all that was centred
            row_sums = jnp.where(mine.share == 0, row_sums, 0).astype(jnp.float32) * row_scales
            product += row_sums[None, :] * (8 * scales - mine.per_output(offsets_ref))[:, None]
        part.store(out_ref, product, q_ref.shape[0])


def _scaled_groups_body(q_ref, row_scales_ref, packed_ref, groups_ref, channel_scales_ref, saturates_ref, out_ref, *,
                        config: Config, shares: int, inline_asm: bool):
    parts = _cut(q_ref, packed_ref, config, shares)
    mine = parts[0]

    def summed(saturating: bool) -> list[Array]:
        def step(block: Array, totals: list[Array]) -> list[Array]:
            halves = rounded_of(_packed(mine, packed_ref, block), mine.per_output(groups_ref, block), saturating=saturating,
                                inline_asm=inline_asm)
            return transposed.accumulated(totals, joined(list(halves)), q_ref, mine.column(block), parts)

        return jax.lax.fori_loop(mine.first, mine.last, step, transposed.zeros(parts, jnp.int32))

    # few tensors have an integer past 8 bits, and holding it there is a third of the work
    totals = jax.lax.cond(saturates_ref[0] != 0, lambda: summed(True), lambda: summed(False))
    _store_scaled(out_ref, totals, parts, channel_scales_ref, row_scales_ref)


def _zeroed_groups_body(q_ref, row_scales_ref, packed_ref, groups_ref, channel_scales_ref, sums_ref, out_ref, *,
                        config: Config, shares: int, inline_asm: bool):
    parts = _cut(q_ref, packed_ref, config, shares)
    mine = parts[0]
    last_group = sums_ref.shape[0] - 1

    def numbers(block: Array) -> tuple[list[Array], Array]:
        block = jnp.minimum(block, last_group)  # past the last group nobody reads them
        return [part.per_row(sums_ref, block) for part in parts], mine.per_output(groups_ref, block)

    def step(block: Array, carry: tuple[list[Array], tuple[list[Array], Array]]
             ) -> tuple[list[Array], tuple[list[Array], Array]]:
        totals, (sums, words) = carry
        following = numbers(block + 1)
        if config.pipelined_scales:
            words = mine.per_output_ahead(groups_ref, block, num_warps=config.num_warps)
        codes = joined(list(codes_of(_packed(mine, packed_ref, block), words if config.pipelined_scales else None,
                                     inline_asm=inline_asm)))
        # The sum of q * scale + zero is taken apart, so that a weight costs no more than its unpacking.
        products = [plgpu.dot(codes, part.activations(q_ref, mine.column(block))) for part in parts]
        scales, offsets = (words & 0xFFFF)[:, None], (words >> 16)[:, None]
        return [total + product * scales + offsets * each[None, :]
                for total, product, each in zip(totals, products, sums, strict=True)], following

    totals, _ = jax.lax.fori_loop(mine.first, mine.last, step, (transposed.zeros(parts, jnp.int32), numbers(mine.first)))
    _store_scaled(out_ref, totals, parts, channel_scales_ref, row_scales_ref)


def _store_scaled(out_ref, totals: list[Array], parts: list[transposed.Cut], channel_scales_ref, row_scales_ref) -> None:
    scales = parts[0].per_output(channel_scales_ref)
    for part, total in zip(parts, totals, strict=True):
        part.store(out_ref, scaled(total, scales, part.per_row(row_scales_ref)), row_scales_ref.shape[0])


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
