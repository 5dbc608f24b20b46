"""Layers that a killed quantisation left belong to the model and the text that they were made from."""

import json
import os
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoints_tools.conversion import convert
from checkpoints_tools.quantize import quantize
from checkpoints_tools.quantizers import layerwise
from checkpoints_tools.quantizers.calibration import CalibrationFile
from checkpoints_tools.quantizers.gptq import Gptq
from checkpoints_tools.quantizers.layerwise import Recipe
from specmq_jax.errors import UserError

BASE = pathlib.Path(__file__).parents[2] / "data" / "checkpoints" / "fp16"
RECIPE = Recipe(gptq=Gptq(search=False))


@pytest.fixture
def killed(tmp_path, monkeypatch):
    """Kills a quantisation of a model behind its first layer, and goes on with it."""
    text = tmp_path / "text.txt"
    text.write_text("some words to look at " * 40)
    calibration = CalibrationFile(path=text, length=16, count=2)
    made = []

    def run(model, *, kill=False, rotation_seed=None):
        layer = layerwise.Quantiser._layer

        def counted(self, number, stream, kept):
            layer(self, number, stream, kept)
            made.append(number)
            if kill:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(layerwise.Quantiser, "_layer", counted)
            quantize(model, tmp_path / "made", "w4a16-g32", recipe=RECIPE, calibration=calibration, rotation_seed=rotation_seed)

    run.text = text
    return run


def replaced_weight(model):
    file = model / "model.safetensors"
    before, held = file.stat(), dict(load_file(file))
    name = sorted(held)[0]
    held[name] = held[name].copy()
    held[name].flat[0] += np.asarray(1, held[name].dtype)
    save_file(held, file, metadata={"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced_configuration(model):
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(text.replace('"rms_norm_eps": 1e-0', '"rms_norm_eps": 3e-0'))


@pytest.mark.parametrize(("native", "change", "rotation_seed"), [
    (False, replaced_weight, None), (False, replaced_configuration, None), (True, None, None), (True, None, 3)])
def test_a_source_replaced_in_place_is_another(tmp_path, killed, native, change, rotation_seed):
    model = convert(BASE, tmp_path / "model") if native else pathlib.Path(shutil.copytree(BASE, tmp_path / "model"))
    with pytest.raises(KeyboardInterrupt):
        killed(model, kill=True, rotation_seed=rotation_seed)
    if native:
        shutil.rmtree(model)
        convert(BASE, model, "bf16")
    else:
        change(model)
    with pytest.raises(UserError, match=r"other settings \(source content '\w+' there and '\w+' here"):
        killed(model, rotation_seed=rotation_seed)
    assert (tmp_path / ".made.layers" / "layer_000.safetensors").exists() and not (tmp_path / "made").exists()


def test_a_moved_source_goes_on(tmp_path, killed):
    model = shutil.copytree(BASE, tmp_path / "model")
    with pytest.raises(KeyboardInterrupt):
        killed(model, kill=True)
    killed(shutil.copytree(model, tmp_path / "elsewhere"))
    assert (tmp_path / "made").is_dir() and not (tmp_path / ".made.layers").exists()


def test_another_tokenizer_makes_other_layers(tmp_path, killed):
    model = pathlib.Path(shutil.copytree(BASE, tmp_path / "model"))
    with pytest.raises(KeyboardInterrupt):
        killed(model, kill=True)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="calibration tokens"):
        killed(model)
