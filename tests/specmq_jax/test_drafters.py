"""Drafters draft by the rotary frequencies of the target's length, and the hierarchy keeps all its accept lengths."""

import dataclasses

import numpy as np
import pytest
from fakes import DATA, tiny_config

import specmq_jax as sm

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


@pytest.mark.parametrize("start", [False, True])
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
