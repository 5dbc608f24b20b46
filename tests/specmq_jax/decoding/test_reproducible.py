"""What `DecodeConfig(reproducible=True)` promises: on a GPU bits, everywhere the plain output."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import DATA, OracleDrafter, expanded, tiny_config

import specmq_jax as sm
from pallas_kernels.norm import api as norm_kernels
from specmq_jax.decoding.tree import DraftTree

from_parents = jax.jit(DraftTree.from_parents, static_argnames="max_depth")
TREE = sm.TreeConfig(depth=2, top_k=3, size=6)
CONFIG = sm.DecodeConfig(max_len=256, prefill_chunks=(32,), reproducible=True)
LENGTHS = (62, 63, 64, 65, 66, 126, 127, 128, 129, 130, 500)
PATH = 7
"""Nodes of the accepted path, the root counted."""


def prompt(seed, length):
    return np.random.default_rng(seed).integers(0, 61, length).tolist()


@pytest.fixture(scope="module")
def plain():
    """Of a head's version: its target and what plain decoding makes of each prompt, the ordinary one's tokens on a CPU."""
    @functools.cache
    def made(version):
        target = sm.load(DATA / "eagle" / "eagle3_base" if version == 3 else DATA / "checkpoints" / "fp16")
        config = CONFIG if jax.default_backend() == "gpu" else dataclasses.replace(CONFIG, reproducible=False)
        tokens = [[decoder.generate(prompt(seed, length), 20).tokens.tolist() for seed, length in enumerate((1, 30, 70))]
                  for decoder in (sm.Decoder(target, config=CONFIG), sm.Decoder(target, config=config))]
        assert tokens[0] == tokens[1]
        return target, tokens[0]
    return made


@pytest.mark.parametrize("method", ["chain", "eagle2", pytest.param("eagle3", marks=pytest.mark.slow), "hierarchical"])
def test_every_method_gives_the_plain_output(plain, method):
    version = 3 if method == "eagle3" else 2
    target, expected = plain(version)
    if method == "chain":
        drafter = sm.ChainDrafter(target.with_precision("w4a16-g64"), 3)
    else:
        drafter = sm.EagleDrafter(sm.load_head(DATA / "eagle" / f"eagle{version}_head", target), TREE)
        if method == "hierarchical":
            drafter = sm.HierarchicalDrafter(target, drafter, 2)
    decoder = sm.Decoder(target, drafter, CONFIG)
    for seed, (length, tokens) in enumerate(zip((1, 30, 70), expected, strict=True)):
        assert decoder.generate(prompt(seed, length), 20).tokens.tolist() == tokens


def test_a_branching_tree_gives_the_plain_output(tiny):
    plain = sm.Decoder(tiny, config=CONFIG)
    expected = plain.generate(prompt(0, 9), 30).tokens
    drafter = OracleDrafter.random(np.concatenate([prompt(0, 9), expected]), size=60, vocab=61, skill=0.9, seed=1)
    found = sm.Decoder(tiny, drafter, CONFIG).generate(prompt(0, 9), 30)
    assert found.tokens.tolist() == expected.tolist() and found.accept_lengths.max() > 2


def test_a_tree_too_large_to_be_reproducible_is_refused(tiny):
    with pytest.raises(sm.UserError, match="verifies at most 64 nodes a round, and this drafter's trees have 65"):
        sm.Decoder(tiny, sm.ChainDrafter(tiny, 64), CONFIG)
    sm.Decoder(tiny, sm.ChainDrafter(tiny, 63), CONFIG)


class Target:
    """A random model, and its states and logits behind committed rows."""

    def __init__(self, precision, **sizes):
        self.model = self.loaded(precision, **sizes)
        self.vocab = self.model.config.vocab_size
        self.module = self.model.module.clone(reproducible=True)
        self.prefill, self.run = jax.jit(self.module.apply), jax.jit(self._run)
        self.keep = jax.jit(lambda cache, path: cache.keep(path, jnp.int32(len(path)), in_place=False))

    def loaded(self, precision, **sizes):
        return sm.random_model(tiny_config(vocab_size=512, max_position=1024, **sizes), precision, seed=4)

    def _run(self, params, cache, tree):
        hidden, _, cache = self.module.apply(params, tree.tokens, cache, tree.depth, tree.mask)
        return self.module.apply(params, hidden, method="logits"), cache

    def committed(self, tokens, length):
        _, _, cache = self.prefill(self.model.params, jnp.asarray(tokens), self.model.new_cache(1024))
        return cache.rewind(length)

    def logits(self, cache, tree):
        logits, cache = self.run(self.model.params, cache, tree)
        return np.asarray(logits), cache


def tree_around(path_tokens, size, vocab, rng):
    """A tree of so many nodes with those tokens on one path, and the path's nodes."""
    nodes = [0, *sorted(rng.choice(np.arange(1, size), PATH - 1, replace=False).tolist())]
    parent, tokens = np.zeros(size, np.int32), rng.integers(0, vocab, size).astype(np.int32)
    for i in range(1, size):
        parent[i] = nodes[nodes.index(i) - 1] if i in nodes else rng.integers(max(0, i - 5), i)
    tokens[nodes] = path_tokens
    return from_parents(jnp.asarray(tokens), jnp.asarray(parent), max_depth=size - 1), nodes


def check_bits(target, lengths):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, target.vocab, 512).astype(np.int32)
    for length in lengths:
        path = jnp.asarray(rng.integers(0, target.vocab, PATH + 1), jnp.int32)
        start = functools.partial(target.committed, tokens, length)
        plain, cache = [], start()
        for token in path:
            logits, cache = target.logits(cache, DraftTree.chain(token[None]))
            plain.append(logits[0])
            cache = cache.rewind(cache.length + 1)
        chain, _ = target.logits(start(), DraftTree.chain(path[:PATH]))
        np.testing.assert_array_equal(chain, plain[:PATH], err_msg=f"chain behind {length} rows")
        for size in (16, 30, 60):
            tree, nodes = tree_around(path[:PATH], size, target.vocab, rng)
            logits, cache = target.logits(start(), tree)
            np.testing.assert_array_equal(logits[nodes], plain[:PATH], err_msg=f"tree of {size} behind {length} rows")
            following, _ = target.logits(target.keep(cache, jnp.asarray(nodes)), DraftTree.chain(path[PATH:]))
            np.testing.assert_array_equal(following[0], plain[PATH], err_msg=f"behind the path of a tree of {size}")


DEMO = dict(hidden_size=576, intermediate_size=1536, num_heads=9, num_kv_heads=3, head_dim=64, tie_embeddings=True)
LLAMA_8B = dict(hidden_size=4096, intermediate_size=14336, num_heads=32, num_kv_heads=8, head_dim=128)


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "sizes"), [
    *((precision, DEMO) for precision in ("fp16", "bf16", "fp32", "w4a16-g64")),
    *((precision, DEMO) for precision in ("w8a8", "w4a8-qqq", "w4a8-qqq-g128", "w4a8-qoq", "w4a8-qoq-g128")),
    *((precision, LLAMA_8B) for precision in ("fp16", "w4a16", "w4a16-channel", "w8a8", "w4a8-qqq-g128"))],
    ids=lambda value: value if isinstance(value, str) else str(value["hidden_size"]))
def test_a_nodes_logits_have_the_bits_of_plain_decoding_on_gpu(precision, sizes):
    check_bits(Target(precision, **sizes), LENGTHS)


class States(Target):
    """The final states in the logits' place: an f32 product with the vocabulary promises no bits on a CPU."""

    def loaded(self, precision, **sizes):
        if not sizes:
            return sm.load(DATA / "checkpoints" / "fp16", precision=precision, expand=True)
        return expanded(sm.random_model(tiny_config(vocab_size=512, max_position=1024, **sizes), "fp32", seed=4), precision)

    def _run(self, params, cache, tree):
        hidden, _, cache = self.module.apply(params, tree.tokens, cache, tree.depth, tree.mask)
        return hidden, cache


@pytest.mark.parametrize(("precision", "sizes"), [
    *((precision, {}) for precision in ("w8a8", "w4a8-qqq", "w4a8-qqq-g128", "w4a8-qoq", "w4a8-qoq-g128")),
    ("w8a8", DEMO), pytest.param("w4a8-qoq", DEMO, marks=pytest.mark.slow)],
    ids=lambda value: value if isinstance(value, str) else str(len(value)))
def test_a_nodes_states_have_the_bits_of_plain_decoding_where_a_cpu_rounds_activations(precision, sizes):
    target = States(precision, **sizes)
    assert target.module.format.rounds_activations
    check_bits(target, (62, 130))


@pytest.mark.parametrize("columns", [65, 4096, *(pytest.param(columns, marks=pytest.mark.slow) for columns in (64, 576))])
def test_a_rows_norm_has_the_same_bits_beside_any_rows(columns):
    rng = np.random.default_rng(columns)
    rows, weight = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((64, columns), (columns,)))
    norm = jax.jit(functools.partial(norm_kernels.add_rms_norm, eps=1e-5, out_dtype=jnp.float32, reproducible=True))
    alone = np.concatenate([norm(row[None], row[None, None], weight)[1] for row in rows])
    np.testing.assert_allclose(alone, reference_norm(2 * rows, weight), rtol=1e-5, atol=1e-6)
    for count in (2, 3, 5, 8, 16, 33, 64):
        np.testing.assert_array_equal(norm(rows[:count], rows[None, :count], weight)[1], alone[:count], err_msg=f"{count}")


def reference_norm(rows, weight):
    rows = np.asarray(rows, np.float64)
    return rows / np.sqrt(np.mean(rows**2, axis=1, keepdims=True) + 1e-5) * np.asarray(weight)
