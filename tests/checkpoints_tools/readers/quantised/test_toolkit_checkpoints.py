"""Checkpoints that real toolkits wrote mean to this program what they mean to Hugging Face's transformers."""

import numpy as np
import pytest
from sources import SHARED

import specmq_jax as sm
from checkpoints_tools.conversion import convert
from specmq_jax.loading.checkpoint import read_metadata

_PICKLED = ("qoq-channel", "qoq-g128", "w8a8")
_FORMATS = {"fp16": "fp16", "rot": "fp16", "gptq-v1": "w4a16", "gptq-v1-act-order": "w4a16-act-order", "marlin-g128": "w4a16",
            "qqq-channel": "w4a8-qqq", "qqq-g128": "w4a8-qqq-g128", "qoq-channel": "w4a8-qoq", "qoq-g128": "w4a8-qoq-g128",
            "w8a8": "w8a8"}


@pytest.mark.shared
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.torch) if name in _PICKLED else name for name in _FORMATS])
def test_logits_are_those_of_the_dequantised_weights(tmp_path, name):
    golden = np.load(SHARED / name / "expected_logits.npz")
    as_stored = convert(SHARED / name, tmp_path / "stored")
    assert read_metadata(as_stored)["formats"]["linear"] == _FORMATS[name]
    in_f32 = sm.load(convert(SHARED / name, tmp_path / "f32", "fp32"))
    found = np.asarray(sm.logits(in_f32, golden["input_ids"].reshape(-1)))
    expected = golden["logits"].reshape(found.shape)
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)
    # the integers as they are, with the activations rounded to 8 bits where the precision says so
    found = np.asarray(sm.logits(sm.load(as_stored), golden["input_ids"].reshape(-1)))
    tolerance = 3e-2 if "a8" in _FORMATS[name] else 1e-3
    assert np.linalg.norm(found - expected) < tolerance * np.linalg.norm(expected)
