"""Sequences side by side, a single one and decoding give the same, under any mask, from modules that can be differentiated."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import tiny_config
from lowering import cuda_text, launches

import specmq_jax as sm
from specmq_jax.network.layers import Layer
from specmq_jax.network.sequences import Sequences, attention

DATA = pathlib.Path(__file__).parents[2] / "data"
BASES = {2: DATA / "checkpoints" / "fp16", 3: DATA / "eagle" / "eagle3_base"}


def dense_of(model):
    made = model.dense()
    return made.module, made.params


def logits_of(model, tokens, sequences):
    module, params = dense_of(model)

    @jax.jit
    def score(params, tokens, sequences):
        hidden, _, _ = module.apply(params, tokens, sequences)
        return module.apply(params, hidden, method="logits")

    return score(params, jnp.asarray(tokens).reshape(-1), sequences).reshape(*tokens.shape, -1)


@pytest.mark.parametrize("precision", ["fp32", "w4a16-g32"])
def test_sequences_side_by_side_score_as_each_alone_and_as_decoding(tiny, precision):
    model = tiny.with_precision(precision)
    tokens = np.random.default_rng(0).integers(0, 61, (3, 40)).astype(np.int32)
    found = logits_of(model, tokens, Sequences.causal(model.config, 3, 40, jnp.float32))
    decoder = sm.Decoder(model, config=sm.DecodeConfig(max_len=64))
    tolerance = dict(rtol=1e-4, atol=1e-4) if precision == "fp32" else dict(rtol=0.02, atol=0.05)
    for row, scores in zip(tokens, found, strict=True):
        np.testing.assert_allclose(scores, sm.logits(model, row), **tolerance)
        np.testing.assert_allclose(scores[-1], decoder.next_logits(row), **tolerance)


def test_packed_sequences_score_as_each_alone(tiny):
    """A mask of their own and positions from 0 keep the sequences in one row apart."""
    rng = np.random.default_rng(1)
    parts = [rng.integers(0, 61, size).astype(np.int32) for size in (9, 1, 22)]
    segments = np.repeat(np.arange(3), [len(part) for part in parts])
    mask = np.tri(32, dtype=bool) & (segments[:, None] == segments)
    positions = np.concatenate([np.arange(len(part)) for part in parts])
    tokens = np.stack([np.concatenate(parts)] * 2)
    sequences = Sequences.create(tiny.config, jnp.asarray([positions] * 2), jnp.asarray([mask] * 2), jnp.float32, limit=512)
    found = logits_of(tiny, tokens, sequences)
    expected = np.concatenate([sm.logits(tiny, part) for part in parts])
    for row in found:
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-4)


def test_any_mask_is_the_one_a_tree_is_verified_with(tiny):
    """A tree behind a prompt, as rows of one sequence with its mask, against the pass of a round."""
    rng = np.random.default_rng(2)
    prompt, nodes = rng.integers(0, 61, 11).astype(np.int32), rng.integers(0, 61, 6).astype(np.int32)
    parent, depth = np.int32([0, 0, 0, 1, 1, 3]), np.int32([0, 1, 1, 2, 2, 3])
    tree = np.eye(6, dtype=bool)
    for node in range(1, 6):
        tree[node] |= tree[parent[node]]
    mask = np.tri(17, dtype=bool)
    mask[11:, 11:] = tree
    positions = np.concatenate([np.arange(11), 11 + depth])
    sequences = Sequences.create(tiny.config, positions[None], mask[None], jnp.float32, limit=64)
    found = logits_of(tiny, np.concatenate([prompt, nodes])[None], sequences)[0, 11:]

    @jax.jit
    def verified(params, cache):
        _, _, cache = tiny.module.apply(params, prompt, cache)
        hidden, _, _ = tiny.module.apply(params, nodes, cache.advance(11), depth, tree)
        return tiny.module.apply(params, hidden, method="logits")

    expected = verified(tiny.params, tiny.new_cache(64))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_attention_is_the_softmax_over_what_a_row_sees_and_its_own_rows():
    rng = np.random.default_rng(3)
    q, k, v = rng.normal(size=(2, 5, 4, 8)), rng.normal(size=(2, 2, 7, 8)), rng.normal(size=(2, 2, 7, 8))
    own = [(rng.normal(size=(2, 5, 2, 8)), rng.normal(size=(2, 5, 2, 8))) for _ in range(2)]
    mask = rng.random((2, 5, 7)) < 0.5
    found = attention(*(jnp.asarray(part, jnp.float32) for part in (q, k, v)), jnp.asarray(mask),
                      [tuple(jnp.asarray(part, jnp.float32) for part in pair) for pair in own])
    for b, s, h in np.ndindex(2, 5, 4):
        keys = np.concatenate([k[b, h // 2][mask[b, s]], *(key[b, s, h // 2][None] for key, _ in own)])
        values = np.concatenate([v[b, h // 2][mask[b, s]], *(value[b, s, h // 2][None] for _, value in own)])
        weights = np.exp(keys @ q[b, s, h] / np.sqrt(8))
        np.testing.assert_allclose(found[b, s, h], weights @ values / weights.sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("version", [2, 3])
def test_drafts_from_every_row_are_those_of_a_growing_chain(version):
    """Row t of draft j against the head with t + 1 committed rows and j rows of a chain behind them."""
    base = sm.load(BASES[version], expand=True)
    head = sm.load_head(DATA / "eagle" / f"eagle{version}_head", base)
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 512, 20).astype(np.int32)
    states = jnp.asarray(rng.normal(size=(20, head.config.feature_size)), jnp.float32)
    apply = functools.partial(jax.jit(head.module.apply, static_argnames=("own", "skip")), head.params["head"])
    sequences = Sequences.causal(head.config.layer, 1, 20, jnp.float32, limit=64)
    found, feature = [], states
    for draft in range(4):
        following = np.pad(tokens[draft + 1:], (0, draft + 1))
        feature, sequences = apply(following, feature, sequences, draft, None, own=draft > 0)
        found.append(feature)
    features, whole = apply(tokens[1:17], states[:16], head.new_cache(64), None, None, own=False)
    np.testing.assert_allclose(found[0][:16], features, rtol=1e-3, atol=1e-3)
    for row in (0, 7, 15):
        cache, feature = whole.rewind(row + 1), features[row:row + 1]
        for draft in range(1, 4):
            feature, cache = apply(tokens[row + 1 + draft][None], feature, cache, jnp.array([draft - 1]),
                                   jnp.ones((1, draft), bool), own=True, skip=draft - 1)
            np.testing.assert_allclose(found[draft][row], feature[0], rtol=1e-3, atol=1e-3)


def test_what_a_layer_multiplies_is_captured_and_only_where_it_is_asked_for(tiny):
    config, rows = tiny.config, jnp.asarray(np.random.default_rng(4).normal(size=(12, 64)), jnp.float32)
    layer = Layer(config, tiny.module.format, implementation="reference")
    variables = {"params": tiny.params["params"]["layers_1"]}
    sequence = Sequences.causal(config, 1, 12, jnp.float32)
    pass_ = rows, None, sequence.rows(config, 12), sequence.layers[0]
    (_, behind, update, _), kept = jax.jit(functools.partial(layer.apply, mutable="intermediates"))(variables, *pass_)
    found = {name: part["inputs"][0] for half in kept["intermediates"].values() for name, part in half.items()}
    assert {name: part.shape[1] for name, part in found.items()} == {"qkv": 64, "o": 64, "gate_up": 64, "down": 96}
    weight = variables["params"]["mlp"]["down"]["w"].values
    np.testing.assert_allclose(update[0], found["down"] @ weight, rtol=1e-4, atol=1e-4)
    weight = variables["params"]["attention"]["o"]["w"].values
    np.testing.assert_allclose(behind - rows, found["o"] @ weight, rtol=1e-4, atol=1e-4)
    assert len(jax.eval_shape(layer.apply, variables, *pass_)) == 4  # the outputs alone


def test_the_reference_can_be_differentiated(tiny):
    module, params = dense_of(tiny)
    tokens = jnp.asarray(np.random.default_rng(5).integers(0, 61, 16), jnp.int32)
    sequences = Sequences.causal(tiny.config, 2, 8, jnp.float32)

    def loss(params):
        hidden, _, _ = module.apply(params, tokens, sequences)
        return jax.nn.log_softmax(module.apply(params, hidden, method="logits"))[:, 3].sum()

    gradient = jax.jit(jax.grad(loss))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    moved = jax.tree.map(lambda leaf, slope: leaf + 1e-4 * slope, params, gradient)
    expected = sum(float(jnp.vdot(leaf, leaf)) for leaf in jax.tree.leaves(gradient))
    assert float(loss(moved) - loss(params)) == pytest.approx(1e-4 * expected, rel=0.05)


def test_the_implementation_reaches_every_kernel(monkeypatch):
    """On a GPU the network launches kernels, and none where the reference is asked for."""
    model = sm.random_model(tiny_config(), "fp16", seed=1)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    params, cache = (jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
                     for tree in (model.params, model.new_cache(64)))

    def text(module):
        return cuda_text(lambda params, tokens, cache: module.apply(params, tokens, cache, method="everything"), params,
                         jax.ShapeDtypeStruct((4,), jnp.int32), cache)

    assert launches(text(model.module)) > 0
    assert launches(text(model.module.clone(implementation="reference"))) == 0


def test_a_dense_model_computes_what_the_low_bit_one_stands_for():
    target = sm.random_model(tiny_config(), "w4a16-g32", head="w8a16", seed=1)
    made = target.dense()
    tokens = np.arange(20, dtype=np.int32)
    assert made.module.format.dtype == made.module.head_format.dtype == target.module.format.dtype
    np.testing.assert_allclose(sm.logits(made, tokens), sm.logits(target, tokens), rtol=0.05, atol=0.05)
