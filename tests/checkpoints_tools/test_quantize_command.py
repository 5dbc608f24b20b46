"""Quantising a model for a calibration text: what is written, what is recorded, and what happens to a killed run."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sources import DATA, TINY, write_hf

import specmq_jax as sm
from checkpoints_tools import quantize as command
from checkpoints_tools.conversion import convert
from checkpoints_tools.quantize import quantize
from checkpoints_tools.quantizers import layerwise
from checkpoints_tools.quantizers.calibration import CalibrationFile
from checkpoints_tools.quantizers.gptq import Gptq
from checkpoints_tools.quantizers.layerwise import Recipe
from checkpoints_tools.quantizers.smooth import INPUTS, Smoothing
from checkpoints_tools.quantizers.stages import ATTENTION_NORM, LINEAR, MLP_NORM, linear_inputs, walk
from specmq_jax import formats
from specmq_jax.errors import UserError
from specmq_jax.loading.checkpoint import CheckpointReader, read_metadata

MODEL = DATA / "checkpoints" / "fp16"
TOKENS = np.random.default_rng(0).integers(3, 97, 24)
GPTQ = Recipe(gptq=Gptq())
PRECISION = "w4a8-qoq-g128"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = np.random.default_rng(0).choice("the cat sat on a mat while rain fell and nobody came home".split(), 1200)
    path.write_text(" ".join(words))
    return path


@pytest.fixture(scope="module")
def calibration(text) -> CalibrationFile:
    return CalibrationFile(path=text, length=64, count=6)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> pathlib.Path:
    """A random fp32 model with the tokenizer of another."""
    directory = tmp_path_factory.mktemp("small") / "model"
    write_hf(directory, TINY | {"vocab_size": 512})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MODEL / name, directory / name)
    return directory


def weights(directory) -> list[np.ndarray]:
    reader = CheckpointReader(directory)
    return [np.asarray(leaf) for path in reader.shapes for leaf in jax.tree.leaves(reader.read(path))]


def layer_of(reader, i: int) -> dict[str, jax.Array]:
    names = (*LINEAR, ATTENTION_NORM, MLP_NORM)
    return {name: jnp.asarray(reader.read(f"layers_{i}/{name}"), jnp.float32) for name in names}


def logits_error(found, expected) -> float:
    return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


@pytest.mark.slow  # test_quantizers has a layer of each format
def test_gptq_comes_nearer_to_the_model_than_rounding(tmp_path, small, calibration):
    tokens = calibration.read(command._tokenizer(command.open_source(small)), sm.LlamaConfig.from_directory(small)).tokens[0]
    expected = sm.logits(sm.load(convert(small, tmp_path / "plain")), tokens)
    made = quantize(small, tmp_path / "gptq", PRECISION, recipe=GPTQ, calibration=calibration)
    nearest = quantize(small, tmp_path / "rtn", PRECISION)
    error, other = (logits_error(sm.logits(sm.load(path), tokens), expected) for path in (made, nearest))
    assert error < 0.8 * other


def test_what_was_done_is_recorded(tmp_path, small, calibration):
    made = quantize(small, tmp_path / "made", "w8a8", recipe=Recipe(smoothing=Smoothing(alpha=0.5, inputs=("qkv",))),
                    calibration=calibration)
    recorded = read_metadata(made)["quantisation"]
    text = recorded.pop("calibration")
    assert recorded == {"algorithm": "rtn", "gptq": None, "smoothing": {"alpha": 0.5, "inputs": ["qkv"]},
                        "rotation_seed": None}
    assert text["file"] == "text.txt" and len(text["sha256"]) == 64 and text["tokens"] == 6 * 64
    assert read_metadata(quantize(small, tmp_path / "plain", "w4a16-g32"))["quantisation"]["algorithm"] == "rtn"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "plain"]
    assert (made / "tokenizer.json").read_bytes() == (small / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("inputs", [("qkv", "gate_up"), tuple(INPUTS)])
@pytest.mark.parametrize("alpha", [0.5, 0.9])
def test_a_smoothed_model_is_the_same_function(tmp_path, small, calibration, alpha, inputs):
    plain = sm.load(convert(small, tmp_path / "plain"))
    made = quantize(small, tmp_path / "made", "fp32", recipe=Recipe(smoothing=Smoothing(alpha=alpha, inputs=inputs)),
                    calibration=calibration)
    smoothed = sm.load(made)
    assert logits_error(sm.logits(smoothed, TOKENS), sm.logits(plain, TOKENS)) < 1e-4
    changed = CheckpointReader(made).read("layers_1/attention_norm/scale")
    assert not np.allclose(changed, CheckpointReader(tmp_path / "plain").read("layers_1/attention_norm/scale"))


@pytest.mark.parametrize("name", list(INPUTS))
def test_smoothing_evens_inputs_and_weights_out_by_the_papers_formula(small, name):
    """max|x| / s and max|w| s are equal at alpha = 0.5, up to the one factor that all channels share (arXiv:2211.10438); query
    heads that share a head of v share their channels' numbers."""
    reader, path = command.open_source(small), INPUTS[name]
    config, stream = reader.llama, np.random.default_rng(0).standard_normal((2, 16, 64)).astype(np.float32)
    stream[..., 7] *= 40
    layer = layer_of(reader, 0)
    smoothed = Smoothing(alpha=0.5, inputs=(name,)).apply(config, layer, stream, formats.get("w8a8"))
    largest = np.max([np.abs(linear_inputs(config, smoothed, rows)[path]).max(0) for rows in stream], axis=0)
    heaviest = np.abs(np.asarray(smoothed[path])).max(1)
    if name == "o":
        largest, heaviest = (part.reshape(2, 2, 16).max(1).reshape(-1) for part in (largest, heaviest))
    np.testing.assert_allclose(largest / heaviest, np.full_like(largest, (largest / heaviest).mean()), rtol=1e-3)
    assert not np.allclose(smoothed[path], layer[path], rtol=0.1)


def test_searched_smoothing_errs_less_where_activations_have_outliers(tmp_path, small, calibration):
    tensors = write_hf(tmp_path / "source", TINY | {"vocab_size": 512})
    for name, values in tensors.items():
        if name.endswith("layernorm.weight"):
            values[[5, 20]] *= 60
    write_hf(tmp_path / "source", TINY | {"vocab_size": 512}, tensors)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MODEL / name, tmp_path / "source" / name)
    expected = sm.logits(sm.load(convert(tmp_path / "source", tmp_path / "plain")), TOKENS)
    made = quantize(tmp_path / "source", tmp_path / "made", "w8a8", calibration=calibration,
                    recipe=Recipe(smoothing=Smoothing(alpha=None, inputs=("qkv", "gate_up"))))
    nearest = quantize(tmp_path / "source", tmp_path / "nearest", "w8a8")
    error, other = (logits_error(sm.logits(sm.load(path), TOKENS), expected) for path in (made, nearest))
    assert error < 0.7 * other


def test_the_parts_of_a_layer_are_the_models(small):
    """Activations in the stages' arithmetic equal those of the Flax module."""
    model, reader = sm.load(small), command.open_source(small)
    stream = np.asarray(reader.read("embed/table"))[TOKENS][None].astype(np.float32)
    for i in range(reader.llama.num_layers):
        layer = layer_of(reader, i)

        def given(name, inputs, layer=layer):
            for x in inputs:
                assert x.shape[1] == layer[name].shape[0]
            return layer[name]

        walk(reader.llama, layer, stream, given)
    hidden = stream[0] / np.sqrt((stream[0]**2).mean(1, keepdims=True) + reader.llama.rms_norm_eps) * reader.read("norm/scale")
    assert logits_error(jnp.asarray(hidden @ reader.read("lm_head/w")), sm.logits(model, TOKENS)) < 1e-5


@pytest.mark.parametrize("recipe", [GPTQ, Recipe(gptq=Gptq(), smoothing=Smoothing(alpha=None, inputs=tuple(INPUTS)))])
def test_a_killed_run_goes_on_and_makes_the_same_checkpoint(tmp_path, small, calibration, monkeypatch, recipe):
    whole = quantize(small, tmp_path / "whole", PRECISION, recipe=recipe, calibration=calibration)
    step, layers = layerwise.Quantiser._quantise, []

    def dying(self, path, weight, inputs):
        layers.append(path)
        if path == "layers_1/mlp/gate_up/w":
            raise KeyboardInterrupt
        return step(self, path, weight, inputs)

    monkeypatch.setattr(layerwise.Quantiser, "_quantise", dying)
    with pytest.raises(KeyboardInterrupt):
        quantize(small, tmp_path / "made", PRECISION, recipe=recipe, calibration=calibration)
    assert not (tmp_path / "made").exists()
    assert "layer_000.safetensors" in {path.name for path in (tmp_path / ".made.layers").iterdir()}
    monkeypatch.setattr(layerwise.Quantiser, "_quantise", lambda self, path, *rest: layers.append(path) or
                        step(self, path, *rest))
    layers.clear()
    made = quantize(small, tmp_path / "made", PRECISION, recipe=recipe, calibration=calibration)
    assert {path.split("/")[0] for path in layers} == {"layers_1"}
    for found, expected in zip(weights(made), weights(whole), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert read_metadata(made)["quantisation"] == read_metadata(whole)["quantisation"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "whole"]


def test_other_settings_do_not_mix_with_a_killed_runs_layers(tmp_path, small, calibration, monkeypatch):
    def dying(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(layerwise, "walk", dying)
        with pytest.raises(KeyboardInterrupt):
            quantize(small, tmp_path / "made", "w8a8", recipe=GPTQ, calibration=calibration)
    for precision, recipe, message in (("w4a16", GPTQ, "linear 'w8a8' there and 'w4a16' here"),
                                       ("w8a8", Recipe(gptq=Gptq(damping=0.1)), "'damping': 0.01.* there and .*0.1")):
        with pytest.raises(UserError, match=message) as caught:
            quantize(small, tmp_path / "made", precision, recipe=recipe, calibration=calibration)
        assert "\n" not in str(caught.value) and ".made.layers" in str(caught.value)


def test_a_damaged_layer_file_is_named(tmp_path, small, calibration, monkeypatch):
    def dying(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(layerwise, "CheckpointWriter", dying)
        with pytest.raises(KeyboardInterrupt):
            quantize(small, tmp_path / "made", PRECISION, recipe=GPTQ, calibration=calibration)
    (tmp_path / ".made.layers" / "layer_001.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="layer_001.safetensors is damaged"):
        quantize(small, tmp_path / "made", PRECISION, recipe=GPTQ, calibration=calibration)
    assert not (tmp_path / "made").exists()


def test_a_rotated_model_is_quantised_and_carries_its_rotation(tmp_path, small, calibration):
    made = quantize(small, tmp_path / "made", PRECISION, recipe=GPTQ, calibration=calibration, rotation_seed=3)
    plain = quantize(small, tmp_path / "plain", PRECISION, rotation_seed=3)
    assert (made / "rotation.safetensors").is_file() and (plain / "rotation.safetensors").is_file()
    assert read_metadata(made)["quantisation"]["rotation_seed"] == 3
    assert np.isfinite(sm.logits(sm.load(made), TOKENS)).all()


def test_a_quantised_source_is_refused(tmp_path, calibration):
    with pytest.raises(UserError, match="holds w4a16 weights, which would be rounded a second time"):
        quantize(DATA / "checkpoints" / "gptq-v1", tmp_path / "made", "w8a8", recipe=GPTQ, calibration=calibration)


@pytest.mark.parametrize(("precision", "recipe", "content", "message"), [
    ("fp16", GPTQ, "word " * 500, "fp16 weights are not quantised"),
    ("w8a8", GPTQ, None, "GPTQ and smoothing look at a calibration text"),
    ("w8a8", Recipe(), "word " * 500, "rounding to nearest looks at no calibration text"),
    ("w8a8", GPTQ, " \n", "is empty"),
    ("w8a8", GPTQ, "too short", r"has \d+ tokens, which fill no sequence of 64"),
])
def test_settings_that_do_not_fit_are_found_before_any_work(tmp_path, small, precision, recipe, content, message):
    calibration = None
    if content is not None:
        (tmp_path / "text.txt").write_text(content)
        calibration = CalibrationFile(path=tmp_path / "text.txt", length=64, count=4)
    with pytest.raises(UserError, match=message) as caught:
        quantize(small, tmp_path / "made", precision, recipe=recipe, calibration=calibration)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"] * (content is not None)


@pytest.mark.parametrize(("name", "line", "message"), [
    ("a.jsonl", "{broken", "line 2: it is not valid JSON"),
    ("a.jsonl", '{"prompt": "x"}', r'line 2: expected \{"text": text\} or'),
    ("a.jsonl", '{"turns": []}', r'line 2: expected \{"text": text\} or'),
    ("a.jsonl", "[1]", "line 2: expected a JSON object; found a list"),
])
def test_a_bad_calibration_line_is_named(tmp_path, small, name, line, message):
    (tmp_path / name).write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        quantize(small, tmp_path / "made", "w8a8", recipe=GPTQ, calibration=CalibrationFile(path=tmp_path / name, length=8))


def test_a_missing_text_a_binary_one_and_a_long_sequence(tmp_path, small):
    def calibrate(path, length=8):
        quantize(small, tmp_path / "made", "w8a8", recipe=GPTQ, calibration=CalibrationFile(path=path, length=length))

    with pytest.raises(UserError, match="absent.txt does not exist"):
        calibrate(tmp_path / "absent.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        calibrate(tmp_path / "binary")
    with pytest.raises(UserError, match="longer than the model's 256 positions"):
        calibrate(tmp_path / "binary", 300)


def test_every_way_of_writing_a_text_gives_its_tokens(tmp_path, small):
    tokenizer, config = command._tokenizer(command.open_source(small)), sm.LlamaConfig.from_directory(small)
    (tmp_path / "a.txt").write_text("one two three")
    (tmp_path / "a.jsonl").write_text('{"text": "one two three"}\n\n' + json.dumps({"turns": ["four five", "six"]}) + "\n")
    plain, lines = (CalibrationFile(path=tmp_path / name, length=1, count=1000).read(tokenizer, config)
                    for name in ("a.txt", "a.jsonl"))
    expected = tokenizer.encode("one two three")
    assert plain.tokens[:, 0].tolist() == expected
    assert lines.tokens[:len(expected), 0].tolist() == expected
    rest = tokenizer.decode(lines.tokens[len(expected):, 0])
    assert "four five" in rest and "six" in rest


def test_sequences_are_spread_over_the_text(tmp_path, small, text):
    tokenizer, config = command._tokenizer(command.open_source(small)), sm.LlamaConfig.from_directory(small)
    everything = CalibrationFile(path=text, length=16, count=10**6).read(tokenizer, config).tokens
    some = CalibrationFile(path=text, length=16, count=5).read(tokenizer, config).tokens
    places = [int(np.flatnonzero((everything == row).all(1))[0]) for row in some]
    assert len(some) == 5 and places == sorted(places) and places[-1] > len(everything) // 2


@pytest.mark.parametrize(("flag", "message"), [
    ("--smooth=1.5", "--smooth=1.5 is neither 'auto' nor a number from 0 to 1"),
    ("--smooth_inputs=qkv,v", "'v' is not known; choose from qkv, o, gate_up, down"),
])
def test_a_wrong_flag_is_one_line(tmp_path, small, flag, message):
    result = subprocess.run([sys.executable, "-m", "checkpoints_tools.quantize", small, tmp_path / "made", "--precision=w8a8",
                             "--smooth=auto", flag], cwd=pathlib.Path(__file__).parents[2], capture_output=True, text=True)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
