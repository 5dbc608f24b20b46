"""EAGLE-2 and EAGLE-3 against arrays of the official implementation (SafeAILab/EAGLE, f32; its trees list nodes by history
index), and tree growth against plain Python."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import DATA

import specmq_jax as sm
from specmq_jax.drafters.eagle import Candidates

GOLDEN = np.load(DATA / "eagle" / "trees.npz")
TREES = {"R6k10S60": sm.TreeConfig(depth=6, top_k=10, size=60), "R3k10S24": sm.TreeConfig(depth=3, top_k=10, size=24)}
SURE = 1e-4


@pytest.fixture(scope="module", params=["eagle2", "eagle3"])
def family(request, bases):
    name = request.param
    base = bases[name]
    return name, base, sm.load_head(DATA / "eagle" / f"{name}_head", base)


@pytest.fixture(scope="module")
def expected(family):
    """Plain greedy continuations."""
    plain = sm.Decoder(family[1], config=sm.DecodeConfig(max_len=256))
    return [(prompt, plain.generate(prompt, 24).tokens.tolist()) for prompt in prompts(20)]


@pytest.fixture(scope="module")
def bases():
    return {"eagle2": sm.load(DATA / "checkpoints" / "fp16", expand=True),
            "eagle3": sm.load(DATA / "eagle" / "eagle3_base", expand=True)}


@pytest.mark.parametrize("shape", TREES)
def test_trees_accept_lengths_and_outputs_equal_the_official_ones(family, shape):
    name, base, head = family
    drafter = sm.EagleDrafter(head, TREES[shape])
    decoder = sm.Decoder(base, drafter, sm.DecodeConfig(max_len=256))
    propose = jax.jit(drafter.propose)
    for number in range(3):
        golden = {key.split("/")[-1]: GOLDEN[key] for key in GOLDEN.files if key.startswith(f"{name}/p{number}/{shape}/")}
        prompt = GOLDEN[f"{name}/p{number}/prompt"].tolist()
        state = decoder.prefill(prompt, 48)
        compared = 0
        for tokens, parents, gap in zip(golden["round_tokens"], golden["round_parent"], golden["round_gap"], strict=True):
            if gap > SURE:
                tree, _ = propose(drafter.params, state.drafter, state.tokens[state.length - 1])
                assert tree.tokens.tolist() == tokens.tolist()
                assert tree.parent[1:].tolist() == parents[1:].tolist()
                compared += 1
            state = decoder.round(state)
        assert compared > len(golden["round_gap"]) / 2
        found = decoder.generate(prompt, 48)
        assert found.tokens.tolist() == golden["output_ids"].tolist()
        assert found.accept_lengths.tolist() == golden["accept_lengths"].tolist()


def test_features_and_best_tokens_of_the_prompt_equal_the_official_ones(family):
    name, base, head = family
    for number in range(3):
        key = f"{name}/p{number}/"
        prompt, first = GOLDEN[key + "prompt"], GOLDEN[key + "first_token"]
        states = jnp.asarray(GOLDEN[key + ("captured" if name == "eagle3" else "hidden")])
        apply = lambda *args, **options: head.module.apply(head.params["head"], *args, **options)  # noqa: E731
        features, _ = apply(jnp.asarray(np.append(prompt[1:], first), jnp.int32), states, head.new_cache(128),
                            jnp.arange(len(prompt)), None, own=False)
        np.testing.assert_allclose(features, GOLDEN[key + "features"], atol=3e-4)
        logits = np.asarray(apply(features, method="logits"))
        ids = np.arange(logits.shape[1]) if head.params["ids"] is None else np.asarray(head.params["ids"])
        best = np.argsort(-logits, axis=1, kind="stable")[:, :10]
        np.testing.assert_allclose(np.take_along_axis(logits, best, 1), GOLDEN[key + "top10_logits"], atol=2e-3)
        assert np.mean(ids[best] == GOLDEN[key + "top10_ids"]) > 0.99


@pytest.mark.parametrize("tree", [sm.TreeConfig(depth=1, top_k=8, size=8), sm.TreeConfig(depth=3, top_k=4, size=13),
                                  sm.TreeConfig(depth=5, top_k=8, size=32), sm.TreeConfig(depth=4, top_k=10, size=100)])
def test_no_tree_shape_changes_a_token(family, expected, tree):
    _, base, head = family
    decoder = sm.Decoder(base, sm.EagleDrafter(head, tree), sm.DecodeConfig(max_len=256))
    for prompt, tokens in expected:
        assert decoder.generate(prompt, 24).tokens.tolist() == tokens
    assert [t for part in decoder.stream(prompt, 24, rounds=1) for t in part] == tokens


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("middle", ["fp32", "w4a16-g64"])
def test_the_hierarchy_changes_no_token(family, expected, middle, start):
    name, base, _ = family
    small = base.with_precision(middle)
    inner = sm.EagleDrafter(sm.load_head(DATA / "eagle" / f"{name}_head", small), sm.TreeConfig(depth=3, top_k=4, size=16))
    decoder = sm.Decoder(base, sm.HierarchicalDrafter(small, inner, 4, start), sm.DecodeConfig(max_len=256))
    for prompt, tokens in expected:
        found = decoder.generate(prompt, 24)
        assert found.tokens.tolist() == tokens
        drafts = found.accept_lengths - 1
        assert found.draft_accept_lengths.sum() + len(drafts) >= drafts.sum()
    assert [t for part in decoder.stream(prompt, 24, rounds=1) for t in part] == tokens


def test_sampled_trees_draw_the_tokens_of_plain_sampling(family):
    name, base, head = family
    config = sm.DecodeConfig(max_len=256, sampling=sm.Sampling(temperature=0.9, top_k=50))
    plain = sm.Decoder(base, config=config)
    inner = sm.EagleDrafter(head, sm.TreeConfig(depth=3, top_k=4, size=16))
    for drafter in (inner, sm.HierarchicalDrafter(base, inner, 4)):
        decoder = sm.Decoder(base, drafter, config)
        for seed, prompt in enumerate(prompts(8)):
            assert (decoder.generate(prompt, 24, seed=seed).tokens.tolist()
                    == plain.generate(prompt, 24, seed=seed).tokens.tolist())


@pytest.mark.parametrize("start", [False, True])
def test_after_a_rejection_anywhere_all_levels_equal_a_fresh_prefill(family, start):
    """The target is another model than the small one, so that it rejects at every place of the chain in turn."""
    name, base, head = family
    inner = sm.EagleDrafter(head, sm.TreeConfig(depth=2, top_k=3, size=6))
    drafter = sm.HierarchicalDrafter(base, inner, 3, start)
    decoder = sm.Decoder(base, drafter, sm.DecodeConfig(max_len=256))
    advance, propose = jax.jit(drafter.advance), jax.jit(drafter.propose)
    prompt = prompts(3)[2]
    met = set()
    for kept in (1, 2, 3, 4, 99):
        state = decoder.prefill(prompt, 64)
        root = state.tokens[state.length - 1]
        levels, committed = state.drafter, list(prompt)
        for _ in range(3):
            tree, levels = propose(drafter.params, levels, root)
            drafted = int(levels.drafted)
            count = min(kept, drafted + 1)
            met.add("full" if count == drafted + 1 else count)
            bonus = (int(tree.tokens[count]) + 1) % base.config.vocab_size if count <= drafted else 7
            new = [int(t) for t in tree.tokens[1:count]] + [bonus]
            path = jnp.arange(drafter.tree_size)
            accepted = dataclasses.replace(tree.accept(jnp.roll(tree.tokens, -1)), path=path, nodes=tree.tokens,
                                           tokens=jnp.asarray(np.pad(new, (0, drafter.tree_size - count)), jnp.int32),
                                           count=jnp.int32(count))
            levels = advance(drafter.params, levels, accepted)
            committed += [int(root), *new[:-1]]
            root = jnp.int32(bonus)
            check_levels(decoder, drafter, levels, committed, bonus)
    assert met >= {1, 2, 3, "full"}


def check_levels(decoder, drafter, levels, committed, root):
    """Both caches over the live length, the feature and the token ahead, against new states of the same text."""
    base, length = decoder.target, len(committed)
    ahead = int(levels.ahead)
    assert int(levels.position) == length and int(levels.cache.length) == int(levels.inner.cache.length) == length + ahead
    text = committed + [root] * ahead
    following = committed[1:] + [root] + [int(levels.token)] * ahead
    module = base.module.clone(capture=drafter.inner.capture)
    padded = lambda tokens: jnp.asarray(np.pad(tokens, (0, 128 - len(text))), jnp.int32)  # noqa: E731
    hidden, features, cache = jax.jit(module.apply)(base.params, padded(text), base.new_cache(256))
    if ahead:
        logits = module.apply(base.params, hidden[len(text) - 1][None], method="logits")
        assert int(jnp.argmax(logits)) == int(levels.token)
    inner = jax.jit(drafter.inner.prefill)(drafter.inner.params, drafter.inner.init(256), padded(text), padded(following),
                                           features, jnp.int32(len(text)))
    for kept, fresh in ((levels.cache, cache), (levels.inner.cache, inner.cache)):
        for a, b in zip((*kept.keys, *kept.values), (*fresh.keys, *fresh.values), strict=True):
            np.testing.assert_allclose(a[:len(text)], b[:len(text)], rtol=2e-3, atol=2e-4)
    np.testing.assert_allclose(levels.inner.feature, inner.feature, rtol=2e-3, atol=2e-3)


def prompts(count):
    own = [GOLDEN[f"{name}/p{i}/prompt"].tolist() for name in ("eagle2", "eagle3") for i in range(3)]
    rng = np.random.default_rng(0)
    return (own + [rng.integers(0, 512, int(rng.integers(1, 40))).tolist() for _ in range(count)])[:count]


def test_pruning_keeps_the_best_nodes_and_their_parents():
    rng = np.random.default_rng(0)
    shapes = [sm.TreeConfig(depth=depth, top_k=k, size=size) for depth, k, size in (
        (1, 1, 2), (1, 5, 4), (2, 3, 13), (3, 4, 9), (4, 2, 7), (4, 5, 60), (5, 1, 6), (3, 8, 100))]
    prune = jax.jit(Candidates.prune, static_argnums=2)
    for case in range(200):
        shape = shapes[case % len(shapes)]
        parents, scores = grow(rng, shape.top_k, shape.depth)
        tokens = rng.integers(0, 999, shape.candidates)
        tree = prune(Candidates(scores=jnp.asarray(scores), tokens=jnp.asarray(tokens, jnp.int32),
                                parents=jnp.asarray(parents, jnp.int32)), jnp.int32(5), shape)
        best = sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:shape.size - 1])
        place = {-1: 0} | {history: node for node, history in enumerate(best, start=1)}
        assert tree.tokens.tolist() == [5] + [int(tokens[i]) for i in best], case
        assert tree.parent.tolist() == [0] + [place[parents[i]] for i in best], case


def grow(rng, k, depth):
    """Parents and scores of random candidates, level by level, with coarse scores so that ties happen."""
    coarse = lambda *shape: -np.round(rng.exponential(size=shape) * 4).astype(np.float32) / 4  # noqa: E731
    scores, parents, frontier = list(coarse(k)), [-1] * k, list(range(k))
    for _ in range(1, depth):
        first = len(scores)
        for parent in frontier:
            scores += [scores[parent] + s for s in coarse(k)]
            parents += [parent] * k
        level = range(first, len(scores))
        frontier = sorted(level, key=lambda i: (-scores[i], i))[:k]
    return parents, np.asarray(scores, np.float32)


def test_errors_name_what_does_not_fit(bases, tmp_path):
    base = bases["eagle2"]
    with pytest.raises(sm.UserError, match="holds neither model.safetensors nor pytorch_model.bin"):
        sm.load_head(tmp_path, base)
    with pytest.raises(sm.UserError, match="the EAGLE head reads states of width"):
        sm.load_head(DATA / "eagle" / "eagle2_head", sm.random_model(dataclasses.replace(
            base.config, hidden_size=128), "fp32"))
    with pytest.raises(sm.UserError, match="this target has 2, at least 4 are needed"):
        sm.load_head(DATA / "eagle" / "eagle3_head", base)
    with pytest.raises(sm.UserError, match="has 10 candidates; size 60 needs 59"):
        sm.TreeConfig(depth=1, top_k=10, size=60)
    head = sm.load_head(DATA / "eagle" / "eagle3_head", bases["eagle3"])
    with pytest.raises(sm.UserError, match="top_k 200 exceeds the head's vocabulary of 128"):
        sm.EagleDrafter(head, sm.TreeConfig(depth=2, top_k=200, size=60))
