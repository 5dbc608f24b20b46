"""A quantised lm_head is read in the layout of the layers' weights, and means what its values do."""

import json

import jax
import numpy as np
import packers
import pytest
from packers import LAYOUTS, SMALL, quantised_tensors
from refusals import refuse
from sources import random_tensors, write_hf

import specmq_jax as sm
from checkpoints_tools.conversion import convert, pack
from checkpoints_tools.export import export
from checkpoints_tools.readers import open_source


def with_head(layout, vocabulary=128):
    """The directory's tensors with an lm_head in the layout too, and its logical weight."""
    tensors, _ = quantised_tensors(layout, fused=False)
    head = layout.draw(np.random.default_rng(9), SMALL["hidden_size"], vocabulary)
    del tensors["lm_head.weight"]
    return tensors | {f"lm_head.{name}": values for name, values in layout.pack(head).items()}, head


@pytest.fixture
def even_vocabulary(monkeypatch):
    monkeypatch.setattr(packers, "SMALL", SMALL | {"vocab_size": 128})
    return packers.SMALL


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_quantised_lm_head_is_read_in_every_layout(tmp_path, even_vocabulary, name, tied):
    layout = LAYOUTS[name]
    tensors, head = with_head(layout)
    settings = None if layout.quantisation is None else {**layout.quantisation, "lm_head": True}
    if settings and "ignore" in settings:
        del settings["lm_head"], settings["ignore"]
    config = even_vocabulary | {"tie_word_embeddings": tied} | ({"quantization_config": settings} if settings else {})
    write_hf(tmp_path / "source", config, tensors)
    reader = open_source(tmp_path / "source")
    assert reader.formats.head.name == layout.linear and not reader.llama.tie_embeddings
    np.testing.assert_array_equal(reader.read("lm_head/w").dense(), head.dense())
    made = pack("lm_head/w", reader.read("lm_head/w"), reader.formats)
    found = reader.formats.head.unpack(jax.device_put(made), head.shape)
    np.testing.assert_allclose(found, head.dense(), rtol=1e-3 if "compressed" in name else 1e-6)


def test_a_model_with_a_quantised_lm_head_scores_as_its_values_do(tmp_path, even_vocabulary):
    tensors, _ = with_head(LAYOUTS["gptq-act-order"])
    settings = {**LAYOUTS["gptq-act-order"].quantisation, "lm_head": True}
    write_hf(tmp_path / "source", even_vocabulary | {"quantization_config": settings}, tensors)
    native = convert(tmp_path / "source", tmp_path / "native")
    found, expected = (np.asarray(sm.logits(sm.load(source), [1, 7, 90, 3])) for source in (
        native, convert(tmp_path / "source", tmp_path / "plain", "fp32")))
    assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected)
    exported = export(native, tmp_path / "exported", "gptq", precision="fp32")
    assert json.loads((exported / "config.json").read_text())["quantization_config"]["lm_head"] is True
    again = open_source(exported)
    np.testing.assert_array_equal(again.read("lm_head/w").dense(), open_source(tmp_path / "source").read("lm_head/w").dense())


def test_an_lm_head_of_another_kind_than_the_layers_is_exported_as_values(tmp_path, even_vocabulary):
    write_hf(tmp_path / "source", even_vocabulary, random_tensors(even_vocabulary, np.float16))
    native = convert(tmp_path / "source", tmp_path / "native", "w4a16", "w4a16-g32")
    exported = export(native, tmp_path / "exported", "gptq")
    assert json.loads((exported / "config.json").read_text())["quantization_config"]["lm_head"] is False
    expected = open_source(native).read("lm_head/w").dense()
    np.testing.assert_array_equal(open_source(exported).read("lm_head/w"), np.asarray(expected).astype(np.float16))


def test_an_lm_head_both_plain_and_quantised_is_refused(tmp_path, even_vocabulary):
    tensors, _ = with_head(LAYOUTS["gptq-v1"])
    tensors["lm_head.weight"] = np.zeros((128, 256), np.float16)
    write_hf(tmp_path / "source", even_vocabulary | {"quantization_config": dict(LAYOUTS["gptq-v1"].quantisation)}, tensors)
    refuse(tmp_path, tmp_path / "source", "holds the tensor lm_head.weight")
