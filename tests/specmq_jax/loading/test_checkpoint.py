"""The native checkpoint: what goes in comes out, and every kind of damage is named in one line."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import DATA

import specmq_jax as sm
from checkpoints_tools.conversion import convert
from specmq_jax import files
from specmq_jax.errors import UserError
from specmq_jax.json_files import read_json
from specmq_jax.loading import checkpoint
from specmq_jax.loading.checkpoint import CheckpointWriter
from specmq_jax.network.parameters import Formats, parameter_shapes

SOURCE = DATA / "checkpoints" / "fp16"
FORMATS = {"linear": "w4a16-g64", "head": "bf16", "embed": "fp16"}


def write(directory: pathlib.Path, names=FORMATS, *, skip="", change=lambda path, weight: weight, shard_bytes=1 << 20):
    """A random checkpoint of the source's sizes; returns its weights by path."""
    config, formats = read_json(SOURCE / "config.json"), Formats.named(names)
    weights = {}
    with CheckpointWriter(directory, config=config, formats=formats, source={"kind": "test"},
                          shard_bytes=shard_bytes) as writer:
        for i, (path, shape) in enumerate(parameter_shapes(sm.LlamaConfig.from_hf(config)).items()):
            values = np.random.default_rng(i).standard_normal(shape).astype(np.float32)
            abstract = formats.abstract(path, shape)
            plain = isinstance(abstract, jax.ShapeDtypeStruct)
            weights[path] = jnp.asarray(values, abstract.dtype) if plain else formats.of(path).pack(values)
            if path != skip:
                writer.add(path, change(path, weights[path]))
    return weights


def refuse(directory, *parts):
    with pytest.raises(UserError) as caught:
        checkpoint.restore(directory)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("shard_bytes", [1, 100_000, 1 << 30])
def test_what_was_written_is_restored_bit_for_bit(tmp_path, shard_bytes):
    weights = write(tmp_path / "made", shard_bytes=shard_bytes)
    params = checkpoint.restore(tmp_path / "made", device=jax.devices()[0])["params"]
    for path, expected in weights.items():
        found = params
        for part in path.split("/"):
            found = found[part]
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert a.dtype == b.dtype and isinstance(a, jax.Array)
            np.testing.assert_array_equal(a, b)
    assert len(jax.tree.leaves(params)) == len(jax.tree.leaves(weights))
    assert checkpoint.read_metadata(tmp_path / "made")["formats"] == FORMATS


@pytest.mark.parametrize("name", ["fp16", "gptq-v1"])
def test_logits_equal_hugging_faces(tmp_path, name):
    golden = np.load(DATA / "checkpoints" / name / "expected_logits.npz")
    model = sm.load(convert(DATA / "checkpoints" / name, tmp_path / "made"), expand=True)
    found = np.asarray(sm.logits(model, golden["input_ids"].reshape(-1)))
    expected = golden["logits"].reshape(found.shape)
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


def shard_files(directory):
    return sorted((directory / "weights").rglob("ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)


def test_a_directory_that_is_no_checkpoint(tmp_path):
    refuse(tmp_path, "is not a native checkpoint", "checkpoints_tools.convert")
    assert not checkpoint.is_native(tmp_path)


def test_a_truncated_file(tmp_path):
    write(tmp_path / "made")
    file = shard_files(tmp_path / "made")[-1]
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.truncate(size - 7)
    refuse(tmp_path / "made", str(file), f"has {size - 7} bytes, expected {size}")


def test_a_flipped_bit(tmp_path):
    write(tmp_path / "made")
    file = shard_files(tmp_path / "made")[-1]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)
    refuse(tmp_path / "made", str(file), "is damaged")


def test_a_missing_file(tmp_path):
    write(tmp_path / "made", shard_bytes=100_000)
    file = shard_files(tmp_path / "made")[-1]
    file.unlink()
    refuse(tmp_path / "made", str(file), "is missing")


def test_a_missing_tensor(tmp_path):
    write(tmp_path / "made", skip="layers_1/mlp/down/w")
    refuse(tmp_path / "made", "lacks the tensor layers_1/mlp/down/w/packed")


def test_a_misshapen_tensor(tmp_path):
    write(tmp_path / "made", change=lambda path, weight: weight[:5] if path == "norm/scale" else weight)
    refuse(tmp_path / "made", "tensor norm/scale", "is float32[5]", "expect float32[256]")


def test_a_tensor_of_another_type(tmp_path):
    write(tmp_path / "made", change=lambda path, w: w.astype(jnp.float32) if path == "embed/table" else w)
    refuse(tmp_path / "made", "tensor embed/table", "is float32[512, 256]", "expect float16[512, 256]")


def test_sizes_that_do_not_fit_the_tensors(tmp_path):
    write(tmp_path / "made")
    config = read_json(tmp_path / "made" / "config.json")
    (tmp_path / "made" / "config.json").write_text(json.dumps(config | {"intermediate_size": 640}))
    refuse(tmp_path / "made", "layers_0/mlp/gate_up/w", "config.json", "1280")


@pytest.mark.parametrize(("change", "part"), [
    (lambda m: m | {"format_version": 1}, "format_version 1"),
    (lambda m: {key: value for key, value in m.items() if key != "formats"}, "lacks 'formats'"),
    (lambda m: m | {"formats": {"linear": "fp16"}}, "lacks the precision of 'head'"),
    (lambda m: m | {"formats": m["formats"] | {"linear": "w2"}}, "precision 'w2' is not known"),
    (lambda m: m | {"shards": 9}, "shard_001 is missing"),
])
def test_metadata_that_can_not_be_used(tmp_path, change, part):
    write(tmp_path / "made")
    file = tmp_path / "made" / "specmq.json"
    file.write_text(json.dumps(change(read_json(file))))
    refuse(tmp_path / "made", part)


def test_metadata_that_is_not_json(tmp_path):
    write(tmp_path / "made")
    (tmp_path / "made" / "specmq.json").write_text("{'")
    refuse(tmp_path / "made", "specmq.json is not valid JSON")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_while_writing_leaves_nothing(tmp_path, error):
    def fail(path, weight):
        if path.startswith("layers_1"):
            raise error
        return weight

    with pytest.raises(error):
        write(tmp_path / "made", change=fail, shard_bytes=1)
    assert list(tmp_path.iterdir()) == []


def test_another_process_may_have_finished_first(tmp_path):
    def interfere(path, weight):
        (tmp_path / "made").mkdir(exist_ok=True)
        (tmp_path / "made" / "theirs").touch()
        return weight

    with pytest.raises(UserError, match="exists and is not empty"):
        write(tmp_path / "made", change=interfere)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_an_empty_directory_may_be_the_destination(tmp_path):
    (tmp_path / "made").mkdir()
    write(tmp_path / "made")
    checkpoint.restore(tmp_path / "made")


def test_reading_is_silent(tmp_path, capfd):
    write(tmp_path / "made")
    checkpoint.restore(tmp_path / "made")
    assert capfd.readouterr() == ("", "")


def test_the_cache_directory_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("SPECMQ_CACHE", str(tmp_path))
    assert files.cache_directory() == tmp_path
    monkeypatch.delenv("SPECMQ_CACHE")
    assert files.cache_directory().name == "specmq_jax"
