"""Drafters draft by the rotary frequencies of the target's length."""

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
