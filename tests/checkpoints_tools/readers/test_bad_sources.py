"""Whatever is wrong with a source is found from its headers, said in one line, and nothing is written."""

import json
import shutil

import numpy as np
import pytest
from refusals import refuse, truncate
from safetensors.numpy import load_file, save_file
from sources import DATA, TINY, random_tensors, write_gguf, write_hf

from checkpoints_tools.conversion import convert
from specmq_jax.errors import UserError

Q = "model.layers.0.self_attn.q_proj"


def test_an_empty_directory(tmp_path):
    (tmp_path / "source").mkdir()
    refuse(tmp_path, tmp_path / "source", "is empty")


def test_a_directory_of_something_else(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "notes.txt").write_text("hello")
    refuse(tmp_path, tmp_path / "source", "holds no checkpoint")


def test_a_file_of_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    refuse(tmp_path, tmp_path / "notes.txt", "is not a GGUF file")


def test_a_directory_without_weights(tmp_path):
    write_hf(tmp_path / "source")
    (tmp_path / "source" / "model.safetensors").unlink()
    refuse(tmp_path, tmp_path / "source", "no *.safetensors file")


@pytest.mark.torch
def test_a_file_of_pickled_weights_that_holds_something_else(tmp_path):
    write_hf(tmp_path / "source")
    (tmp_path / "source" / "model.safetensors").rename(tmp_path / "source" / "pytorch_model.bin")
    refuse(tmp_path, tmp_path / "source", "pytorch_model.bin can't be loaded as plain tensors", "can run code")


def test_a_malformed_config(tmp_path):
    write_hf(tmp_path / "source")
    (tmp_path / "source" / "config.json").write_text("{")
    refuse(tmp_path, tmp_path / "source", "config.json is not valid JSON")


def test_an_unknown_architecture(tmp_path):
    write_hf(tmp_path / "source", TINY | {"architectures": ["GPT2LMHeadModel"]})
    refuse(tmp_path, tmp_path / "source", "'GPT2LMHeadModel' is not supported", "known model types: llama")


def test_a_missing_tensor(tmp_path):
    tensors = random_tensors(TINY)
    del tensors[f"{Q}.weight"]
    write_hf(tmp_path / "source", tensors=tensors)
    refuse(tmp_path, tmp_path / "source", f"lacks the tensor {Q}.weight")


def test_a_misshapen_tensor(tmp_path):
    tensors = random_tensors(TINY)
    tensors[f"{Q}.weight"] = tensors[f"{Q}.weight"][:60]
    write_hf(tmp_path / "source", tensors=tensors)
    refuse(tmp_path, tmp_path / "source", f"{Q}.weight has shape [60, 64]", "asks for [64, 64]")


def test_a_tensor_of_another_type(tmp_path):
    tensors = random_tensors(TINY)
    tensors[f"{Q}.weight"] = tensors[f"{Q}.weight"].astype(np.int8)
    write_hf(tmp_path / "source", tensors=tensors)
    refuse(tmp_path, tmp_path / "source", f"{Q}.weight has type I8", "F32 or F16 or BF16")


@pytest.mark.parametrize("name", [f"{Q}.bias", "model.layers.2.input_layernorm.weight"])
def test_a_tensor_that_the_model_does_not_use(tmp_path, name):
    write_hf(tmp_path / "source", tensors=random_tensors(TINY) | {name: np.ones(64, np.float32)})
    refuse(tmp_path, tmp_path / "source", f"holds the tensor {name}", "2 layers")


def test_a_truncated_safetensors_file(tmp_path):
    write_hf(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    size = file.stat().st_size
    truncate(file, 100)
    refuse(tmp_path, tmp_path / "source", "truncated", f"it has {size - 100} bytes")


@pytest.mark.parametrize("content", [b"", b"\x00" * 4, b"\xff" * 64, b"\x05" + b"\x00" * 7 + b"[1,2]"])
def test_a_file_that_is_not_safetensors(tmp_path, content):
    write_hf(tmp_path / "source")
    (tmp_path / "source" / "model.safetensors").write_bytes(content)
    refuse(tmp_path, tmp_path / "source", "model.safetensors is ", "not safetensors")


def test_a_missing_shard(tmp_path):
    write_hf(tmp_path / "source", shards=2)
    (tmp_path / "source" / "model-00002-of-00002.safetensors").unlink()
    refuse(tmp_path, tmp_path / "source", "model-00002-of-00002.safetensors is missing")


def test_several_files_without_an_index(tmp_path):
    write_hf(tmp_path / "source", shards=2)
    (tmp_path / "source" / "model.safetensors.index.json").unlink()
    refuse(tmp_path, tmp_path / "source", "2 safetensors files and no model.safetensors.index.json")


def test_a_destination_that_is_taken(tmp_path):
    write_hf(tmp_path / "source")
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "notes.txt").write_text("precious")
    refuse(tmp_path, tmp_path / "source", "made exists and is not empty")
    assert (tmp_path / "made" / "notes.txt").read_text() == "precious"


def test_a_destination_that_can_not_be_written(tmp_path):
    write_hf(tmp_path / "source")
    (tmp_path / "blocked").write_text("a file where a directory should be")
    with pytest.raises(UserError, match="made can't be written: .*choose another place"):
        convert(tmp_path / "source", tmp_path / "blocked" / "made")


@pytest.fixture
def gptq(tmp_path):
    shutil.copytree(DATA / "checkpoints" / "gptq-v1", tmp_path / "source", copy_function=shutil.copyfile)
    return tmp_path / "source"


@pytest.mark.parametrize(("changes", "parts"), [
    ({"bits": 8}, ["8 bits", "only 4"]),
    ({"bits": 3}, ["3 bits", "only 4"]),
    ({"sym": False}, ["sym = false"]),
    ({"checkpoint_format": "gptq_v2"}, ["qzeros", "zero points other than 8"]),
    ({"checkpoint_format": "marlin"}, ["'marlin'", "'gptq', 'gptq_v2'"]),
    ({"group_size": 16}, ["group_size 16", "supported are"]),
    ({"group_size": 64}, ["has shape [2, 256]", "asks for [4, 256]"]),
    ({"quant_method": "awq"}, ["'awq'", "read are 'gptq'"]),
])
def test_gptq_of_another_kind(tmp_path, gptq, changes, parts):
    config = json.loads((gptq / "config.json").read_text())
    config["quantization_config"] |= changes
    (gptq / "config.json").write_text(json.dumps(config))
    refuse(tmp_path, gptq, *parts)


def change_gptq(directory, name, change):
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {name: change(tensors[name])}, directory / "model.safetensors")


def test_gptq_with_rows_out_of_another_modules_order(tmp_path, gptq):
    change_gptq(gptq, f"{Q}.g_idx", lambda order: order[::-1].copy())
    refuse(tmp_path, gptq, Q, "different orders (g_idx)", "desc_act")


def test_gptq_with_zero_points(tmp_path, gptq):
    change_gptq(gptq, f"{Q}.qzeros", lambda zeros: zeros - 1)
    refuse(tmp_path, gptq, f"{Q}.qzeros", "zero points other than 8")


def test_gptq_with_too_few_groups(tmp_path, gptq):
    change_gptq(gptq, f"{Q}.scales", lambda scales: scales[:1])
    refuse(tmp_path, gptq, f"{Q}.scales has shape [1, 256]", "asks for [2, 256]")


def test_a_truncated_gguf(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, TINY, random_tensors(TINY))
    size = path.stat().st_size
    truncate(path, 1000)
    refuse(tmp_path, path, "truncated", f"it has {size - 1000} bytes, expected {size}")


@pytest.mark.parametrize("kept", [4, 20, 200])
def test_a_gguf_cut_within_its_header(tmp_path, kept):
    path = tmp_path / "model.gguf"
    write_gguf(path, TINY, random_tensors(TINY))
    truncate(path, path.stat().st_size - kept)
    refuse(tmp_path, path, "truncated or damaged", f"it has {kept} bytes")


def test_a_gguf_of_another_architecture(tmp_path):
    write_gguf(tmp_path / "model.gguf", TINY, random_tensors(TINY), architecture="qwen2")
    refuse(tmp_path, tmp_path / "model.gguf", "architecture 'qwen2'", "only 'llama'")


def test_a_gguf_of_an_unsupported_type(tmp_path):
    config = TINY | {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    write_gguf(tmp_path / "model.gguf", config, random_tensors(config), "TQ1_0")
    refuse(tmp_path, tmp_path / "model.gguf", "token_embd.weight has type TQ1_0", "Q8_0, Q4_0, Q4_1")


def test_a_gguf_that_lacks_a_tensor(tmp_path):
    write_gguf(tmp_path / "model.gguf", TINY, random_tensors(TINY), skip=f"{Q}.weight")
    refuse(tmp_path, tmp_path / "model.gguf", "lacks the tensor blk.0.attn_q.weight")


def test_a_gguf_with_a_tensor_that_the_model_does_not_use(tmp_path):
    write_gguf(tmp_path / "model.gguf", TINY, random_tensors(TINY), extra={"blk.0.attn_q.bias": np.ones(64, np.float32)})
    refuse(tmp_path, tmp_path / "model.gguf", "holds the tensor blk.0.attn_q.bias")


def test_a_gguf_with_rotary_factors_of_no_known_kind(tmp_path):
    write_gguf(tmp_path / "model.gguf", TINY, random_tensors(TINY),
               extra={"rope_freqs.weight": np.linspace(1, 3, 8, dtype=np.float32)})
    refuse(tmp_path, tmp_path / "model.gguf", "rotary factors", "not supported")
