"""Single calls of the ops at a model's sizes, to be timed or compared: what goes in, what comes out, how many bytes move.

Activations are f16, and what an op reads of them lies in the L2 cache, where the op before has just left it. Weights and
the key-value cache are read cold.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import attention, dense, keep, mlp, norm, nucleus, rope, top_k, w4a8, w4a16, w8a8, w8a16
from pallas_kernels.partials import add_up
from specmq_jax.network.config import LlamaConfig
from specmq_jax.network.parameters import parameter_shapes
from specmq_jax.words import count

_CACHE_BLOCK = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call of an op.

    Attributes:
      label: the sizes in words, without the rows.
      rows: tokens that the call processes.
      traffic: bytes that it moves at least, each read or written once.
      make: from a random key to the operands.
      run: from a config (None is the op's own choice), an implementation and the operands to the results.
      cold: operands that come from memory.
      cold_bytes: of `traffic`, those of the cold operands.
      carried: operand i, updated in place, comes out as result carried[i].
    """

    label: str
    rows: int
    traffic: int
    make: Callable[[Array], tuple[Array, ...]]
    run: Callable[..., Sequence[Array]]
    cold: tuple[int, ...] = ()
    cold_bytes: int = 0
    carried: Mapping[int, int] = dataclasses.field(default_factory=dict)

    def step(self, config: Any, implementation: str | None) -> Callable[..., Sequence[Array]]:
        """The call, from operands to results."""
        return functools.partial(self.run, config, implementation)

    def operands(self, copies: int) -> list[tuple[Array, ...]]:
        """Sets of random operands, which share what is not cold."""
        return self._sets(copies, lambda seed: self.make(jax.random.key(seed)))

    def abstract_operands(self, copies: int) -> list[tuple[jax.ShapeDtypeStruct, ...]]:
        """`operands` without their values, which suffices to compile."""
        shapes = jax.eval_shape(self.make, jax.random.key(0))
        return self._sets(copies, lambda seed: tuple(jax.ShapeDtypeStruct(each.shape, each.dtype) for each in shapes))

    def _sets(self, copies: int, make: Callable[[int], tuple]) -> list[tuple]:
        sets = [make(seed) for seed in range(copies if self.cold else 1)]
        shared = {index: operand for index, operand in enumerate(sets[0]) if index not in self.cold}
        sets = [tuple(shared.get(index, operand) for index, operand in enumerate(operands)) for operands in sets]
        return sets if self.cold else sets * copies


def linears(model: LlamaConfig) -> Mapping[str, tuple[int, int]]:
    """K and N of a layer's products, fused as the model fuses them."""
    shapes = parameter_shapes(model.as_llama(num_layers=1))
    paths = {"qkv": "attention/qkv", "o": "attention/o", "gate_up": "mlp/gate_up", "down": "mlp/down"}
    return {name: shapes[f"layers_0/{path}/w"] for name, path in paths.items()}


def product(rows: int, inner: int, columns: int, group_size: int, *, result: str) -> Case:
    """A W4A16 product of f16 rows.

    `result` says what is made of it: "partials", as a model takes them; "product", f16 [M, N]; "consumed", f16 [M, N]
    behind one elementwise launch that adds the partial sums up; or "normed", behind the residual addition before a
    norm. The last two make more sums cost what they cost a model.
    """
    groups = 1 if group_size == -1 else -(-inner // group_size)
    shape = w4a16.packed_shape(inner, columns)

    def make(key: Array):
        of_x, of_packed, of_scales = jax.random.split(key, 3)
        packed = jax.random.bits(of_packed, shape, jnp.uint32).view(jnp.int32)
        scales = jax.random.normal(of_scales, (groups, columns)) * 0.02
        scales = scales if group_size == -1 else w4a16.pack_scales(scales)
        return jax.random.normal(of_x, (rows, inner), jnp.float16), packed, scales

    def run(config, implementation, x, packed, scales):
        options = {"group_size": group_size, "config": config, "implementation": implementation}
        if result == "product":
            return (w4a16.matmul(x, packed, scales, **options),)
        partials = w4a16.matmul_partials(x, packed, scales, halves=result != "partials", **options)
        if result == "normed":
            # what is left to the norm's readers is not the same in its implementations
            total, *_ = norm.add_rms_norm_deferred(
                jnp.zeros(partials.shape[1:], jnp.float32), partials, jnp.ones(columns, jnp.float32), eps=1e-5,
                out_dtype=x.dtype, implementation=implementation)
            return (total,)
        # the factor keeps the launch where there is nothing to add
        return (partials if result == "partials" else (add_up(partials) * 0.5).astype(x.dtype),)

    cold_bytes = 4 * (math.prod(shape) + math.prod(w4a16.scales_shape(inner, columns, group_size).shape))
    return Case(label=f"{inner} -> {columns}" + (f" g{group_size}" if group_size != -1 else ""), rows=rows, make=make,
                run=run, traffic=cold_bytes + 2 * rows * (inner + columns), cold=(1, 2), cold_bytes=cold_bytes)


INTEGER_KINDS = ("w8a8", "w4a8-qqq", "w4a8-qqq-g128", "w4a8-qoq", "w4a8-qoq-g128")
"""The formats whose products are of 8-bit integers."""


def integer_product(rows: int, inner: int, columns: int, kind: str, *, result: str) -> Case:
    """A product of f16 rows rounded to 8 bits, their rounding left out, with weights of one of `INTEGER_KINDS`.

    `result` is "partials" or "consumed", as in `product`.
    """
    bits, zeros, grouped = 8 if kind == "w8a8" else 4, "qoq" in kind, kind.endswith("-g128")
    groups = -(-inner // w4a8.BLOCK)

    def make(key: Array):
        of_x, of_weights, of_scales = jax.random.split(key, 3)
        rows_and_sums = w8a8.quantise_rows(jax.random.normal(of_x, (rows, inner)), sums=w4a8.BLOCK if grouped else -1,
                                           implementation="reference")
        scales = jax.random.uniform(of_scales, (columns,), minval=0.01, maxval=0.02)
        shape = (columns, inner) if bits == 8 else w4a8.packed_shape(columns, inner)
        packed = jax.random.bits(of_weights, shape, jnp.uint8)
        if bits == 8:
            return *rows_and_sums, packed.view(jnp.int8), scales
        if not grouped:
            return *rows_and_sums, packed, scales, scales * 7
        group_scales = jax.random.randint(of_scales, (groups, columns), 4, 16)
        words = w4a8.pack_groups(group_scales.astype(jnp.uint8 if zeros else jnp.float16), group_scales * -7 if zeros else None)
        return *rows_and_sums, packed, words, scales

    def run(config, implementation, codes, row_scales, sums, weights, *others):
        options = {"halves": True, "config": config, "implementation": implementation}
        if bits == 8:
            partials = w8a8.matmul_partials(codes, row_scales, weights, *others, **options)
        elif grouped:
            saturates = None if zeros else jnp.zeros(1, jnp.int32)
            partials = w4a8.group_partials(codes, row_scales, sums, weights, *others, saturates, **options)
        else:
            scales, offsets = others
            partials = w4a8.channel_partials(codes, row_scales, sums, weights, scales, offsets if zeros else None, **options)
        return (partials if result == "partials" else (add_up(partials) * 0.5).astype(jnp.float16),)

    cold_bytes = columns * (inner * bits // 8 + 4 + grouped * groups * 4)
    return Case(label=f"{inner} -> {columns} {kind}", rows=rows, make=make, run=run, cold=(3, 4),
                traffic=cold_bytes + rows * (inner + 2 * columns), cold_bytes=cold_bytes)


def weight_only_product(rows: int, inner: int, columns: int, *, result: str) -> Case:
    """A product of f16 rows with 8-bit weights; `result` is "partials" or "consumed", as in `product`."""

    def make(key: Array):
        of_x, of_values, of_scales = jax.random.split(key, 3)
        values = jax.random.bits(of_values, (columns, inner), jnp.uint8).view(jnp.int8)
        return (jax.random.normal(of_x, (rows, inner), jnp.float16), values,
                jax.random.uniform(of_scales, (columns,), minval=1e-3, maxval=2e-3))

    def run(config, implementation, x, values, scales):
        partials = w8a16.matmul_partials(x, values, scales, config=config, implementation=implementation)
        return (partials if result == "partials" else (add_up(partials) * 0.5).astype(x.dtype),)

    cold_bytes = columns * (inner + 4)
    return Case(label=f"{inner} -> {columns}", rows=rows, make=make, run=run, cold=(1, 2),
                traffic=cold_bytes + 2 * rows * (inner + columns), cold_bytes=cold_bytes)


def dense_product(rows: int, inner: int, columns: int) -> Case:
    """XLA's own product of f16 rows and f16 weights."""

    def make(key: Array):
        of_x, of_weights = jax.random.split(key)
        weights = jax.random.normal(of_weights, (inner, columns), jnp.float16)
        return jax.random.normal(of_x, (rows, inner), jnp.float16), weights

    return Case(label=f"{inner} -> {columns}", rows=rows, make=make, run=lambda config, implementation, x, w: (x @ w,),
                traffic=2 * (inner * columns + rows * (inner + columns)), cold=(1,), cold_bytes=2 * inner * columns)


def split_dense_product(rows: int, inner: int, columns: int) -> Case:
    """Our product of f16 rows and f16 weights, behind one elementwise launch that adds its partial sums up."""

    def run(config, implementation, x, weights):
        partials = dense.matmul_partials(x, weights, config=config, implementation=implementation)
        return ((add_up(partials) * 0.5).astype(x.dtype),)

    return dataclasses.replace(dense_product(rows, inner, columns), run=run)


def tree_attention(rows: int, model: LlamaConfig, context: int, *, max_length: int | None = None) -> Case:
    """Attention of a chain of `rows` behind `context` keys, in a cache of `max_length` rows (default: just enough)."""
    heads, kv_heads, head_dim = model.num_heads, model.num_kv_heads, model.head_dim
    cache_rows = -(-((max_length or context) + rows) // _CACHE_BLOCK) * _CACHE_BLOCK

    def make(key: Array):
        keys = jax.random.split(key, 3)
        q = jax.random.normal(keys[0], (rows, heads, head_dim), jnp.float16)
        k_cache, v_cache = (jax.random.normal(key, (cache_rows, kv_heads, head_dim), jnp.float16) for key in keys[1:])
        return q, k_cache, v_cache, jnp.int32(context), attention.pack_mask(jnp.tri(rows, dtype=bool))

    def run(config, implementation, *operands):
        return (attention.tree_attention(*operands, config=config, implementation=implementation),)

    cold_bytes = 4 * (context + rows) * kv_heads * head_dim
    return Case(label=f"{heads}/{kv_heads}x{head_dim} context {context}", rows=rows, make=make, run=run, cold=(1, 2),
                traffic=cold_bytes + 4 * rows * heads * head_dim, cold_bytes=cold_bytes)


def add_norm(rows: int, columns: int, splits: int) -> Case:
    """The residual addition of `splits` partial sums, with RMSNorm."""

    def make(key: Array):
        keys = jax.random.split(key, 3)
        return (jax.random.normal(keys[0], (rows, columns)), jax.random.normal(keys[1], (splits, rows, columns)),
                jax.random.normal(keys[2], (columns,)))

    def run(config, implementation, *operands):
        return norm.add_rms_norm(*operands, eps=1e-5, out_dtype=jnp.float16, config=config, implementation=implementation)

    return Case(label=f"{columns} of {count(splits, 'sum')}", rows=rows, make=make, run=run,
                traffic=rows * columns * (4 + 4 * splits + 4 + 2) + 4 * columns)


def rounded_add_norm(rows: int, columns: int, splits: int) -> Case:
    """The residual addition of `splits` partial sums in f16, with RMSNorm, and the rounding of what comes out to 8 bits."""

    def make(key: Array):
        residual, partials, weight = add_norm(rows, columns, splits).make(key)
        return residual, partials.astype(jnp.float16), weight

    def run(config, implementation, *operands):
        total, values, scale, peaks = norm.add_rms_norm_deferred(
            *operands, eps=1e-5, out_dtype=jnp.float16, with_peaks=True, implementation=implementation)
        # the factor is what the readers of the products owe
        owed = () if scale is None else (scale.squares,)
        return (total, *w8a8.quantise_rows(values, peaks=peaks, implementation=implementation), *owed)

    return Case(label=f"{columns} of {count(splits, 'sum')}", rows=rows, make=make, run=run,
                traffic=rows * columns * (4 + 2 * splits + 4 + 1) + 4 * columns)


def rope_append(rows: int, model: LlamaConfig, splits: int) -> Case:
    """The rotary embedding of `splits` partial sums of q|k|v, and the append to a cache of 4096 rows."""
    heads, kv_heads, head_dim = model.num_heads, model.num_kv_heads, model.head_dim
    features = (heads + 2 * kv_heads) * head_dim

    def make(key: Array):
        of_qkv, of_angles = jax.random.split(key)
        angles = jax.random.uniform(of_angles, (rows, head_dim // 2))
        cache = jnp.zeros((4096, kv_heads, head_dim), jnp.float16)
        return (jax.random.normal(of_qkv, (splits, rows, features)), jnp.cos(angles), jnp.sin(angles), cache, cache + 0,
                jnp.int32(512))

    def run(config, implementation, *operands):
        return rope.rope_append(*operands, heads=heads, kv_heads=kv_heads, head_dim=head_dim, config=config,
                                implementation=implementation)

    return Case(label=f"{heads}/{kv_heads}x{head_dim} of {count(splits, 'sum')}", rows=rows, make=make, run=run,
                traffic=rows * features * (4 * splits + 2) + 4 * rows * head_dim, carried={3: 1, 4: 2})


def keep_path(sequences: int, model: LlamaConfig) -> Case:
    """What stays of a tree of 60 nodes and 6 levels below its root, of which 3 are accepted, in the caches of a model's layers,
    of 32 at most; a cache has 512 rows and a slot for each sequence."""
    kept, levels, nodes = 4, 7, 60
    shape = sequences, 512, model.num_kv_heads, model.head_dim
    layers = min(32, model.num_layers)  # of more a loop over calls would take minutes to compile

    def make(key: Array):
        of_paths, of_lengths = jax.random.split(key)
        below = jax.vmap(lambda key: jnp.sort(jax.random.choice(key, nodes - 1, (levels - 1,), replace=False)) + 1)
        paths = jnp.pad(below(jax.random.split(of_paths, sequences)), ((0, 0), (1, 0))).astype(jnp.int32)
        lengths = jax.random.randint(of_lengths, (sequences,), 0, 512 - nodes)
        caches = (jnp.zeros(shape, jnp.float16) for _ in range(2 * layers))
        return paths, jnp.full(sequences, kept, jnp.int32), lengths, jnp.arange(sequences, dtype=jnp.int32), *caches

    def run(config, implementation, paths, counts, lengths, slots, *caches):
        return keep.keep_path(caches, paths, counts, lengths, slots=slots, config=config, implementation=implementation)

    moved = sequences * (kept - 1) * model.num_kv_heads * model.head_dim * 2 * layers
    return Case(label=f"{model.num_kv_heads}x{model.head_dim} of {count(layers, 'layer')}", rows=sequences, make=make, run=run,
                traffic=2 * 2 * moved, carried={4 + i: i for i in range(2 * layers)})


def silu_mul(rows: int, intermediate: int, splits: int) -> Case:
    """The gated activation of `splits` partial sums."""

    def make(key: Array):
        return (jax.random.normal(key, (splits, rows, 2 * intermediate)),)

    return Case(label=f"{intermediate} of {count(splits, 'sum')}", rows=rows, make=make,
                run=lambda config, implementation, gate_up: (mlp.silu_mul(gate_up, out_dtype=jnp.float16)[0],),
                traffic=rows * intermediate * (8 * splits + 2))


def rounded_silu_mul(rows: int, intermediate: int, splits: int) -> Case:
    """The gated activation of `splits` partial sums in f16, and the rounding of what comes out to 8 bits."""

    def make(key: Array):
        return (jax.random.normal(key, (splits, rows, 2 * intermediate), jnp.float16),)

    def run(config, implementation, gate_up):
        values, peaks = mlp.silu_mul(gate_up, out_dtype=jnp.float16, with_peaks=True, implementation=implementation)
        return w8a8.quantise_rows(values, peaks=peaks, implementation=implementation)

    return Case(label=f"{intermediate} of {count(splits, 'sum')}", rows=rows, make=make, run=run,
                traffic=rows * intermediate * (4 * splits + 1))


def best_of_vocabulary(rows: int, vocab: int, k: int) -> Case:
    """The k likeliest tokens of f32 logits."""

    def make(key: Array):
        return (jax.random.normal(key, (rows, vocab)),)

    def run(config, implementation, logits):
        return top_k.log_softmax_top_k(logits, k, config=config, implementation=implementation)

    return Case(label=f"{k} of {vocab}", rows=rows, make=make, run=run, traffic=4 * rows * vocab + 8 * rows * k)


def cut_of_vocabulary(rows: int, vocab: int, k: int, p: float) -> Case:
    """Where top-k and top-p cut f32 scores of a normal distribution, 0 and 1 nowhere; how many stay is counted behind it."""

    def make(key: Array):
        scores = 2 * jax.random.normal(key, (rows, vocab))
        return (scores - jnp.max(scores, axis=1, keepdims=True), jnp.full(rows, k, jnp.int32), jnp.full(rows, p, jnp.float32))

    def run(config, implementation, *operands):
        least = nucleus.least_kept(*operands, config=config, implementation=implementation)
        return (jnp.sum(operands[0] >= least[:, None], axis=1, dtype=jnp.float32),)

    return Case(label=f"top_k {k}, top_p {p:g} of {vocab}", rows=rows, make=make, run=run, traffic=4 * rows * vocab)
