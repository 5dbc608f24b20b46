"""Device memory that decoding takes, worked out from shapes before anything is loaded."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from specmq_jax.decoding.config import DecodeConfig
from specmq_jax.decoding.decode import cache_bytes, cache_rows, prefill_chunks
from specmq_jax.decoding.drafters import ChainDrafter, Drafter, EagleDrafter, HierarchicalDrafter, NoDrafter
from specmq_jax.decoding.sampling import Greedy
from specmq_jax.formats import DenseFormat, WeightFormat
from specmq_jax.loading.memory import Plan, tree_bytes
from specmq_jax.loading.model import Model, Outline, check_positions
from specmq_jax.network.config import LlamaConfig

_KERNEL_ROWS = 64
"""Rows that every quantised format has a kernel for on a GPU, which neither expands a weight nor is timed by the compiler."""


def plan(target: Model, drafters: Sequence[Drafter], config: DecodeConfig, *, slots: int = 1) -> Plan:
    """What decoding with one drafter after another holds where it holds most.

    All weights are held throughout, each array once however many share it; caches, those of one drafter at a time.

    Args:
      target: a model, or its outline.
      drafters: made of models and heads, or of their outlines.
      config: of every decoder.
      slots: sequences that are decoded side by side.

    Raises:
      UserError: a drafter that can't draft for this target, or a cache longer than a model's positions.
    """
    check_positions(config.max_len, target.config)
    for drafter in drafters:
        drafter.check(target.config, max_len=config.max_len)
    small = [drafter.model for drafter in drafters if isinstance(drafter, ChainDrafter | HierarchicalDrafter)]
    models = [model.params for model in (target, *small)]
    targets, both = tree_bytes(target.params), tree_bytes(models)
    everything = tree_bytes(models, [drafter.params for drafter in drafters])
    caches, working = max(((slots * cache_bytes(target, drafter, cache_rows(config, drafter)),
                            working_bytes(target, drafter, config, slots=slots)) for drafter in drafters), key=sum)
    loading = max(_loading_bytes(target, drafter) for drafter in drafters)
    return Plan({"target": targets, "draft model": both - targets, "EAGLE heads": everything - both, "caches": caches,
                 "working memory": max(working, loading - caches)})


def working_bytes(target: Model, drafter: Drafter, config: DecodeConfig, *, slots: int = 1) -> int:
    """Bytes beside weights and caches: the features of a whole prompt, which wait for the drafter, and the largest of

    - a pass over the longest chunk of a prompt (`pass_bytes`),
    - a pass over the nodes of a draft, or of one a slot, with its scores, of which sampling holds four forms (raw, scaled,
      sorted, with noise),
    - on a GPU, what the compiler takes to time a product (`timing_bytes`); it does so when the caches are there already.

    All three are those of whichever network, of the target's and the drafter's, takes most.
    """
    width = target.config.hidden_size * max(1, len(drafter.capture))
    dtype = jnp.dtype(jnp.float32) if drafter.capture else target.module.format.dtype
    features = cache_rows(config, drafter) * width * dtype.itemsize
    forms = 1 if isinstance(config.sampling, Greedy) else 4
    chunk, found = prefill_chunks(config)[-1], 0
    for network in _networks(target, drafter):
        layer, rows = network.layer, slots * network.scored
        scores = 4 * forms * rows * layer.vocab_size + _expanded(network.head, layer.hidden_size, layer.vocab_size, rows)
        found = max(found, pass_bytes(layer, network.linear, chunk), pass_bytes(layer, network.linear, rows) + scores)
        if jax.default_backend() == "gpu":
            found = max(found, timing_bytes(network.linear, layer.hidden_size, 2 * layer.intermediate_size, chunk),
                        timing_bytes(network.head, layer.hidden_size, layer.vocab_size, rows))
    return features + found


def pass_bytes(layer: LlamaConfig, linear: WeightFormat, rows: int) -> int:
    """Bytes of scratch that a pass takes at its widest, in the MLP; the number of layers has no part in it.

    Gate and up and the residual stream in f32, the gated product in the activations' dtype, and quantised weights of gate
    and up expanded to that dtype, which more rows are multiplied by than a kernel takes. XLA's own figures for an H200
    and chunks of 2048 rows, with this one's: Llama-3-8B 0.50 GB (0.56) at w4a16, 0.39 (0.56) at w8a8, 0.33 (0.33) at fp16;
    Llama-3-70B 1.48 (1.59) at w4a16.
    """
    wide, size = 2 * layer.intermediate_size, linear.dtype.itemsize
    activations = rows * (4 * (wide + layer.hidden_size) + size * layer.intermediate_size)
    return activations + _expanded(linear, layer.hidden_size, wide, rows)


def timing_bytes(weight_format: WeightFormat, inner: int, columns: int, rows: int) -> int:
    """Bytes that XLA's autotuner takes for a product of [rows, inner] and [inner, columns]: operands of its own, the result
    of the kernel that it times, and that of the one it compares with; 0 where a kernel of ours makes the product."""
    if not isinstance(weight_format, DenseFormat) and rows <= _KERNEL_ROWS:
        return 0
    return weight_format.dtype.itemsize * inner * (rows + columns) + 2 * 4 * rows * columns


def _expanded(weight_format: WeightFormat, inner: int, columns: int, rows: int) -> int:
    as_it_is = isinstance(weight_format, DenseFormat) or (jax.default_backend() == "gpu" and rows <= _KERNEL_ROWS)
    return 0 if as_it_is else weight_format.dtype.itemsize * inner * columns


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Network:
    """A target's, a draft model's or a head's layers: sizes, formats of layers and lm_head, and rows it scores at once."""

    layer: LlamaConfig
    linear: WeightFormat
    head: WeightFormat
    scored: int


def _networks(target: Model, drafter: Drafter) -> Iterator[_Network]:
    module = target.module
    yield _Network(layer=target.config, linear=module.format, scored=drafter.tree_size,
                   head=module.embed_format if target.config.tie_embeddings else module.head_format)
    match drafter:
        case ChainDrafter():
            yield from _networks(drafter.model, NoDrafter())
        case HierarchicalDrafter():
            yield from _networks(drafter.model, drafter.inner)
        case EagleDrafter():
            head = drafter.head
            yield _Network(layer=head.config.layer, linear=head.module.format, scored=drafter.tree.top_k,
                           head=head.module.embed_format if head.config.tied_head else head.module.head_format)


def _loading_bytes(target: Model, drafter: Drafter) -> int:
    """What making the models, or the heads' widest weight, takes; then there are no caches yet."""
    inner = drafter.inner if isinstance(drafter, HierarchicalDrafter) else drafter
    models = [target, *([drafter.model] if isinstance(drafter, ChainDrafter | HierarchicalDrafter) else [])]
    found = [model.making_bytes for model in models if isinstance(model, Outline)]
    if isinstance(inner, EagleDrafter):
        layer = inner.head.config.layer
        found.append(2 * 4 * layer.hidden_size * 2 * layer.intermediate_size)  # as stored, at most f32, and being packed
    return max(found, default=0)
