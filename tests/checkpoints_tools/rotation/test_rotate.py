"""A rotated model is the same function, and its rotation travels with it."""

import numpy as np
import pytest
from safetensors.numpy import save_file
from sources import DATA, SHARED, TINY, random_tensors, write_hf

import specmq_jax as sm
from checkpoints_tools.conversion import convert
from checkpoints_tools.inspect import describe
from checkpoints_tools.readers import open_source
from checkpoints_tools.readers.files.rotation_file import load_rotation, save_rotation
from checkpoints_tools.rotate import rotate
from checkpoints_tools.rotation.hadamard import hadamard, is_known
from checkpoints_tools.rotation.rotated import RotatedReader, random_rotation
from specmq_jax.loading.checkpoint import read_metadata

TOKENS = np.random.default_rng(0).integers(0, 97, 24)
TIED = TINY | {"tie_word_embeddings": True}
# a hidden size without a Hadamard matrix, heads of one, and as many kv heads as heads
ODD = TINY | {"hidden_size": 30, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 12}


def assert_orthogonal(matrix):
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(len(matrix)), atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 24, 28, 36, 40, 44, 48, 60, 76, 144, 576, 640, 3072])
def test_hadamard_matrices_have_orthogonal_rows_of_signs(size):
    matrix = hadamard(size)
    assert matrix.shape == (size, size) and set(np.unique(matrix)) <= {-1, 1}
    rows = matrix.astype(np.float32)
    assert np.array_equal(rows @ rows.T, size * np.eye(size))


@pytest.mark.parametrize("size", [3, 6, 10, 30, 57])
def test_there_is_no_hadamard_matrix_of_other_sizes(size):
    assert hadamard(size) is None and not is_known(size)


@pytest.mark.parametrize("size", [64, 576, 30, 7])
def test_a_random_rotation_is_orthogonal_and_follows_its_seed(size):
    rotation = random_rotation(size, seed=3)
    assert rotation.dtype == np.float32
    assert_orthogonal(rotation)
    assert np.array_equal(rotation, random_rotation(size, seed=3))
    assert not np.array_equal(rotation, random_rotation(size, seed=4))


@pytest.mark.parametrize("size", [2048, 4096, 5120, 8192, 14336, 28672])
def test_sizes_of_large_models_are_known(size):
    assert is_known(size)


@pytest.mark.parametrize("config", [TINY, TIED, ODD], ids=["grouped", "tied", "odd sizes"])
def test_logits_of_a_rotated_model_are_its_sources(tmp_path, config):
    write_hf(tmp_path / "source", config)
    plain = sm.load(convert(tmp_path / "source", tmp_path / "plain"))
    made = rotate(tmp_path / "source", tmp_path / "rotated", seed=1)
    rotated = sm.load(made)
    np.testing.assert_allclose(sm.logits(rotated, TOKENS), sm.logits(plain, TOKENS), atol=1e-4)
    assert np.array_equal(rotated.params["params"]["norm"]["scale"], np.ones(config["hidden_size"]))
    table, rotation = (np.asarray(part, np.float64) for part in (
        plain.params["params"]["embed"]["table"], load_rotation(made)))
    np.testing.assert_allclose(rotated.params["params"]["embed"]["table"], table @ rotation, atol=1e-5)


def test_a_native_checkpoint_rotates_as_its_source_does(tmp_path):
    write_hf(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "native")
    found, expected = (sm.load(rotate(tmp_path / name, tmp_path / f"rotated-{name}")) for name in ("native", "source"))
    np.testing.assert_allclose(sm.logits(found, TOKENS), sm.logits(expected, TOKENS), atol=1e-5)


def test_rotating_spreads_outliers_so_that_fewer_bits_lose_less(tmp_path):
    tensors = random_tensors(TINY)
    for name, values in tensors.items():
        if name.endswith(("q_proj.weight", "gate_proj.weight", "up_proj.weight")):
            values[:, ::16] *= 20
    write_hf(tmp_path / "source", TINY, tensors)
    expected = np.asarray(sm.logits(sm.load(convert(tmp_path / "source", tmp_path / "plain")), TOKENS))
    four = convert(tmp_path / "source", tmp_path / "four", "w4a16-g64"), rotate(
        tmp_path / "source", tmp_path / "rotated", precision="w4a16-g64")
    assert read_metadata(four[1])["formats"]["linear"] == "w4a16-g64"
    lost, lost_rotated = (np.linalg.norm(np.asarray(sm.logits(sm.load(made), TOKENS)) - expected) for made in four)
    assert lost_rotated < 0.7 * lost


def test_the_rotation_stays_with_the_model_when_it_is_converted_again(tmp_path):
    write_hf(tmp_path / "source")
    made = rotate(tmp_path / "source", tmp_path / "rotated")
    again = convert(made, tmp_path / "again", "w4a16-g32")
    assert (again / "rotation.safetensors").stat().st_mode & 0o777 == 0o644
    assert np.array_equal(load_rotation(again), load_rotation(made, size=64))
    assert dict(describe(open_source(again)))["rotation"] == "rotation.safetensors"
    assert dict(describe(open_source(tmp_path / "source")))["rotation"] == "none"


def test_what_cannot_be_rotated_is_refused_before_anything_is_written(tmp_path):
    write_hf(tmp_path / "source")
    made = rotate(tmp_path / "source", tmp_path / "rotated")
    for source, fault in ((made, "is rotated already (rotation.safetensors)"),
                          (DATA / "checkpoints" / "gptq-v1", "holds w4a16 weights, and rotating would round them")):
        with pytest.raises(sm.UserError) as error:
            rotate(source, tmp_path / "again")
        assert fault in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(sm.UserError, match="the matrix rotates 32 dimensions; this model's hidden states have 64"):
        RotatedReader(open_source(tmp_path / "source"), random_rotation(32))
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(("matrix", "fault"), [
    (np.zeros((4, 5), np.float32), "shape [4, 5]; a rotation is a square matrix"),
    (np.zeros(4, np.float32), "shape [4]; a rotation is a square matrix"),
    (2 * np.eye(4, dtype=np.float32), "not orthogonal"),
    (np.full((4, 4), np.nan, np.float32), "not orthogonal"),
    (np.eye(5, dtype=np.float32), "rotates 5 dimensions; this model's hidden states have 4"),
])
def test_a_matrix_that_is_no_rotation_of_the_model_is_refused(tmp_path, matrix, fault):
    save_rotation(tmp_path, matrix)
    with pytest.raises(sm.UserError) as error:
        load_rotation(tmp_path, size=4)
    assert fault in str(error.value) and "\n" not in str(error.value)


def test_a_rotation_that_is_not_there_or_not_readable_is_named(tmp_path):
    path = tmp_path / "rotation.safetensors"
    for make, source, fault in (
            (lambda: None, tmp_path, "holds no rotation"),
            (lambda: None, tmp_path / "nothing", "nothing does not exist"),
            (lambda: (tmp_path / "q.npy").write_bytes(b""), tmp_path / "q.npy", "is no rotation's file"),
            (lambda: path.write_bytes(b"x" * 30), tmp_path, f"{path} is damaged"),
            (lambda: save_file({"a": np.eye(2), "b": np.eye(2)}, path), tmp_path, f"{path} holds 2 tensors; expected one")):
        make()
        with pytest.raises(sm.UserError) as error:
            load_rotation(source)
        assert fault in str(error.value) and "\n" not in str(error.value)


@pytest.mark.torch
@pytest.mark.parametrize(("name", "kind"), [
    ("rotation.pth", "float64"), ("rotation.pt", "bfloat16"), ("rotation.bin", "named")])
def test_a_pickled_rotation_is_read_and_kept(tmp_path, name, kind):
    import torch

    write_hf(tmp_path / "source")
    rotation = torch.from_numpy(random_rotation(64))
    torch.save({"rotation": rotation} if kind == "named" else rotation.to(getattr(torch, kind)), tmp_path / "source" / name)
    np.testing.assert_allclose(load_rotation(convert(tmp_path / "source", tmp_path / "made")), rotation, atol=1e-3)


@pytest.mark.torch
def test_a_pickled_rotation_runs_no_code(tmp_path):
    import pickle

    class Harmful:
        def __reduce__(self):
            return (tmp_path / "made").touch, ()

    (tmp_path / "rotation.pth").write_bytes(pickle.dumps(Harmful(), protocol=2))
    with pytest.raises(sm.UserError, match="can't be loaded as plain tensors"):
        load_rotation(tmp_path)
    assert not (tmp_path / "made").exists()


@pytest.mark.shared
@pytest.mark.torch
def test_another_toolkits_rotated_copy_and_ours_agree(tmp_path):
    theirs = convert(SHARED / "rot", tmp_path / "theirs", "fp32")
    rotation = load_rotation(theirs, size=256)
    assert np.array_equal(rotation, load_rotation(SHARED / "rot" / "rotation.pth"))
    ours = RotatedReader(open_source(SHARED / "fp16"), rotation)
    table = open_source(SHARED / "rot").read("embed/table")
    np.testing.assert_allclose(ours.read("embed/table"), table.astype(np.float32), atol=1e-3)
    for path in ("layers_1/attention/qkv/w", "layers_0/mlp/gate_up/w", "layers_1/mlp/down/w", "lm_head/w"):
        found, expected = ours.read(path), open_source(SHARED / "rot").read(path)
        if "qkv" in path:  # the signs of the heads' matrices are each toolkit's own
            found, expected = found[:, :-128], expected[:, :-128]
        np.testing.assert_allclose(found, expected.astype(np.float32), atol=1e-3, err_msg=path)
    golden = np.load(SHARED / "fp16" / "expected_logits.npz")
    tokens = golden["input_ids"].reshape(-1)
    expected = golden["logits"].reshape(len(tokens), -1)
    made = sm.load(rotate(SHARED / "fp16", tmp_path / "ours", precision="fp32"))
    assert np.linalg.norm(sm.logits(made, tokens) - expected) < 1e-5 * np.linalg.norm(expected)
    assert np.linalg.norm(sm.logits(sm.load(theirs), tokens) - expected) < 1e-2 * np.linalg.norm(expected)
