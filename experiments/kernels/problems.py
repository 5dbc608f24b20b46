"""What `tune` decides: for each key of a tuned table, the calls that its config serves and the configs to choose from."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from experiments.kernels import cases
from experiments.kernels.cases import Case, linears
from pallas_kernels import launch, transposed
from pallas_kernels.attention import api as attention
from pallas_kernels.attention import kernel as attention_kernel
from pallas_kernels.dense import api as dense
from pallas_kernels.dense import kernel as dense_kernel
from pallas_kernels.norm import api as norm
from pallas_kernels.norm import kernel as norm_kernel
from pallas_kernels.nucleus import api as nucleus
from pallas_kernels.nucleus import kernel as nucleus_kernel
from pallas_kernels.rope import api as rope
from pallas_kernels.rope import kernel as rope_kernel
from pallas_kernels.top_k import api as top_k
from pallas_kernels.top_k import kernel as top_k_kernel
from pallas_kernels.w4a8 import api as w4a8
from pallas_kernels.w4a8 import kernel as w4a8_kernel
from pallas_kernels.w4a16 import api as w4a16
from pallas_kernels.w4a16 import kernel as w4a16_kernel
from pallas_kernels.w8a8 import api as w8a8
from pallas_kernels.w8a8 import kernel as w8a8_kernel
from pallas_kernels.w8a16 import api as w8a16
from pallas_kernels.w8a16 import kernel as w8a16_kernel
from specmq_jax.network.config import LlamaConfig

_CONTEXTS = (512, 4096)
_SPLITS = 4  # partial sums that norm and rope read: what a split product usually leaves
_NORM_ROWS = (1, 64)  # its key knows no rows
_VOCABULARIES = (8192, 32000, 32768)  # frequency-ranked ones, and Llama 2's
_CUTS = (0, 0.9), (20, 0.95), (0, 1.0)  # top_k and top_p that models ask for, and none
_CUT_ROWS = (8, 60)  # its key knows no rows either
_TOP_K_ROWS, _TOP_K = (1, 10), (4, 10)  # the root of a draft tree and a level of it, at the papers' widths


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One decision.

    Attributes:
      op: the op's directory.
      keys: that the winning config is written under.
      cases: calls that it serves, each of equal weight.
      heuristic: the config that runs where the table has no such key.
      candidates: configs to try besides, in any order, some of which may not run.
    """

    op: str
    keys: tuple[str, ...]
    cases: tuple[Case, ...]
    heuristic: Any
    candidates: tuple[Any, ...]


def find(op: str, models: Iterable[LlamaConfig], rows: Sequence[int], group_sizes: Sequence[int]) -> list[Problem]:
    """The problems of `op`, one of each key, that a decoding step of any of the models poses.

    `rows` are the tokens of a step; `group_sizes` concern w4a16 alone. top_k, nucleus and norm meet rows of their own.
    """
    found = {}
    for model in models:
        for problem in OPS[op](model, sorted(rows), group_sizes):
            found.setdefault(problem.keys, problem)
    return list(found.values())


def _w4a16(model: LlamaConfig, rows: Sequence[int], group_sizes: Sequence[int]) -> Iterable[Problem]:
    for (name, (inner, columns)), group_size in itertools.product(linears(model).items(), group_sizes):
        result = "normed" if name in ("o", "down") else "consumed"
        for count in _largest(rows):
            yield Problem(
                op="w4a16", keys=(w4a16.tuning_key(count, inner, columns, group_size),),
                cases=(cases.product(count, inner, columns, group_size, result=result),),
                heuristic=w4a16_kernel.heuristic(count, inner, columns),
                candidates=tuple(w4a16_kernel.candidates(count, inner, columns)))


def _dense(model: LlamaConfig, rows: Sequence[int], group_sizes: Sequence[int]) -> Iterable[Problem]:
    largest = {dense.tuning_key(count, 1, 1): count for count in rows if count <= dense_kernel.MOST_ROWS}
    for (inner, columns), count in itertools.product(linears(model).values(), largest.values()):
        yield Problem(
            op="dense", keys=(dense.tuning_key(count, inner, columns),),
            cases=(cases.split_dense_product(count, inner, columns),),
            heuristic=dense_kernel.heuristic(inner, columns, jnp.float16),
            candidates=tuple(dense_kernel.candidates(count, inner, columns)))


def _w8a8(model: LlamaConfig, rows: Sequence[int], group_sizes: Sequence[int]) -> Iterable[Problem]:
    for (inner, columns), count in itertools.product(linears(model).values(), _largest(rows)):
        yield Problem(
            op="w8a8", keys=(w8a8.tuning_key(count, inner, columns),),
            cases=(cases.integer_product(count, inner, columns, "w8a8", result="consumed"),),
            heuristic=w8a8_kernel.heuristic(count, inner, columns),
            candidates=tuple(w8a8_kernel.candidates(count, inner, columns)))


def _w8a16(model: LlamaConfig, rows: Sequence[int], group_sizes: Sequence[int]) -> Iterable[Problem]:
    head = model.hidden_size, model.vocab_size  # which may have this format whatever the layers have
    for (inner, columns), count in itertools.product((*linears(model).values(), head), _largest(rows)):
        yield Problem(
            op="w8a16", keys=(w8a16.tuning_key(count, inner, columns),),
            cases=(cases.weight_only_product(count, inner, columns, result="consumed"),),
            heuristic=w8a16_kernel.heuristic(count, inner, columns),
            candidates=tuple(w8a16_kernel.candidates(count, inner, columns)))


def _w4a8(model: LlamaConfig, rows: Sequence[int], group_sizes: Sequence[int]) -> Iterable[Problem]:
    kinds = {"w4a8-qqq": ("channel", False), "w4a8-qoq": ("channel", True), "w4a8-qqq-g128": ("groups", False),
             "w4a8-qoq-g128": ("groups", True)}
    for (inner, columns), count, (kind, (scales, zeros)) in itertools.product(
            linears(model).values(), _largest(rows), kinds.items()):
        yield Problem(
            op="w4a8", keys=(w4a8.tuning_key(count, inner, columns, scales, zeros),),
            cases=(cases.integer_product(count, inner, columns, kind, result="consumed"),),
            heuristic=w4a8_kernel.heuristic(count, inner, columns),
            candidates=tuple(w4a8_kernel.candidates(count, inner, columns)))


def _largest(rows: Sequence[int]) -> list[int]:
    """Of the rows that share a product's config, the most."""
    return list({transposed.tuned_rows(count): count for count in rows if count <= transposed.MAX_ROWS}.values())


def _attention(model: LlamaConfig, rows: Sequence[int], group_sizes: Sequence[int]) -> Iterable[Problem]:
    heads, kv_heads, head_dim = model.num_heads, model.num_kv_heads, model.head_dim
    largest_context = max(_CONTEXTS)
    for count in rows:
        pairs = count * heads // kv_heads
        grid = _grid(attention_kernel.Config, block_m=(16, 32, 64), block_k=(32, 64, 128), splits=(1, 2, 4, 5, 8, 10, 16, 32),
                     num_warps=(2, 4, 8), num_stages=(1, 2, 3))
        fitting = [config for config in grid if config.block_m <= max(16, launch.power_of_two(pairs))]

        def programs(config, pairs=pairs) -> int:
            return -(-pairs // config.block_m) * kv_heads * config.splits

        # both half precisions move the same bytes and multiply at the same rate
        keys = (attention.tuning_key(count, heads, kv_heads, head_dim, dtype) for dtype in (jnp.float16, jnp.bfloat16))
        yield Problem(
            op="attention", keys=tuple(keys),
            cases=tuple(cases.tree_attention(count, model, context, max_length=largest_context) for context in _CONTEXTS),
            heuristic=attention_kernel.heuristic(count, heads, kv_heads, largest_context, jnp.float16),
            candidates=tuple(_filling(fitting, programs, 64, 2112)))


def _top_k(model: LlamaConfig, rows: Sequence[int], group_sizes: Sequence[int]) -> Iterable[Problem]:
    for vocab, count, k in itertools.product((model.vocab_size, *_VOCABULARIES), _TOP_K_ROWS, _TOP_K):
        grid = _grid(top_k_kernel.Config, block=(512, 1024, 2048, 4096, 8192), num_warps=(1, 2, 4, 8),
                     combine_warps=(1, 2, 4, 8))
        yield Problem(
            op="top_k", keys=(top_k.tuning_key(count, vocab, k),), cases=(cases.best_of_vocabulary(count, vocab, k),),
            heuristic=top_k_kernel.heuristic(count, vocab, k),
            candidates=tuple(config for config in grid if k <= config.block <= launch.power_of_two(vocab)))


def _nucleus(model: LlamaConfig, rows: Sequence[int], group_sizes: Sequence[int]) -> Iterable[Problem]:
    vocab = model.vocab_size
    grid = _grid(nucleus_kernel.Config, block=(1024, 2048, 4096, 8192), num_warps=(4, 8, 16), launches=(3, 4, 5, 6, 7),
                 ways=(8, 16), last_block=(4096, 8192, 16384), last_warps=(16,))
    yield Problem(
        op="nucleus", keys=(nucleus.tuning_key(vocab),),
        cases=tuple(cases.cut_of_vocabulary(count, vocab, k, p) for count in _CUT_ROWS for k, p in _CUTS),
        heuristic=nucleus_kernel.heuristic(vocab), candidates=tuple(grid))


def _norm(model: LlamaConfig, rows: Sequence[int], group_sizes: Sequence[int]) -> Iterable[Problem]:
    yield Problem(
        op="norm", keys=(norm.tuning_key(model.hidden_size),),
        cases=tuple(cases.add_norm(count, model.hidden_size, _SPLITS) for count in _NORM_ROWS),
        heuristic=norm_kernel.heuristic(model.hidden_size),
        candidates=tuple(_grid(norm_kernel.Config, num_warps=(1, 2, 4, 8, 16))))


def _rope(model: LlamaConfig, rows: Sequence[int], group_sizes: Sequence[int]) -> Iterable[Problem]:
    for count in rows:
        yield Problem(
            op="rope", keys=(rope.tuning_key(count, model.num_heads, model.num_kv_heads, model.head_dim),),
            cases=(cases.rope_append(count, model, _SPLITS),), heuristic=rope_kernel.heuristic(count),
            candidates=tuple(_grid(rope_kernel.Config, rows=(1, 2, 4, 16), num_warps=(1, 2, 4))))


def _grid(config: type, **fields: Sequence[int | bool]) -> list[Any]:
    """A config for every combination of the fields' values."""
    return [config(**dict(zip(fields, values, strict=True))) for values in itertools.product(*fields.values())]


def _filling(configs: Sequence[Any], programs: Callable[[Any], int], least: int, most: int) -> list[Any]:
    """Configs that start `least` to `most` programs; where a problem is too small for that, those that start the most."""
    least = min(least, max(map(programs, configs)))
    return [config for config in configs if least <= programs(config) <= most]


OPS: Mapping[str, Callable[[LlamaConfig, Sequence[int], Sequence[int]], Iterable[Problem]]] = {
    "w4a16": _w4a16, "dense": _dense, "w8a8": _w8a8, "w8a16": _w8a16, "w4a8": _w4a8, "attention": _attention, "top_k": _top_k,
    "nucleus": _nucleus, "norm": _norm, "rope": _rope}
