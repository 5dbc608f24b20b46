"""Conversion keeps every value, in whatever layout it came, and leaves nothing behind when it fails."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from sources import DATA, TINY, logical, random_tensors, write_gguf, write_hf
from typed import commands, fails_with

from checkpoints_tools import conversion as convert_module
from checkpoints_tools.conversion import convert, prepare
from checkpoints_tools.readers import open_source
from specmq_jax import formats
from specmq_jax.errors import UserError
from specmq_jax.loading import checkpoint

ROOT = pathlib.Path(__file__).parents[2]
TIED = TINY | {"tie_word_embeddings": True}


def flat(directory) -> dict[str, np.ndarray]:
    """The unpacked f32 weights of a native checkpoint by path."""
    reader = checkpoint.CheckpointReader(directory)
    found = {}
    for path, shape in reader.shapes.items():
        weight = reader.read(path)
        plain = isinstance(weight, jax.Array)
        found[path] = np.asarray(weight if plain else reader.formats.of(path).unpack(weight, shape), np.float32)
    return found


def assert_equal(directory, tensors, config):
    found, expected = flat(directory), logical(tensors, config)
    assert found.keys() == expected.keys()
    for path in expected:
        np.testing.assert_array_equal(found[path], expected[path].astype(np.float32), err_msg=path)


@pytest.mark.parametrize(("dtype", "name"), [(np.float32, "fp32"), (np.float16, "fp16"), (ml_dtypes.bfloat16, "bf16")])
@pytest.mark.parametrize("config", [TINY, TIED], ids=["untied", "tied"])
def test_every_value_survives_in_the_sources_precision(tmp_path, dtype, name, config):
    tensors = write_hf(tmp_path / "source", config, random_tensors(config, dtype))
    made = convert(tmp_path / "source", tmp_path / "made")
    assert checkpoint.read_metadata(made)["formats"] == {"linear": name, "head": name, "embed": name}
    assert_equal(made, tensors, config)


def test_shards_are_joined_by_the_index(tmp_path):
    tensors = write_hf(tmp_path / "source", shards=3)
    assert_equal(convert(tmp_path / "source", tmp_path / "made"), tensors, TINY)


def test_fused_modules_equal_their_parts(tmp_path):
    tensors = random_tensors(TINY)
    fused = dict(tensors)
    for i in range(TINY["num_hidden_layers"]):
        for name, parts in (("self_attn.qkv_proj", "qkv"), ("mlp.gate_up_proj", ("gate", "up"))):
            block = f"model.layers.{i}.{name.split('.')[0]}"
            fused[f"model.layers.{i}.{name}.weight"] = np.concatenate(
                [fused.pop(f"{block}.{part}_proj.weight") for part in parts])
    write_hf(tmp_path / "source", tensors=fused)
    assert_equal(convert(tmp_path / "source", tmp_path / "made"), tensors, TINY)


def write_small_shards(monkeypatch):
    monkeypatch.setattr(convert_module, "CheckpointWriter",
                        functools.partial(checkpoint.CheckpointWriter, shard_bytes=20_000))


def test_small_shards_hold_what_one_large_one_does(tmp_path, monkeypatch):
    tensors = write_hf(tmp_path / "source")
    write_small_shards(monkeypatch)
    made = convert(tmp_path / "source", tmp_path / "made")
    assert checkpoint.read_metadata(made)["shards"] > 4
    assert_equal(made, tensors, TINY)


def test_another_precision_is_round_to_nearest_of_the_source(tmp_path):
    tensors = write_hf(tmp_path / "source")
    made = convert(tmp_path / "source", tmp_path / "made", "w4a16-g32")
    assert checkpoint.read_metadata(made)["formats"] == {"linear": "w4a16-g32", "head": "fp16", "embed": "fp16"}
    int4, found = formats.get("w4a16-g32"), flat(made)
    for path, values in logical(tensors, TINY).items():
        if "/attention/" in path or "/mlp/" in path:
            np.testing.assert_array_equal(found[path], int4.unpack(int4.pack(values), values.shape))


def test_a_native_checkpoint_is_a_source_for_another_precision(tmp_path):
    write_hf(tmp_path / "source")
    native = convert(tmp_path / "source", tmp_path / "native")
    twice = flat(convert(native, tmp_path / "twice", "w4a16-g32"))
    once = flat(convert(tmp_path / "source", tmp_path / "once", "w4a16-g32"))
    for path in once:
        np.testing.assert_array_equal(twice[path], once[path])
    sources = [checkpoint.read_metadata(tmp_path / name)["sha256"] for name in ("native", "twice", "once")]
    assert sources[0] == sources[1] == sources[2] != {}


def test_converting_to_the_precision_it_has_is_refused(tmp_path):
    write_hf(tmp_path / "source")
    native = convert(tmp_path / "source", tmp_path / "native")
    for precision in (None, "fp32"):
        with pytest.raises(UserError, match="native checkpoint of precision fp32 already"):
            convert(native, tmp_path / "again", precision)


def test_tokenizer_and_generation_config_come_along(tmp_path):
    made = convert(DATA / "checkpoints" / "fp16", tmp_path / "made")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (made / name).read_bytes() == (DATA / "checkpoints" / "fp16" / name).read_bytes()


def test_prepare_converts_once_and_again_when_the_source_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECMQ_CACHE", str(tmp_path / "cache"))
    write_hf(tmp_path / "source")
    first = prepare(tmp_path / "source")
    assert first.is_relative_to(tmp_path / "cache")
    stamp = (first / "specmq.json").stat().st_mtime_ns
    assert prepare(tmp_path / "source") == first
    assert (first / "specmq.json").stat().st_mtime_ns == stamp
    assert prepare(first) == first
    write_hf(tmp_path / "source", tensors=random_tensors(TINY, np.float16))
    assert prepare(tmp_path / "source") != first


def test_prepare_of_a_gguf_and_a_race_with_another_process(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECMQ_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "model.gguf", TINY, random_tensors(TINY))
    first = prepare(tmp_path / "model.gguf")
    assert first.name.startswith("model-")
    answers = iter([False, True])
    monkeypatch.setattr(convert_module, "is_native", lambda path: next(answers))
    reader = open_source(tmp_path / "model.gguf")
    assert convert_module.write_once(reader, first) == first


@pytest.mark.parametrize("failure", [KeyboardInterrupt, UserError("no"), OSError(28, "No space left on device")])
def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch, failure):
    write_hf(tmp_path / "source")
    write_small_shards(monkeypatch)
    reader = open_source(tmp_path / "source")
    read, count = reader.read, 0

    def failing(path):
        nonlocal count
        count += 1
        if count == 5:
            raise failure
        return read(path)

    monkeypatch.setattr(reader, "read", failing)
    with pytest.raises(KeyboardInterrupt if failure is KeyboardInterrupt else UserError):
        convert_module.write(reader, tmp_path / "made", reader.formats)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_values_that_fp16_can_not_hold_are_named(tmp_path):
    tensors = random_tensors(TINY)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = 1e6
    write_hf(tmp_path / "source", tensors=tensors)
    with pytest.raises(UserError, match="layers_1/mlp/down/w holds values beyond the range of float16"):
        convert(tmp_path / "source", tmp_path / "made", "fp16")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = np.nan
    write_hf(tmp_path / "source", tensors=tensors)
    with pytest.raises(UserError, match="layers_1/mlp/down/w holds values that are not finite"):
        convert(tmp_path / "source", tmp_path / "made")
    assert not (tmp_path / "made").exists()


def command(module, *arguments, **environment):
    return subprocess.run([sys.executable, "-m", f"checkpoints_tools.{module}", *map(str, arguments)], cwd=ROOT,
                          capture_output=True, text=True, env=os.environ | environment)


def test_commands_convert_quantise_and_inspect(tmp_path):
    write_hf(tmp_path / "source")
    made = command("convert", tmp_path / "source", tmp_path / "made")
    assert made.returncode == 0 and made.stdout == f"{tmp_path / 'made'}\n"
    quantised = command("quantize", tmp_path / "made", tmp_path / "small", "--precision=w4a16-g64")
    assert quantised.returncode == 0 and quantised.stdout == f"{tmp_path / 'small'}\n"
    shown = command("inspect", tmp_path / "small")
    assert shown.returncode == 0
    for text in ("native", "LlamaForCausalLM", "linear w4a16-g64, head fp16, embed fp16", "64 / 96"):
        assert text in shown.stdout


def test_a_mistake_at_the_command_line_is_one_line_and_exit_code_2(tmp_path):
    write_hf(tmp_path / "source")
    absent, source, made = (tmp_path / name for name in ("absent", "source", "made"))
    mistakes = {
        ("convert", absent, made): "absent does not exist", ("convert", absent): "expected 2 arguments, found 1",
        ("convert", source, made, "--precision=w3"): "precision 'w3' is not known",
        ("convert", source, source): "exists and is not empty", ("quantize", source, made): "--precision is missing",
        ("inspect",): "expected 1 argument, found 0"}
    typed = ((f"checkpoints_tools.{module}", *arguments) for module, *arguments in mistakes)
    for result, message in zip(commands(*typed), mistakes.values(), strict=True):
        fails_with(result, message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_hub_name_without_a_network_is_one_line(tmp_path):
    result = command("convert", "some/model", tmp_path / "made", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0",
                     HF_HOME=str(tmp_path / "hub"))
    assert result.returncode == 2
    assert "error: some/model is no local path, and the Hugging Face hub could not be reached" in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "made").exists()


def test_config_of_the_source_is_kept(tmp_path):
    write_hf(tmp_path / "source", TINY | {"custom": 3})
    made = convert(tmp_path / "source", tmp_path / "made")
    assert json.loads((made / "config.json").read_text()) == TINY | {"custom": 3}
