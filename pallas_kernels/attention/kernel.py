"""Flash-decoding (Dao et al., 2023) with a draft tree's mask: splits of the live keys, then their combination.

The query heads that share a kv head and the rows of the tree form one axis of tiles, so each key is read once for
all of them: tile row i is query row i // group, head i % group of the group. A split computes softmax numerators
against its own maximum; the second launch weighs and adds the splits in order. A single split needs no second launch.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels import launch
from pallas_kernels.attention.mask import WORD, windowed

_SHARE, _LEAST_OF_SHARE = 1024, 128
"""Keys of a share where a slot has as many as its cache can hold, and those below which a sequence is not cut."""
MASKED = -1e30  # finite: the difference of two masked scores must not be NaN
LOG2_E = math.log2(math.e)  # the hardware's exponential has base 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How the work is cut.

    Attributes:
      block_m: (row, head) pairs in a tile, a power of two of at least 16.
      block_k: keys in a loop iteration, a power of two of at least 16.
      splits: shares of the live keys, each a program of its own.
      least_blocks: of `block_k` keys that a share has, where there are as many; of a shorter sequence other shares are empty.
      num_warps, num_stages: Triton's.
    """

    block_m: int = 16
    block_k: int = 64
    splits: int = 8
    least_blocks: int = 1
    num_warps: int = 4
    num_stages: int = 2

    def __post_init__(self):
        launch.check_powers_of_two(self, block_m=16, block_k=16)
        for name in ("splits", "least_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")


def heuristic(rows: int, heads: int, kv_heads: int, max_len: int, dtype: jnp.dtype, sequences: int = 1) -> Config:
    """A config that starts about two programs for each of about 132 SMs, for `rows` of each sequence.

    Of several sequences one may be a hundred times as long as the others: it is cut in more shares than they are.
    """
    pairs = rows * heads // kv_heads
    # f32 products run outside the tensor cores, where a larger tile spills its registers.
    largest, block_k = (16, 32) if dtype == jnp.float32 else (64, 64)
    block_m = min(largest, max(16, launch.power_of_two(pairs)))
    tiles = pl.cdiv(pairs, block_m) * kv_heads * sequences
    if sequences == 1:
        return Config(block_m=block_m, block_k=block_k, splits=min(pl.cdiv(264, tiles), 32, pl.cdiv(max_len, block_k)))
    splits = min(max(1, 1024 // tiles, pl.cdiv(max_len, _SHARE)), 32, pl.cdiv(max_len, _LEAST_OF_SHARE))
    # few rows of many sequences: small programs, of which an SM holds many
    block_k, num_warps = (32, 2) if tiles >= 256 and block_m == 16 else (block_k, 4)
    return Config(block_m=block_m, block_k=block_k, splits=splits, num_warps=num_warps,
                  least_blocks=_LEAST_OF_SHARE // block_k)


def _exp2_of_sum(values: Float[Array, "M N"], factor: float, others: Float[Array, "M 1"], *, inline_asm: bool
                 ) -> Float[Array, "M N"]:
    """2 ** (values * factor + others), for exponents whose small powers may be zero; two instructions in PTX."""
    if not inline_asm:
        return jnp.exp2(values * factor + others)
    bits = np.float32(factor).view(np.uint32)
    asm = f"{{ .reg .f32 t; fma.rn.f32 t, $1, 0f{bits:08X}, $2; ex2.approx.ftz.f32 $0, t; }}"
    [out] = plgpu.elementwise_inline_asm(asm, args=[values, jnp.broadcast_to(others, values.shape)], constraints="=f,f,f",
                                         pack=1, result_shape_dtypes=[jax.ShapeDtypeStruct(values.shape, jnp.float32)])
    return out


def _body(*refs, config: Config, rows: int, tail: int, tree: bool, is_slotted: bool, scale: float, window: int | None,
          cap: float | None, inline_asm: bool):
    q_ref, k_ref, v_ref, length_ref, *refs = refs
    words_ref = refs.pop(0) if tree else None
    behind_ref = refs.pop(0) if tree and window is not None else None
    slots_ref = refs.pop(0) if is_slotted else None
    _, max_len, kv_heads, head_dim = k_ref.shape
    sequences = length_ref.shape[0]
    heads = q_ref.shape[0] // (rows * sequences)
    group = heads // kv_heads
    tile, kv_head, split, sequence = pl.program_id(0), pl.program_id(1), pl.program_id(2), 0
    if sequences > 1:
        sequence, split = split // config.splits, split % config.splits
    length, slot = length_ref[sequence], 0 if slots_ref is None else slots_ref[sequence]

    pair = tile * config.block_m + jnp.arange(config.block_m)
    row = pair // group
    pair_mask = (pair < rows * group)[:, None]
    q_row = ((sequence * rows + row) * heads + kv_head * group + pair % group)[:, None]
    lane = jnp.arange(head_dim)[None, :]
    queries = plgpu.load(q_ref.at[q_row, lane], mask=pair_mask, other=0)
    precision = jax.lax.Precision.HIGHEST if k_ref.dtype == jnp.float32 else None
    exponent = scale * LOG2_E if cap is None else LOG2_E

    # A causal tile sees nothing past its last row's own key.
    last_row = tail if tree else jnp.minimum(rows, ((tile + 1) * config.block_m - 1) // group + 1)
    live = jnp.minimum(length + last_row, max_len)
    blocks = pl.cdiv(live, config.block_k)
    if window is None:
        each = jnp.maximum(pl.cdiv(blocks, config.splits), config.least_blocks)
        first, last = split * each, jnp.minimum((split + 1) * each, blocks)
        committed = jnp.clip(length // config.block_k, first, jnp.maximum(first, last))
    else:
        # The tile's first row begins earliest. What it sees may be hidden from others, so that every block is masked.
        first_row = 0 if tree else tile * config.block_m // group
        start = jnp.maximum(length + first_row + 1 - window, 0) // config.block_k
        each = jnp.maximum(pl.cdiv(blocks - start, config.splits), config.least_blocks)
        first, last = start + split * each, jnp.minimum(start + (split + 1) * each, blocks)
        committed = first
        behind = row + 1 if behind_ref is None else plgpu.load(behind_ref.at[sequence * rows + row], mask=row < rows, other=1)
        first_key = (length + behind - window)[:, None]

    # A row's words once, not for each key: their loads stand in nobody's way.
    words = [plgpu.load(words_ref.at[sequence * rows + row, jnp.broadcast_to(index, row.shape)], mask=row < rows, other=0)
             for index in range(words_ref.shape[1] if tree else 0)]

    def visible(key: Array) -> Array:
        node = key - length
        if not tree:
            return node[None, :] <= row[:, None]
        word = words[0][:, None]
        for index, others in enumerate(words[1:], 1):
            word = jnp.where((node // WORD == index)[None, :], others[:, None], word)
        word = jnp.where((node < 0)[None, :], -1, word)
        return (word >> (node % WORD)[None, :]) & 1 != 0

    def step(block: Array, carry: tuple[Array, Array, Array], masked: bool) -> tuple[Array, Array, Array]:
        total, largest, weight_sum = carry
        key = block * config.block_k + jnp.arange(config.block_k)
        in_cache = (key < live)[:, None] if masked else None
        index = jnp.broadcast_to(slot, (1, 1)), key[:, None], jnp.broadcast_to(kv_head, (1, 1)), lane
        keys = plgpu.load(k_ref.at[index], mask=in_cache, other=0 if masked else None)
        scores = plgpu.dot(queries, keys, trans_b=True, precision=precision)
        if cap is not None:
            scores = cap * jnp.tanh(scores * (scale / cap))
        if masked and window is not None:
            scores = jnp.where(visible(key) & (key < live)[None, :] & (key[None, :] >= first_key), scores, MASKED)
        elif masked:
            scores = jnp.where(visible(key) & (key < live)[None, :], scores, MASKED)
        new_largest = jnp.maximum(largest, jnp.max(scores, axis=1))
        # a row that has seen no key keeps weights of zero
        anchor = jnp.where(new_largest == MASKED, 0.0, new_largest) * exponent
        weights = _exp2_of_sum(scores, exponent, -anchor[:, None], inline_asm=inline_asm)
        decay = jnp.exp2((largest - new_largest) * exponent)
        values = plgpu.load(v_ref.at[index], mask=in_cache, other=0 if masked else None)
        total = total * decay[:, None] + plgpu.dot(weights.astype(values.dtype), values, precision=precision)
        return total, new_largest, weight_sum * decay + jnp.sum(weights, axis=1)

    carry = (jnp.zeros((config.block_m, head_dim), jnp.float32), jnp.full((config.block_m,), MASKED, jnp.float32),
             jnp.zeros((config.block_m,), jnp.float32))
    if window is None:
        carry = jax.lax.fori_loop(first, committed, functools.partial(step, masked=False), carry)
    total, largest, weight_sum = jax.lax.fori_loop(committed, last, functools.partial(step, masked=True), carry)

    if config.splits == 1:
        out_ref, = refs
        out = total / jnp.where(weight_sum == 0, 1.0, weight_sum)[:, None]
        plgpu.store(out_ref.at[q_row, lane], out.astype(out_ref.dtype), mask=pair_mask)
        return
    total_ref, largest_ref, sum_ref = refs
    part = split * q_ref.shape[0] + q_row
    plgpu.store(total_ref.at[part, lane], total, mask=pair_mask & (first < last) if sequences > 1 else pair_mask)
    plgpu.store(largest_ref.at[part], (largest * exponent)[:, None], mask=pair_mask)
    plgpu.store(sum_ref.at[part], weight_sum[:, None], mask=pair_mask)


def _combine_body(total_ref, largest_ref, sum_ref, out_ref, *, splits: int, may_be_empty: bool):
    q_rows, head_dim = out_ref.shape
    q_row = pl.program_id(0)
    split = jnp.arange(launch.power_of_two(splits))
    mask = split < splits
    part = split * q_rows + q_row
    largest = plgpu.load(largest_ref.at[part], mask=mask, other=MASKED)
    decay = jnp.exp2(largest - jnp.max(largest))
    weight_sum = jnp.sum(decay * plgpu.load(sum_ref.at[part], mask=mask, other=0))
    lane = jnp.arange(head_dim)
    mask &= largest > MASKED / 1e6 if may_be_empty else True  # nothing else is as low, whatever the scale
    totals = plgpu.load(total_ref.at[part[:, None], lane[None, :]], mask=mask[:, None], other=0)
    total = jnp.sum(totals * decay[:, None], axis=0)
    plgpu.store(out_ref.at[q_row, lane], (total / jnp.where(weight_sum == 0, 1.0, weight_sum)).astype(out_ref.dtype))


@functools.partial(jax.jit, static_argnames=("tail", "scale", "window", "cap", "config", "interpret"))
def attention(q: Float[Array, "T Hq d"], k_cache: Float[Array, "B L Hkv d"], v_cache: Float[Array, "B L Hkv d"],
              lengths: Int32[Array, "N"], slots: Int32[Array, "N"] | None, mask_words: Int32[Array, "T W"] | None, *,
              tail: int, scale: float, window: int | None = None, cap: float | None = None, config: Config, interpret: bool
              ) -> Float[Array, "T Hq d"]:
    """See `api.tree_attention`, and `api.causal_attention` where `mask_words` is None; no slots are one sequence in the only
    one."""
    rows, heads, head_dim = q.shape
    kv_heads, sequences = k_cache.shape[2], len(lengths)
    each = rows // sequences
    flat = jax.ShapeDtypeStruct((rows * heads, head_dim), q.dtype)
    operands = [q.reshape(flat.shape), k_cache, v_cache, lengths]
    behind = None
    if window is not None and mask_words is not None:
        mask_words, behind = windowed(mask_words, tail, window)
    operands += [operand for operand in (mask_words, behind, slots) if operand is not None]
    parts = config.splits * rows * heads
    out_shape = [flat] if config.splits == 1 else [jax.ShapeDtypeStruct((parts, head_dim), jnp.float32),
                                                   jax.ShapeDtypeStruct((parts,), jnp.float32),
                                                   jax.ShapeDtypeStruct((parts,), jnp.float32)]
    body = functools.partial(_body, config=config, rows=each, tail=tail, tree=mask_words is not None,
                             is_slotted=slots is not None, scale=scale, window=window, cap=cap,
                             inline_asm=not interpret)
    out = launch.call(
        body, operands, out_shape=out_shape, num_warps=config.num_warps, num_stages=config.num_stages,
        grid=(pl.cdiv(each * heads // kv_heads, config.block_m), kv_heads, config.splits * sequences), interpret=interpret,
        name="attention")
    if config.splits > 1:
        out = launch.call(
            functools.partial(_combine_body, splits=config.splits, may_be_empty=sequences > 1), out, out_shape=[flat],
            grid=(rows * heads,), num_warps=1, num_stages=1, interpret=interpret, name="attention_combine")
    return out[0].reshape(q.shape)
