"""An lm_head of fewer bits: what it scores, what an EAGLE head that borrows it drafts, and parts of it."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import DATA
from safetensors.numpy import load_file, save_file

import specmq_jax as sm
from checkpoints_tools.conversion import convert
from specmq_jax import formats
from specmq_jax.decoding.drafters.vocabulary import cut_vocabulary
from specmq_jax.loading import checkpoint

BASE, HEAD = DATA / "checkpoints" / "fp16", DATA / "eagle" / "eagle2_head"
MOST_ERROR = {"w8a16": 0.01, "w8a8": 0.03, "w4a16-g64": 0.15, "w4a8-qoq": 0.25}


@pytest.mark.parametrize("precision", [
    "w8a8", "w4a16-g64", *(pytest.param(precision, marks=pytest.mark.slow) for precision in ("w8a16", "w4a8-qoq"))])
def test_an_lm_head_of_fewer_bits_scores_alike_and_drafts(tmp_path, precision):
    made = convert(BASE, tmp_path / "made", head_precision=precision)
    assert checkpoint.read_metadata(made)["formats"] == {"linear": "fp16", "head": precision, "embed": "fp16"}
    plain, model = sm.load(BASE), sm.load(made)
    prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, 20)
    expected, found = (np.asarray(sm.logits(each, prompt)) for each in (plain, model))
    assert 0 < np.linalg.norm(found - expected) < MOST_ERROR[precision] * np.linalg.norm(expected)
    head, tree = sm.load_head(HEAD, model), sm.TreeConfig(depth=3, top_k=4, size=12)
    config = sm.DecodeConfig(max_len=128)
    tokens = sm.Decoder(model, config=config).generate(prompt, 24).tokens.tolist()
    ranked = np.argsort(-np.bincount(tokens, minlength=model.config.vocab_size), kind="stable").astype(np.int32)
    for drafting in (head, cut_vocabulary(head, ranked, 16)):
        result = sm.Decoder(model, sm.EagleDrafter(drafting, tree), config).generate(prompt, 24)
        assert result.tokens.tolist() == tokens


def test_a_tied_lm_head_is_refused(tmp_path):
    config = json.loads((BASE / "config.json").read_text()) | {"tie_word_embeddings": True}
    shutil.copytree(BASE, tmp_path / "tied")
    (tmp_path / "tied" / "config.json").write_text(json.dumps(config))
    tensors = load_file(BASE / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "tied" / "model.safetensors")
    with pytest.raises(sm.UserError, match="has no lm_head of its own: its embedding table serves as one, and stays dense"):
        convert(tmp_path / "tied", tmp_path / "made", head_precision="w8a16")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", formats.names())
def test_the_weight_of_some_outputs_is_that_part_of_the_whole(name):
    form, shape = formats.get(name), (256, 40)
    weight = form.pack(jax.random.normal(jax.random.key(0), shape))
    kept = jnp.asarray([3, 4, 17, 39])
    whole, part = form.unpack(weight, shape), form.unpack(form.outputs(weight, kept), (256, 4))
    np.testing.assert_array_equal(part, whole[:, kept])
