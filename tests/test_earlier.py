"""What an earlier commit wrote loads, and decodes as it did there."""

import json
import pathlib

import jax
import numpy as np
import pytest

import specmq_jax as sm
from specmq_jax.loading.checkpoint import read_metadata

EARLIER = pathlib.Path(__file__).parent / "data" / "earlier"
EXPECTED = json.loads((EARLIER / "expected.json").read_text())
PROMPT, TREE = [3, 14, 15, 9, 26, 5], sm.TreeConfig(depth=3, top_k=3, size=10)


@pytest.fixture(scope="module", params=EXPECTED)
def loaded(request):
    """A target that was written then, and what it did then."""
    assert read_metadata(EARLIER / request.param)["format_version"] == 4
    target = sm.load(EARLIER / request.param)
    assert target.precision == request.param
    return target, EXPECTED[request.param]


def test_an_earlier_checkpoint_scores_as_it_did(loaded):
    target, expected = loaded
    logits = np.asarray(sm.logits(target, [*PROMPT, *expected["tokens"]]))
    assert logits[len(PROMPT) - 1:-1].argmax(1).tolist() == expected["tokens"]
    np.testing.assert_allclose(logits[-1], expected["logits"], atol=expected["clear"] / 4)


@pytest.mark.parametrize("version", [2, 3])
def test_an_earlier_head_drafts_and_its_target_decodes_as_they_did(loaded, version):
    target, expected = loaded
    drafter = sm.EagleDrafter(sm.load_head(EARLIER / f"eagle{version}", target), TREE)
    decoder = sm.Decoder(target, drafter, sm.DecodeConfig(max_len=128))
    made, state = decoder.generate(PROMPT, len(expected["tokens"])), decoder.prefill(PROMPT)
    draft, _ = jax.jit(drafter.propose)(drafter.params, state.drafter, state.tokens[len(PROMPT)])
    assert made.tokens.tolist() == expected["tokens"]
    assert {"draft": draft.tokens.tolist(), "parent": draft.parent.tolist(),
            "accept_lengths": made.accept_lengths.tolist()} == expected[f"eagle{version}"]
