"""EAGLE-2 and EAGLE-3 against arrays of the official implementation (SafeAILab/EAGLE, f32; its trees list nodes by history
index), and tree growth against plain Python."""

import dataclasses
import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import DATA

import specmq_jax as sm
from specmq_jax.decoding.drafters.eagle import EagleState
from specmq_jax.decoding.tree import Accepted, DraftTree
from specmq_jax.network.cache import KVCache

GOLDEN = np.load(DATA / "eagle" / "trees.npz")
TREES = {"R6k10S60": sm.TreeConfig(depth=6, top_k=10, size=60), "R3k10S24": sm.TreeConfig(depth=3, top_k=10, size=24)}
SHAPES = [sm.TreeConfig(depth=depth, top_k=k, size=size)
          for depth, k, size in ((4, 10, 100), (3, 4, 13), (1, 8, 8), (5, 8, 32))]
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
    return [(prompt, plain.generate(prompt, 24).tokens.tolist()) for prompt in prompts()]


@pytest.fixture(scope="module")
def bases():
    return {"eagle2": sm.load(DATA / "checkpoints" / "fp16", expand=True),
            "eagle3": sm.load(DATA / "eagle" / "eagle3_base", expand=True)}


@pytest.mark.parametrize(("family", "shape"), [
    ("eagle2", "R3k10S24"), ("eagle3", "R6k10S60"),
    *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (("eagle2", "R6k10S60"), ("eagle3", "R3k10S24")))],
    indirect=["family"])
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
    draft = jax.jit(functools.partial(head.module.apply, own=False))
    score = jax.jit(functools.partial(head.module.apply, method="logits"))
    for number in range(3):
        key = f"{name}/p{number}/"
        prompt, first = GOLDEN[key + "prompt"], GOLDEN[key + "first_token"]
        states = jnp.asarray(GOLDEN[key + ("captured" if name == "eagle3" else "hidden")])
        features, _ = draft(head.params["head"], jnp.asarray(np.append(prompt[1:], first), jnp.int32), states,
                            head.new_cache(128), jnp.arange(len(prompt)), None)
        np.testing.assert_allclose(features, GOLDEN[key + "features"], atol=3e-4)
        logits = np.asarray(score(head.params["head"], features))
        ids = np.arange(logits.shape[1]) if head.params["ids"] is None else np.asarray(head.params["ids"])
        best = np.argsort(-logits, axis=1, kind="stable")[:, :10]
        np.testing.assert_allclose(np.take_along_axis(logits, best, 1), GOLDEN[key + "top10_logits"], atol=2e-3)
        assert np.mean(ids[best] == GOLDEN[key + "top10_ids"]) > 0.99


@pytest.mark.parametrize(("family", "tree"), [
    ("eagle2", SHAPES[0]), ("eagle3", SHAPES[1]),
    *(pytest.param(*pair, marks=pytest.mark.slow) for pair in itertools.product(("eagle2", "eagle3"), SHAPES)
      if pair not in (("eagle2", SHAPES[0]), ("eagle3", SHAPES[1])))], indirect=["family"])
def test_no_tree_shape_changes_a_token(family, expected, tree):
    _, base, head = family
    decoder = sm.Decoder(base, sm.EagleDrafter(head, tree), sm.DecodeConfig(max_len=256))
    for prompt, tokens in expected:
        assert decoder.generate(prompt, 24).tokens.tolist() == tokens
        assert [t for part in decoder.stream(prompt, 24, rounds=2) for t in part] == tokens


@pytest.mark.parametrize("family", ["eagle2", pytest.param("eagle3", marks=pytest.mark.slow)], indirect=True)
@pytest.mark.parametrize(("middle", "start"), [
    ("w4a16-g64", True), *(pytest.param(*pair, marks=pytest.mark.slow)
                           for pair in (("fp32", False), ("fp32", True), ("w4a16-g64", False)))])
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


@pytest.mark.parametrize("family", [pytest.param("eagle2", marks=pytest.mark.slow), "eagle3"], indirect=True)
def test_sampled_trees_draw_the_tokens_of_plain_sampling(family):
    _, base, head = family
    check_sampled(base, sm.EagleDrafter(head, sm.TreeConfig(depth=3, top_k=4, size=16)))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["eagle2", "eagle3"], indirect=True)
def test_a_sampled_hierarchy_draws_the_tokens_of_plain_sampling(family):
    _, base, head = family
    inner = sm.EagleDrafter(head, sm.TreeConfig(depth=3, top_k=4, size=16))
    check_sampled(base, sm.HierarchicalDrafter(base, inner, 4))


def check_sampled(base, drafter):
    config = sm.DecodeConfig(max_len=256, sampling=sm.Sampling(temperature=0.9, top_k=50))
    plain, decoder = sm.Decoder(base, config=config), sm.Decoder(base, drafter, config)
    for seed, prompt in enumerate(prompts()):
        tokens = plain.generate(prompt, 24, seed=seed).tokens.tolist()
        assert decoder.generate(prompt, 24, seed=seed).tokens.tolist() == tokens
        assert [t for part in decoder.stream(prompt, 24, seed=seed, rounds=2) for t in part] == tokens


@pytest.mark.parametrize("family", [pytest.param("eagle2", marks=pytest.mark.slow), "eagle3"], indirect=True)
@pytest.mark.parametrize("start", [pytest.param(False, marks=pytest.mark.slow), True])
def test_after_a_rejection_anywhere_all_levels_equal_a_fresh_prefill(family, start):
    """A made-up target rejects at every place of five chains, or nowhere; each chain follows one of these outcomes."""
    name, base, head = family
    inner = sm.EagleDrafter(head, sm.TreeConfig(depth=3, top_k=4, size=16))
    drafter = sm.HierarchicalDrafter(base, inner, 3, start)
    decoder = sm.Decoder(base, drafter, sm.DecodeConfig(max_len=256))
    advance, propose, fresh = jax.jit(drafter.advance), jax.jit(drafter.propose), fresh_prefill(base, inner)
    # to where the head is good enough for chains of several lengths
    state = decoder.prefill([*GOLDEN[f"{name}/p0/prompt"], *GOLDEN[f"{name}/p0/R3k10S24/output_ids"][:6]], 64)
    *committed, root = state.tokens[:state.length].tolist()
    root, levels = jnp.int32(root), state.drafter
    lengths = set()
    for follow in (99, 99, 1, 99, 2):
        tree, levels = propose(drafter.params, levels, root)
        drafted = int(levels.drafted)
        lengths.add(drafted)
        outcomes = []
        for count in range(1, drafted + 2):
            drafts = tree.tokens[1:count].tolist()
            bonus = int(tree.tokens[count]) + 1  # not the draft
            if count > drafted:
                bonus = int(decoder.next_logits([*committed, int(root), *drafts]).argmax())
            new = [*drafts, bonus % base.config.vocab_size]
            accepted = Accepted(path=jnp.arange(drafter.tree_size, dtype=jnp.int32), nodes=tree.tokens,
                                tokens=jnp.asarray(np.pad(new, (0, drafter.tree_size - count)), jnp.int32),
                                count=jnp.int32(count))
            after, text = advance(drafter.params, levels, accepted), [*committed, int(root), *new[:-1]]
            check_levels(decoder, fresh, after, text, new[-1])
            outcomes.append((after, text, jnp.int32(new[-1])))
        levels, committed, root = outcomes[min(follow, len(outcomes)) - 1]
    assert len(lengths) > 1, "chains of several lengths must have been met"


def fresh_prefill(base, inner):
    """A function of a padded text, the token behind each of its tokens and its length, to the states of both levels."""
    module = base.module.clone(capture=inner.capture)

    def run(params, inner_params, text, following, count):
        _, features, cache = module.apply(params, text, base.new_cache(256))
        return cache, inner.prefill(inner_params, inner.init(256), text, following, features, count)

    return functools.partial(jax.jit(run), base.params, inner.params)


def check_levels(decoder, fresh, levels, committed, root):
    """Both caches over the live length, the feature and the token ahead, against new states of the same text."""
    length, ahead = len(committed), int(levels.ahead)
    assert int(levels.position) == length and int(levels.cache.length) == int(levels.inner.cache.length) == length + ahead
    text = committed + [root] * ahead
    following = committed[1:] + [root] + [int(levels.token)] * ahead
    if ahead:
        assert decoder.next_logits(text).argmax() == int(levels.token)
    padded = lambda tokens: jnp.asarray(np.pad(tokens, (0, 128 - len(text))), jnp.int32)  # noqa: E731
    cache, inner = fresh(padded(text), padded(following), jnp.int32(len(text)))
    for kept, new in ((levels.cache, cache), (levels.inner.cache, inner.cache)):
        for a, b in zip(jax.tree.leaves(kept.layers), jax.tree.leaves(new.layers), strict=True):
            np.testing.assert_allclose(np.asarray(a)[:len(text)], np.asarray(b)[:len(text)], rtol=2e-3, atol=2e-4)
    np.testing.assert_allclose(levels.inner.feature, inner.feature, rtol=2e-3, atol=2e-3)


def prompts():
    own = [GOLDEN[f"{name}/p0/prompt"].tolist() for name in ("eagle2", "eagle3")]
    rng = np.random.default_rng(0)
    return own + [rng.integers(0, 512, int(rng.integers(1, 40))).tolist() for _ in range(4)]


HASHES = 97
GROWN = [sm.TreeConfig(depth=depth, top_k=k, size=size) for depth, k, size in (
    (1, 1, 2), (1, 5, 4), (2, 3, 13), (3, 4, 9), (4, 2, 7), (4, 5, 60), (5, 1, 6), (6, 10, 100))]


class PathModule:
    """A head whose scores follow from the drafted path alone, and from the rows that a row may see being that path's.

    A feature is a hash of the path. The scores are whole numbers and their own log-softmax: one 0 a row, the others too low
    for an f32 exponential. So every sum is exact and ties abound.
    """

    def apply(self, params, *args, method=None, own=True, skip=0):
        if method == "logits":
            return params[args[0][:, 0].astype(jnp.int32)]
        tokens, features, cache, offsets, seen = args
        layer, = cache.layers
        rows = jax.lax.dynamic_update_slice(layer.keys, tokens.astype(jnp.float32)[:, None, None],
                                            (cache.length + skip, jnp.int32(0), jnp.int32(0)))
        behind = jax.lax.dynamic_slice_in_dim(rows, cache.length, seen.shape[1])[:, 0, 0]
        features = (7 * features[:, 0] + 13 * tokens + 3 * jnp.sum(jnp.where(seen, behind, 0), axis=1) + offsets) % HASHES
        return features[:, None], cache.replace(layers=(layer.replace(keys=rows),))


def path_hash(start, path):
    for depth, token in enumerate(path):
        start = (7 * start + 13 * token + 3 * sum(path[:depth + 1]) + depth) % HASHES
    return start


def grow(table, ids, shape, start):
    """The whole growth in plain Python: tokens and parents of the nodes, root left out."""
    best = lambda scores, count: sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]  # noqa: E731
    scores, paths, parents, frontier = [], [], [], [-1]
    for _ in range(shape.depth):
        first = len(scores)
        for node in frontier:
            score, path = (scores[node], paths[node]) if node >= 0 else (0, [])
            row = table[path_hash(start, path)]
            for choice in best(row, shape.top_k):
                scores.append(score + row[choice])
                paths.append([*path, ids[choice]])
                parents.append(node)
        frontier = [first + i for i in best(scores[first:], shape.top_k)]
    kept = sorted(best(scores, shape.size - 1))
    place = {-1: 0} | {candidate: node for node, candidate in enumerate(kept, start=1)}
    return [paths[i][-1] for i in kept], [place[parents[i]] for i in kept]


def walk(tokens, parents, targets):
    """The accepted path in plain Python."""
    path = [0]
    while following := [i for i in range(1, len(tokens)) if parents[i] == path[-1] and tokens[i] == targets[path[-1]]]:
        path.append(following[0])
    return path


@pytest.mark.parametrize("shape", GROWN, ids=lambda shape: f"{shape.depth}-{shape.top_k}-{shape.size}")
def test_growth_pruning_and_acceptance_equal_plain_python(shape):
    rng, vocab = np.random.default_rng(shape.size), 14
    config = sm.LlamaConfig(vocab_size=vocab, hidden_size=1, intermediate_size=1, num_layers=1, num_heads=1, num_kv_heads=1,
                            head_dim=1)
    head = types.SimpleNamespace(config=types.SimpleNamespace(layer=config), module=PathModule())
    drafter = sm.EagleDrafter(head, shape)
    propose, accept = jax.jit(drafter.propose), jax.jit(DraftTree.accept)
    longest = set()
    for _ in range(25):
        table = -104.0 - 16 * rng.integers(0, 13, (HASHES, vocab)).astype(np.float32)
        table[np.arange(HASHES), rng.integers(0, vocab, HASHES)] = 0
        ids, start, length = rng.permutation(40)[:vocab], int(rng.integers(HASHES)), int(rng.integers(9))
        state = EagleState(cache=KVCache.create(config, 600, jnp.float32).rewind(length),
                           feature=jnp.full(1, start, jnp.float32))
        tree, after = propose({"head": jnp.asarray(table), "ids": jnp.asarray(ids, jnp.int32)}, state, jnp.int32(5))
        tokens, parents = grow(table.tolist(), ids.tolist(), shape, start)
        assert tree.tokens.tolist() == [5, *tokens] and tree.parent.tolist() == [0, *parents]
        assert int(after.cache.length) == length
        targets = np.where(rng.random(shape.size) < 0.8, 0, 99)
        for node in np.flatnonzero(targets == 0):
            children = [i for i, parent in enumerate(parents, start=1) if parent == node]
            targets[node] = tokens[rng.choice(children) - 1] if children else 99
        path = walk([5, *tokens], [0, *parents], targets)
        accepted = accept(tree, jnp.asarray(targets, jnp.int32))
        assert int(accepted.count) == len(path) and accepted.path[:len(path)].tolist() == path
        assert accepted.nodes[:len(path)].tolist() == [[5, *tokens][node] for node in path]
        assert accepted.tokens[:len(path)].tolist() == targets[path].tolist()
        longest.add(len(path))
    assert {1, shape.depth + 1} <= longest or shape.depth > 3 and max(longest) > 3


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
