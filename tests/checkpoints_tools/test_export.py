"""What is exported means to other programs, and to our own readers, what it meant here."""

import json

import numpy as np
import pytest
from packers import SMALL
from safetensors.numpy import load_file
from sources import DATA, SHARED, TINY, random_tensors, write_hf

import specmq_jax as sm
from checkpoints_tools.conversion import convert
from checkpoints_tools.export import export
from checkpoints_tools.readers import open_source
from checkpoints_tools.readers.files.rotation_file import load_rotation
from checkpoints_tools.rotate import rotate
from specmq_jax.formats import dense_values
from specmq_jax.network.parameters import parameter_shapes

TIED = TINY | {"tie_word_embeddings": True}


def tensors_of(directory):
    """All tensors by name, and the names of the files that hold them."""
    files = sorted(directory.glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}, [file.name for file in files]


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == values.dtype, name
        np.testing.assert_array_equal(found[name], values, err_msg=name)


@pytest.mark.parametrize("config", [TINY, TIED], ids=["untied", "tied"])
def test_a_model_exported_is_the_directory_that_it_came_from(tmp_path, config):
    tensors = write_hf(tmp_path / "source", config, random_tensors(config, np.float16))
    made = export(convert(tmp_path / "source", tmp_path / "native"), tmp_path / "made", "hf")
    found, files = tensors_of(made)
    assert_same_tensors(found, tensors)
    assert files == ["model.safetensors"]
    assert json.loads((made / "config.json").read_text()) == config | {"torch_dtype": "float16"}


def test_files_hold_so_many_bytes_and_an_index_names_them(tmp_path):
    tensors = write_hf(tmp_path / "source", TINY, random_tensors(TINY, np.float16))
    limit = 30_000
    made = export(tmp_path / "source", tmp_path / "made", "hf", shard_bytes=limit)
    found, files = tensors_of(made)
    assert_same_tensors(found, tensors)
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    for file in files:
        assert sum(values.nbytes for values in load_file(made / file).values()) <= limit
    index = json.loads((made / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys() and set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(values.nbytes for values in tensors.values())
    assert open_source(made).formats.linear.name == "fp16"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_quantised_weights_are_exported_as_their_values(tmp_path, precision):
    source = convert(DATA / "checkpoints" / "gptq-v1", tmp_path / "native")
    found = open_source(export(source, tmp_path / "made", "hf", precision=precision))
    expected = open_source(source)
    assert found.formats.linear.name == precision
    for path in parameter_shapes(expected.llama):
        values = np.asarray(dense_values(expected.read(path))).astype(found.formats.linear.dtype)
        np.testing.assert_array_equal(found.read(path), values, err_msg=path)


@pytest.mark.torch
@pytest.mark.parametrize("config", [TINY, TIED], ids=["untied", "tied"])
def test_transformers_loads_what_is_exported(tmp_path, config):
    import torch
    import transformers

    write_hf(tmp_path / "source", config, random_tensors(config, np.float16))
    source = convert(tmp_path / "source", tmp_path / "native", "w4a16-g32")
    made = export(source, tmp_path / "made", "hf", precision="fp32", shard_bytes=50_000)
    model = transformers.AutoModelForCausalLM.from_pretrained(made, dtype="auto")
    assert model.dtype == torch.float32
    tokens = np.random.default_rng(0).integers(0, 97, 20)
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)[None]).logits[0].numpy()
    np.testing.assert_allclose(sm.logits(sm.load(source), tokens), expected, atol=1e-4)


def assert_same_integers(source, made):
    """Both readers find the same integers, scales and orders."""
    found, expected = open_source(made), open_source(source)
    assert found.formats.linear == expected.formats.linear
    for path in parameter_shapes(expected.llama):
        one, other = found.read(path), expected.read(path)
        if not path.endswith("/w") or path == "lm_head/w":
            np.testing.assert_array_equal(one, np.asarray(other).astype(np.float16), err_msg=path)
            continue
        assert one.group_size == other.group_size
        for name in ("q", "scales", "order"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=f"{path} {name}")


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_gptq_keeps_integers_and_scales(tmp_path, group_size):
    write_hf(tmp_path / "source", TINY, random_tensors(TINY, np.float16))  # groups of 64 and 128 that 96 rows don't fill
    name = "w4a16-channel" if group_size == -1 else f"w4a16-g{group_size}"
    source = convert(tmp_path / "source", tmp_path / "native", name)
    made = export(source, tmp_path / "made", "gptq")
    assert_same_integers(source, made)
    settings = json.loads((made / "quantize_config.json").read_text())
    assert settings == json.loads((made / "config.json").read_text())["quantization_config"]
    assert (settings["group_size"], settings["desc_act"], settings["checkpoint_format"]) == (group_size, False, "gptq")


def test_gptq_files_hold_what_autogptqs_definition_says(tmp_path):
    """AutoGPTQ's own file comes back bit for bit, g_idx and zero points included, whichever way it goes."""
    source = DATA / "checkpoints" / "gptq-v1"
    expected, _ = tensors_of(source)
    expected = {name: values for name, values in expected.items() if not name.endswith("bias")}
    for origin in (source, convert(source, tmp_path / "native")):
        found, _ = tensors_of(export(origin, tmp_path / f"made-{origin.name}", "gptq", precision="bf16"))
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_act_order_is_kept(tmp_path):
    """A file whose rows belong to groups in a random order, as desc_act leaves them."""
    source, rng = DATA / "checkpoints" / "gptq-v1", np.random.default_rng(0)
    tensors, _ = tensors_of(source)
    for layer in range(2):
        order = rng.permutation(256)
        for part in ("q", "k", "v"):
            name = f"model.layers.{layer}.self_attn.{part}_proj.g_idx"
            tensors[name] = tensors[name][order]
    write_hf(tmp_path / "source", json.loads((source / "config.json").read_text()), tensors)
    native = convert(tmp_path / "source", tmp_path / "native")
    made = export(native, tmp_path / "made", "gptq")
    assert json.loads((made / "config.json").read_text())["quantization_config"]["desc_act"] is True
    assert_same_integers(native, made)
    found, _ = tensors_of(made)
    for name in tensors:
        if name.endswith(("qweight", "g_idx", "scales")):
            np.testing.assert_array_equal(found[name], tensors[name], err_msg=name)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["gptq-v1-act-order", "marlin-g128"])
def test_other_toolkits_checkpoints_survive(tmp_path, name):
    made = export(SHARED / name, tmp_path / "made", "gptq")
    assert_same_integers(SHARED / name, made)
    golden = np.load(SHARED / name / "expected_logits.npz")
    expected = golden["logits"].reshape(golden["input_ids"].size, -1)
    plain = sm.load(convert(export(made, tmp_path / "plain", "hf", precision="fp32"), tmp_path / "native"))
    found = np.asarray(sm.logits(plain, golden["input_ids"].reshape(-1)))
    assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected)


def test_a_rotation_and_a_tokenizer_go_along(tmp_path):
    write_hf(tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    rotated = rotate(tmp_path / "source", tmp_path / "rotated")
    made = export(rotated, tmp_path / "made", "hf", precision="fp32", shard_bytes=30_000)
    assert np.array_equal(load_rotation(made), load_rotation(rotated))
    assert (made / "tokenizer.json").read_text() == "{}"
    tokens = np.arange(20)
    np.testing.assert_array_equal(sm.logits(sm.load(convert(made, tmp_path / "again")), tokens),
                                  sm.logits(sm.load(rotated), tokens))


@pytest.mark.parametrize(("layout", "precision", "fault"), [
    ("gguf", "fp16", "--format is 'gguf'; expected hf or gptq"),
    ("hf", "w4a16", "--precision is 'w4a16'"),
    ("hf", "fp17", "precision 'fp17' is not known"),
    ("gptq", "fp16", "holds fp16 weights, and GPTQ's layout takes W4A16; make them by"),
])
def test_what_cannot_be_exported_is_refused_before_anything_is_written(tmp_path, layout, precision, fault):
    write_hf(tmp_path / "source", SMALL, random_tensors(SMALL, np.float16))
    with pytest.raises(sm.UserError) as error:
        export(tmp_path / "source", tmp_path / "made", layout, precision=precision)
    assert fault in str(error.value) and "\n" not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_sizes_that_words_of_eight_codes_do_not_fill_are_refused(tmp_path):
    config = TINY | {"intermediate_size": 100}
    write_hf(tmp_path / "source", config, random_tensors(config, np.float16))
    with pytest.raises(sm.UserError, match=r"gate_proj has shape \[64, 100\]; its layout holds multiples of \[8, 8\]"):
        export(convert(tmp_path / "source", tmp_path / "native", "w4a16-g32"), tmp_path / "made", "gptq")
    assert not (tmp_path / "made").exists()


def test_a_failure_in_the_middle_leaves_nothing(tmp_path):
    tensors = random_tensors(TINY)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = 1e6
    write_hf(tmp_path / "source", TINY, tensors)
    with pytest.raises(sm.UserError, match="layers_1/mlp/down/w holds values beyond the range of float16; choose --precision"):
        export(tmp_path / "source", tmp_path / "made", "hf", shard_bytes=20_000)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "file").write_text("")
    with pytest.raises(sm.UserError, match="exists and is not empty"):
        export(tmp_path / "source", tmp_path / "made", "hf", precision="fp32")
