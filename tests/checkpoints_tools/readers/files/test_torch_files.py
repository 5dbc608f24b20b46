"""Pickled checkpoints: tensors are read from them, and nothing else ever is."""

import json
import pathlib
import pickle
import sys

import ml_dtypes
import numpy as np
import pytest
from packers import LAYOUTS, SMALL, quantised_tensors
from refusals import refuse, truncate
from same import assert_same
from sources import TINY, logical, random_tensors, write_hf

from checkpoints_tools.readers import hub, open_source

pytestmark = pytest.mark.torch


def write_torch(directory, tensors, config, name="quant_model.pt"):
    import torch

    write_hf(directory, config, {})
    (directory / "model.safetensors").unlink()
    torch.save({key: to_torch(values) for key, values in tensors.items()}, directory / name)
    return directory / name


def to_torch(values):
    import torch

    values = np.ascontiguousarray(values)
    if values.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


@pytest.mark.parametrize("name", ["quant_model.pt", "pytorch_model.bin", "Llama-w4a8.pt"])
@pytest.mark.parametrize("layout", ["qserve-int8", "qoq", "qoq-g128", "qoq-g128-late"])
def test_qserves_files(tmp_path, layout, name):
    tensors, expected = quantised_tensors(LAYOUTS[layout], fused=layout == "qoq-g128")
    write_torch(tmp_path / "source", tensors, SMALL, name)
    reader = open_source(tmp_path / "source")
    assert reader.formats.linear.name == LAYOUTS[layout].linear
    assert [file.name for file in reader.files] == [name]
    for path, weight in expected.items():
        assert_same(reader.read(path), weight)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_plain_weights(tmp_path, dtype):
    tensors = random_tensors(TINY, dtype)
    write_torch(tmp_path / "source", tensors, TINY, "pytorch_model.bin")
    reader = open_source(tmp_path / "source")
    for path, values in logical(tensors, TINY).items():
        found = reader.read(path)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, values)


def test_shards(tmp_path):
    tensors = random_tensors(TINY)
    names = sorted(tensors)
    write_torch(tmp_path / "source", {name: tensors[name] for name in names[::2]}, TINY, "pytorch_model-1.bin")
    write_torch(tmp_path / "source", {name: tensors[name] for name in names[1::2]}, TINY, "pytorch_model-2.bin")
    weight_map = {name: f"pytorch_model-{1 + i % 2}.bin" for i, name in enumerate(names)}
    (tmp_path / "source" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    reader = open_source(tmp_path / "source")
    np.testing.assert_array_equal(reader.read("norm/scale"), tensors["model.norm.weight"])
    (tmp_path / "source" / "pytorch_model-2.bin").unlink()
    refuse(tmp_path, tmp_path / "source", "pytorch_model-2.bin is missing")


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code(tmp_path, zipped):
    import torch

    trap = tmp_path / "trap"
    file = write_torch(tmp_path / "source", random_tensors(TINY), TINY)
    if zipped:
        torch.save({"model.norm.weight": Evil(trap)}, file)
    else:
        file.write_bytes(pickle.dumps(Evil(trap)))
    refuse(tmp_path, tmp_path / "source", "quant_model.pt can't be loaded as plain tensors", "a pickle can run code")
    assert not trap.exists()
    if not zipped:
        pickle.loads(file.read_bytes())
        assert trap.exists()  # the trap works


@pytest.mark.parametrize("content", [[1, 2], {"model.norm.weight": 3}, {"a": "b"}])
def test_something_else_than_tensors(tmp_path, content):
    import torch

    torch.save(content, write_torch(tmp_path / "source", {}, TINY))
    refuse(tmp_path, tmp_path / "source", "quant_model.pt can't be loaded as plain tensors", "expected names")


@pytest.mark.parametrize("count", [10, 100_000])
def test_a_truncated_file(tmp_path, count):
    truncate(write_torch(tmp_path / "source", random_tensors(TINY), TINY), count)
    refuse(tmp_path, tmp_path / "source", "quant_model.pt can't be loaded as plain tensors")


def test_a_missing_tensor_and_an_unknown_one(tmp_path):
    tensors, _ = quantised_tensors(LAYOUTS["qoq"], fused=False)
    name = "model.layers.0.mlp.down_proj.s1_scales"
    write_torch(tmp_path / "source", {key: values for key, values in tensors.items() if key != name}, SMALL)
    refuse(tmp_path, tmp_path / "source", f"lacks the tensor {name}")
    write_torch(tmp_path / "source", tensors | {"model.layers.0.extra": np.ones(3)}, SMALL)
    refuse(tmp_path, tmp_path / "source", "holds the tensor model.layers.0.extra")


def test_several_files_of_which_none_is_named_as_expected(tmp_path):
    for name in ("model.pt", "scale.pt"):
        write_torch(tmp_path / "source", {}, TINY, name)
    refuse(tmp_path, tmp_path / "source", "2 pickled files (model.pt, scale.pt)", "quant_model.pt")


def test_without_pytorch(tmp_path, monkeypatch):
    write_torch(tmp_path / "source", random_tensors(TINY), TINY)
    monkeypatch.setitem(sys.modules, "torch", None)
    refuse(tmp_path, tmp_path / "source", "quant_model.pt needs PyTorch", "specmq-jax[torch]", "safetensors")


def test_pickled_files_of_a_hub_repository_are_downloaded_only_where_it_has_no_others(tmp_path, monkeypatch):
    asked = []

    def download(name, *, allow_patterns):
        asked.append("quant_model.pt" in allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", download)
    assert hub.download("some/model") == tmp_path and asked == [False, True]
    (tmp_path / "model.safetensors").write_bytes(b"")
    asked.clear()
    hub.download("some/model")
    assert asked == [False]


def test_a_path_is_preferred_to_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "download", lambda name: tmp_path / "downloaded" / name)
    monkeypatch.chdir(tmp_path)
    assert hub.local("some/head") == tmp_path / "downloaded/some/head"
    assert str(hub.local("/no/head")) == "/no/head"  # not of a hub name's form: whoever reads it says that it is missing
    (tmp_path / "some" / "head").mkdir(parents=True)
    assert str(hub.local("some/head")) == "some/head"
