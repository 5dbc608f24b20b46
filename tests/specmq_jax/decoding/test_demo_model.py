"""The demo model end to end: Hugging Face's own logits and tokens, and speculation that changes none of them."""

import json

import numpy as np
import pytest
from fakes import DATA

import specmq_jax as sm
from checkpoints_tools import demo_model

GOLDEN = json.loads((DATA / "smollm2_135m_greedy.json").read_text())
NEAR_TIE = 0.01

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def target(demo_directory):
    return sm.load(demo_directory, expand=True)


@pytest.fixture(scope="module")
def plain(target):
    return sm.Decoder(target, config=sm.DecodeConfig(max_len=512))


def prompts(count):
    """Distinct real prompts: the golden ones and continuations cut at different places."""
    found = [g["input_ids"] for g in GOLDEN]
    for cut in range(4, 64, 4):
        found.extend([*g["input_ids"], *g["greedy_ids"][:cut]] for g in GOLDEN)
    return found[:count]


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda g: str(g["question_id"]))
def test_logits_equal_hugging_faces(target, golden):
    logits = np.asarray(sm.logits(target, golden["input_ids"])[-1])
    found = np.argsort(-logits, kind="stable")[:10]
    np.testing.assert_allclose(logits[golden["top_ids"]], golden["top_logits"], atol=0.02)
    assert found.tolist() == golden["top_ids"]


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda g: str(g["question_id"]))
def test_greedy_tokens_equal_hugging_faces_up_to_a_near_tie(plain, golden):
    expected = golden["greedy_ids"]
    ties = [i for i, gap in enumerate(golden["top2_gap"][:len(expected)]) if gap < NEAR_TIE]
    sure = ties[0] if ties else len(expected)
    found = plain.generate(golden["input_ids"], len(expected)).tokens.tolist()
    assert found[:sure] == expected[:sure]


@pytest.fixture(scope="module")
def expected(plain):
    return [(prompt, plain.generate(prompt, 16).tokens.tolist()) for prompt in prompts(20)]


@pytest.mark.parametrize("length", [1, 4, 7])
def test_a_low_bit_copy_drafts_and_changes_no_token(target, expected, length):
    draft = target.with_precision("w4a16-g64")
    assert mean_accept_length(target, sm.ChainDrafter(draft, length), expected) > 1.3


@pytest.mark.parametrize("version", [2, 3])
def test_the_packaged_heads_draft_and_change_no_token(target, expected, version):
    head = sm.load_head(demo_model.head(version), target)
    assert head.config.version == version
    drafter = sm.EagleDrafter(head, sm.TreeConfig(depth=3, top_k=4, size=12))
    assert mean_accept_length(target, drafter, expected) > 1.8


@pytest.mark.parametrize("precision", ["w8a8", "w4a8-qqq-g128"])
def test_speculation_changes_no_token_where_activations_are_rounded(demo_directory, precision):
    target = sm.load(demo_directory, precision=precision, expand=True)
    plain = sm.Decoder(target, config=sm.DecodeConfig(max_len=512))
    expected = [(prompt, plain.generate(prompt, 16).tokens.tolist()) for prompt in prompts(12)]
    tree = sm.TreeConfig(depth=3, top_k=4, size=12)
    drafters = [sm.EagleDrafter(sm.load_head(demo_model.head(version), target), tree) for version in (2, 3)]
    for drafter in (sm.ChainDrafter(target.with_precision("w4a16-g64"), 4), *drafters):
        assert mean_accept_length(target, drafter, expected) > 1.3


def mean_accept_length(target, drafter, expected):
    """Over all prompts, each of which must get the expected tokens."""
    decoder = sm.Decoder(target, drafter, sm.DecodeConfig(max_len=512))
    lengths = []
    for prompt, tokens in expected:
        found = decoder.generate(prompt, 16)
        assert found.tokens.tolist() == tokens
        lengths.extend(found.accept_lengths)
    return np.mean(lengths)
