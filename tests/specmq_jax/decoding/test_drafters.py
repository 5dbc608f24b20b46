"""What drafters refuse, how they print, and that they draft by the rotary frequencies of the target's length."""

import dataclasses

import jax
import numpy as np
import pytest
from fakes import DATA, tiny_config

import specmq_jax as sm
from specmq_jax.loading.head import outline_head
from specmq_jax.loading.model import outline

EAGLE = DATA / "eagle"
PROMPT = [5, 9, 31, 3, 40]
TREE = sm.TreeConfig(depth=2, top_k=3, size=6)
DYNAMIC = sm.RopeConfig(type="dynamic", factor=2.0, original_max_position=16)


@pytest.fixture(scope="module")
def dynamic():
    """Its rotary frequencies follow the length that it decodes to, beyond 16 tokens."""
    return sm.random_model(tiny_config(vocab_size=512, hidden_size=256, head_dim=64, rope=DYNAMIC), "fp32", seed=1)


@pytest.fixture(scope="module")
def head(dynamic):
    return sm.load_head(EAGLE / "eagle2_head", dynamic)


def test_a_dynamic_model_that_drafts_for_itself_is_always_right(dynamic):
    config = sm.DecodeConfig(max_len=120)
    plain = sm.Decoder(dynamic, config=config).generate(PROMPT, 100)
    found = sm.Decoder(dynamic, sm.ChainDrafter(dynamic, 3), config).generate(PROMPT, 100)
    assert found.tokens.tolist() == plain.tokens.tolist()
    assert set(found.accept_lengths.tolist()) == {4}


@pytest.mark.parametrize("start", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_dynamic_model_between_its_head_and_itself_is_always_right(dynamic, head, start):
    decoder = sm.Decoder(dynamic, sm.HierarchicalDrafter(dynamic, sm.EagleDrafter(head, TREE), 3, start),
                         sm.DecodeConfig(max_len=120))
    state, drafted = decoder.prefill(PROMPT, 100), []
    while not state.done:
        state = decoder.round(state)
        drafted.append(int(state.drafter.drafted))
    accepted = np.asarray(state.accept_lengths)[:int(state.rounds)].tolist()
    assert accepted == [count + 1 for count in drafted]


def test_a_dynamic_heads_features_do_not_follow_from_the_caches_padding(dynamic, head):
    config = dataclasses.replace(head.config, layer=dataclasses.replace(head.config.layer, rope=DYNAMIC))
    stretched = dataclasses.replace(head, config=config, module=head.module.clone(config=config))
    features = [sm.Decoder(dynamic, sm.EagleDrafter(drafting, TREE), sm.DecodeConfig(
        max_len=120, prefill_chunks=(chunk,))).prefill(PROMPT * 8).drafter.feature
        for drafting, chunk in ((stretched, 64), (stretched, 700), (head, 64))]
    np.testing.assert_allclose(features[0], features[1], rtol=1e-4, atol=1e-4)
    assert np.abs(features[0] - features[2]).max() > 1e-2


def test_every_inner_rounds_accept_length_is_kept():
    """The target rejects what the small model drafts, and that model what its head does: no round is shorter."""
    target, small = (sm.random_model(tiny_config(vocab_size=512, hidden_size=256, head_dim=64), "fp32", seed=seed)
                     for seed in (6, 7))
    inner = sm.EagleDrafter(sm.load_head(EAGLE / "eagle2_head", small), sm.TreeConfig(depth=1, top_k=1, size=2))
    decoder = sm.Decoder(target, sm.HierarchicalDrafter(small, inner, 6), sm.DecodeConfig(max_len=250, prefill_chunks=(8,)))
    found = decoder.generate(PROMPT)
    rounds, least = len(found.accept_lengths), 6 * len(found.accept_lengths) / 2
    assert rounds > 200 and least > 384, "more inner rounds than the caches have rows"
    assert len(found.draft_accept_lengths) >= least
    assert set(found.draft_accept_lengths.tolist()) <= {1, 2}
    # each round drafts 6 tokens, or 7 where the last inner round of it accepted 2
    assert 6 * rounds <= found.draft_accept_lengths.sum() + np.count_nonzero(found.accept_lengths > 6) <= 7 * rounds


@pytest.mark.parametrize("length", [0, -1, True, 2.5, 2.0, "3", None])
def test_a_draft_of_no_whole_number_of_tokens_is_refused(tiny, head, dynamic, length):
    with pytest.raises(sm.UserError, match=f"length must be a whole number, found {length!r}$"):
        sm.ChainDrafter(tiny, length)
    with pytest.raises(sm.UserError, match=f"min_draft_length must be at least 1, a whole number; found {length!r}$"):
        sm.HierarchicalDrafter(dynamic, sm.EagleDrafter(head, TREE), length)


def test_a_drafter_made_of_something_else_is_refused(tiny, dynamic, head):
    inner = sm.EagleDrafter(head, TREE)
    for make, message in (
            (lambda: sm.ChainDrafter("model"), "the draft model must be what specmq_jax.load returns; found a str"),
            (lambda: sm.ChainDrafter(head), "the draft model must be what specmq_jax.load returns; found a Head"),
            (lambda: sm.HierarchicalDrafter(None, inner), "the draft model must be what .* found a NoneType"),
            (lambda: sm.HierarchicalDrafter(dynamic, head), "must be a specmq_jax.EagleDrafter; found a Head"),
            (lambda: sm.HierarchicalDrafter(dynamic, inner, draft_model_start=1), "must be True or False; found 1"),
            (lambda: sm.EagleDrafter(EAGLE), "the head must be what specmq_jax.load_head returns; found a PosixPath"),
            (lambda: sm.EagleDrafter(tiny), "the head must be what specmq_jax.load_head returns; found a Model"),
            (lambda: sm.EagleDrafter(head, (6, 10, 60)), "the tree must be a specmq_jax.TreeConfig; found a tuple"),
            (lambda: sm.EagleDrafter(head, sm.TreeConfig(depth=1, top_k=513, size=2)),
             "top_k 513 exceeds the head's vocabulary of 512; choose at most as many")):
        with pytest.raises(sm.UserError, match=message):
            make()


def test_a_draft_model_made_for_shorter_sequences_is_refused(tiny, dynamic, head):
    chain = sm.ChainDrafter(tiny)
    chain.check(tiny.config, max_len=512)
    chain.check(tiny.config)
    with pytest.raises(sm.UserError, match="made for at most 512 tokens .max_position_embeddings., and max_len is 513"):
        chain.check(tiny.config, max_len=513)
    sm.ChainDrafter(dynamic).check(dynamic.config, max_len=5000)
    short = dataclasses.replace(dynamic, config=dataclasses.replace(dynamic.config, rope=sm.RopeConfig(), max_position=99))
    with pytest.raises(sm.UserError, match="made for at most 99 tokens"):
        sm.HierarchicalDrafter(short, sm.EagleDrafter(head, TREE)).check(dynamic.config, max_len=100)
    sm.EagleDrafter(head, TREE).check(dynamic.config, max_len=100_000)  # published heads decode beyond what they state


def test_a_draft_longer_than_the_sequence_is_refused(tiny, dynamic, head):
    for drafter, target in ((sm.ChainDrafter(tiny, 10**9), tiny), (
            sm.HierarchicalDrafter(dynamic, sm.EagleDrafter(head, TREE), 10**9), dynamic)):
        with pytest.raises(sm.UserError, match=r"a draft may have 100000000\d tokens, and max_len is 64; draft fewer tokens"):
            drafter.check(target.config, max_len=64)


def test_everything_prints_as_one_short_line(dynamic, head):
    target = sm.load(DATA / "checkpoints" / "fp16")
    draft, eagle3 = target.with_precision("w4a16-g64"), outline_head(EAGLE / "eagle3_head", outline(EAGLE / "eagle3_base"))
    name = target.directory.name
    inner = sm.EagleDrafter(head, TREE)
    for value, text in (
            (head, "Head(eagle2, 1 layer of 256, 512 tokens, fp32)"),
            (eagle3, "Head(eagle3, 1 layer of 256, 128 tokens, fp32)"),
            (sm.ChainDrafter(draft, 5), f"ChainDrafter({name} at w4a16-g64, length=5)"),
            (inner, "EagleDrafter(Head(eagle2, 1 layer of 256, 512 tokens, fp32), depth=2, top_k=3, size=6)"),
            (sm.HierarchicalDrafter(dynamic, inner), f"HierarchicalDrafter(random weights at fp32, {inner!r}, "
             "min_draft_length=6, draft_model_start=False)"),
            (sm.NoDrafter(), "NoDrafter()")):
        assert repr(value) == text
    assert jax.tree.leaves(head.params)
