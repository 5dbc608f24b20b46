"""What training and quantisation keep of unfinished work: it comes back as it was, or is told to be damaged."""

import contextlib
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fuzzing import lengths, searching
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from checkpoints_tools.quantizers.kept_layers import KeptLayers
from checkpoints_tools.training.checkpoints import Checkpoints
from checkpoints_tools.writers import leaf_files
from checkpoints_tools.writers.leaf_files import load_leaves, save_leaves
from specmq_jax.errors import UserError
from specmq_jax.network.parameters import Formats

LEAVES = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.bfloat16([1.5, -2]), "count": jnp.int32(7), "codes": jnp.uint8([1, 255])}
FORMATS = Formats.named({"linear": "fp16", "head": "fp16", "embed": "fp16"})


def test_arrays_come_back_as_they_were(tmp_path):
    save_leaves(tmp_path / "x", LEAVES, "go on")
    found = load_leaves(tmp_path / "x")
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in found.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in LEAVES.items()}
    for name, leaf in LEAVES.items():
        np.testing.assert_array_equal(found[name], leaf)


def test_every_flipped_byte_is_found(tmp_path):
    path = tmp_path / "x"
    save_leaves(path, LEAVES, "go on")
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:])
        with pytest.raises(UserError, match="x is damaged") as caught:
            load_leaves(path)
        assert "\n" not in str(caught.value)


@lengths
def test_no_file_is_a_traceback(examples):
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch) / "x"
        save_leaves(path, LEAVES, "go on")
        whole = path.read_bytes()

        @searching(examples)
        @given(st.integers(0, len(whole)), st.integers(0, 40), st.binary(max_size=12))
        def read(start, size, put):
            path.write_bytes(whole[:start] + put + whole[start + size:])
            with contextlib.suppress(UserError):
                assert load_leaves(path).keys() == LEAVES.keys()

        read()


@pytest.fixture
def full_disk(monkeypatch):
    def fills_up(leaves, path, metadata):
        pathlib.Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(leaf_files, "save_file", fills_up)
        yield


def test_a_full_disk_leaves_nothing(tmp_path, full_disk):
    with pytest.raises(UserError, match="checkpoints/3 can't be written: No space left on device; make room there"):
        Checkpoints(tmp_path / "checkpoints").save(3, LEAVES)
    assert [path.name for path in tmp_path.rglob("*")] == ["checkpoints"]
    with KeptLayers.opened(tmp_path / "made", {}, FORMATS) as kept:
        with pytest.raises(UserError, match="No space left on device; the layers it holds are kept"):
            kept.save(0, LEAVES)
        assert sorted(path.name for path in kept.directory.iterdir()) == [".lock", "settings.json"]


def test_the_newest_checkpoints_stay(tmp_path):
    kept = Checkpoints(tmp_path)
    assert kept.steps() == []
    for step in (5, 10, 15):
        kept.save(step, ({"w": jnp.full(3, float(step))}, [jnp.int32(step)]))
    assert kept.steps() == [10, 15] and sorted(path.name for path in tmp_path.iterdir()) == ["10", "15"]
    like = ({"w": jnp.zeros(3)}, [jnp.int32(0)])
    params, (count,) = kept.restore(10, like)
    assert count == 10 and params["w"].tolist() == [10, 10, 10]


@pytest.mark.parametrize("like", [{"w": jnp.zeros(4)}, {"w": jnp.zeros(3, jnp.int32)}, {"v": jnp.zeros(3)}, [jnp.zeros(3)]])
def test_a_checkpoint_of_another_head_is_told(tmp_path, like):
    Checkpoints(tmp_path).save(5, {"w": jnp.zeros(3)})
    with pytest.raises(UserError, match="state.safetensors is damaged .*; remove .*/5 to go on from the checkpoint before"):
        Checkpoints(tmp_path).restore(5, like)


def test_a_checkpoint_without_its_file_is_told(tmp_path):
    (tmp_path / "5").mkdir()
    with pytest.raises(UserError, match="is damaged .*--work_dir"):
        Checkpoints(tmp_path).restore(5, {"w": jax.ShapeDtypeStruct((3,), jnp.float32)})


def test_layers_are_made_by_one_run_at_a_time(tmp_path):
    with KeptLayers.opened(tmp_path / "made", {}, FORMATS):
        with pytest.raises(UserError, match="another run is making the layers in .*made.layers; wait"), \
                KeptLayers.opened(tmp_path / "made", {}, FORMATS):
            pass
    with KeptLayers.opened(tmp_path / "made", {}, FORMATS) as kept:
        kept.remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("content", "message"), [
    (None, "holds layers, and settings.json, which tells how they were made, is missing"), ("[", "is not valid JSON"),
    ('{"linear": "w8a8"}', r"other settings \(linear 'w8a8' there and 'fp16' here\)")])
def test_layers_of_other_or_unknown_settings_are_refused(tmp_path, content, message):
    with KeptLayers.opened(tmp_path / "made", {"linear": "fp16"}, FORMATS) as kept:
        kept.save(0, LEAVES)
    settings = kept.directory / "settings.json"
    settings.unlink()
    if content:
        settings.write_text(content)
    with pytest.raises(UserError, match=f"{message}.*another destination") as caught, \
            KeptLayers.opened(tmp_path / "made", {"linear": "fp16"}, FORMATS):
        pass
    assert "\n" not in str(caught.value) and (kept.directory / "layer_000.safetensors").exists()
