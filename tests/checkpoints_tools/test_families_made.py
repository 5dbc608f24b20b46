"""What is made of models that differ from Llama: calibrated and rotated ones, or one line that says why not."""

import numpy as np
import pytest
from family_models import MODELS, VOCAB
from sources import TINY, write_hf

import specmq_jax as sm
from checkpoints_tools import train_eagle
from checkpoints_tools.conversion import convert
from checkpoints_tools.export import export
from checkpoints_tools.inspect import describe
from checkpoints_tools.quantize import quantize
from checkpoints_tools.quantizers.calibration import Calibration, CalibrationFile
from checkpoints_tools.quantizers.gptq import Gptq
from checkpoints_tools.quantizers.layerwise import Quantiser, Recipe
from checkpoints_tools.quantizers.smooth import INPUTS, Smoothing
from checkpoints_tools.readers import open_source
from checkpoints_tools.rotate import rotate
from specmq_jax.network.parameters import Formats

TOKENS = np.random.default_rng(3).integers(3, VOCAB, (8, 64)).astype(np.int32)
CALIBRATION = Calibration(tokens=TOKENS, name="random", sha256="")


def calibrated(source, destination, precision, recipe):
    target = Formats.named({"linear": precision, "head": "fp32", "embed": "fp32"})
    quantiser = Quantiser(open_source(source), target, recipe, CALIBRATION)
    return quantiser.write(destination, recipe.describe(), content="", digests={})


@pytest.mark.parametrize("name", [
    "qwen3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "qwen2", "phi3-partial"))])
def test_a_smoothed_model_is_the_same_function(tmp_path, name):
    tensors = MODELS[name].write(tmp_path / "source")
    recipe = Recipe(smoothing=Smoothing(alpha=0.5, inputs=tuple(INPUTS)))
    made = sm.load(calibrated(tmp_path / "source", tmp_path / "made", "fp32", recipe))
    np.testing.assert_allclose(sm.logits(made, TOKENS[0]), MODELS[name].decoder.logits(tensors, TOKENS[0]), atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_gptq_comes_nearer_to_the_model_than_rounding(tmp_path, name):
    tensors = MODELS[name].write(tmp_path / "source")
    made = calibrated(tmp_path / "source", tmp_path / "made", "w4a16-g32", Recipe(gptq=Gptq()))
    expected = MODELS[name].decoder.logits(tensors, TOKENS[0])
    error, other = (np.linalg.norm(sm.logits(model, TOKENS[0]) - expected) for model in (
        sm.load(made), sm.load(convert(tmp_path / "source", tmp_path / "plain"), "w4a16-g32")))
    assert error < 0.95 * other


@pytest.mark.parametrize("name", [
    "qwen3", "granite",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "mistral", "qwen2-window", "smollm3", "phi3-partial"))])
def test_a_rotated_model_is_the_same_function(tmp_path, name):
    tensors = MODELS[name].write(tmp_path / "source")
    made = sm.load(rotate(tmp_path / "source", tmp_path / "made", seed=1))
    np.testing.assert_allclose(sm.logits(made, TOKENS[0]), MODELS[name].decoder.logits(tensors, TOKENS[0]), atol=2e-4)


@pytest.mark.parametrize(("name", "fields"), [("gemma2", "block"), ("olmo2", "block"), ("stablelm", "norm")])
def test_what_can_not_be_rotated_is_refused(tmp_path, name, fields):
    MODELS[name].write(tmp_path / "source")
    with pytest.raises(sm.UserError, match=f"rotating is not supported for models of type {name} .*: .*{fields}"):
        rotate(tmp_path / "source", tmp_path / "made", seed=1)


def test_what_can_not_be_calibrated_is_refused(tmp_path):
    MODELS["mistral"].write(tmp_path / "source")
    with pytest.raises(sm.UserError, match="a calibration text is not supported for models of type mistral .*: windows"):
        quantize(tmp_path / "source", tmp_path / "made", "w4a16-g32", recipe=Recipe(gptq=Gptq()),
                 calibration=CalibrationFile(path=tmp_path / "text"))


def test_a_model_that_differs_from_llama_is_not_exported(tmp_path):
    MODELS["qwen3"].write(tmp_path / "source")
    with pytest.raises(sm.UserError, match="exporting is not supported for models of type qwen3 .*: qk_norm"):
        export(tmp_path / "source", tmp_path / "made", "hf")


def test_no_head_is_trained_for_a_model_that_differs_from_llama(tmp_path):
    MODELS["qwen3"].write(tmp_path / "source")
    target = sm.load(convert(tmp_path / "source", tmp_path / "made"))
    with pytest.raises(sm.UserError, match="training a head is not supported for models of type qwen3"):
        train_eagle._check(target, train_eagle.Settings(prompts=None, work_dir=tmp_path, answers=tmp_path, slots=None, length=8,
                                                        batch=1, drafts=1))


def test_inspect_tells_the_family_and_its_fields(tmp_path):
    MODELS["gemma2"].write(tmp_path / "source")
    found = dict(describe(open_source(tmp_path / "source")))["family"]
    assert found.startswith("gemma2") and all(field in found for field in ("windows", "score_cap", "block"))
    write_hf(tmp_path / "llama", TINY)
    assert dict(describe(open_source(tmp_path / "llama")))["family"] == "llama, with nothing beyond Llama"
