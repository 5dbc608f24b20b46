"""GPTQ v1: the integers and scales of the file, by the layout's own formula, element by element."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sources import DATA, TINY, random_tensors, write_hf

from checkpoints_tools.conversion import convert
from checkpoints_tools.readers import open_source
from specmq_jax import formats
from specmq_jax.loading import checkpoint

SOURCE = DATA / "checkpoints" / "gptq-v1"


def values_of(tensors, module):
    """w[k, n] = (nibble k % 8 of qweight[k // 8, n] - (nibble n % 8 of qzeros[g, n // 8] + 1)) scales[g, n]."""
    words, order = tensors[f"{module}.qweight"].view(np.uint32), tensors[f"{module}.g_idx"]
    zeros, scales = tensors[f"{module}.qzeros"].view(np.uint32), tensors[f"{module}.scales"].astype(np.float32)
    rows, columns = words.shape[0] * 8, words.shape[1]
    found = np.empty((rows, columns), np.float32)
    for k in range(rows):
        for n in range(columns):
            q = int(words[k // 8, n]) >> 4 * (k % 8) & 15
            zero = (int(zeros[order[k], n // 8]) >> 4 * (n % 8) & 15) + 1
            found[k, n] = (q - zero) * scales[order[k], n]
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return checkpoint.CheckpointReader(convert(SOURCE, tmp_path_factory.mktemp("gptq") / "made"))


@pytest.mark.parametrize(("path", "modules"), [
    ("layers_0/attention/qkv/w", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    ("layers_1/attention/o/w", ["self_attn.o_proj"]),
    ("layers_1/mlp/down/w", ["mlp.down_proj"]),
])
def test_weights_are_the_files_integers_times_its_scales(made, path, modules):
    tensors = load_file(SOURCE / "model.safetensors")
    layer = path[len("layers_"):].split("/")[0]
    expected = np.concatenate([values_of(tensors, f"model.layers.{layer}.{module}") for module in modules], axis=1)
    found = made.formats.linear.unpack(made.read(path), made.shapes[path])
    np.testing.assert_array_equal(found, expected)


def test_parts_keep_their_own_precisions(made):
    assert made.metadata["formats"] == {"linear": "w4a16", "head": "bf16", "embed": "bf16"}
    assert "quantization_config" not in (made.directory / "config.json").read_text()


@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_other_group_sizes_and_a_quantize_config_json(tmp_path, group_size):
    tensors = random_tensors(TINY, np.float16)
    rng = np.random.default_rng(3)
    codes = {}
    for name in [name for name in tensors if "_proj" in name]:
        module, (columns, rows) = name.removesuffix(".weight"), tensors.pop(name).shape
        groups = 1 if group_size == -1 else -(-rows // group_size)
        codes[module] = rng.integers(0, 16, (rows, columns)).astype(np.uint8)
        words = codes[module].astype(np.uint32).reshape(rows // 8, 8, columns)
        tensors[f"{module}.qweight"] = np.bitwise_or.reduce(
            words << (4 * np.arange(8, dtype=np.uint32))[:, None], axis=1).view(np.int32)
        tensors[f"{module}.scales"] = rng.random((groups, columns)).astype(np.float16)
        tensors[f"{module}.qzeros"] = np.full((groups, columns // 8), 0x77777777, np.int32)
    write_hf(tmp_path / "source", tensors=tensors)
    (tmp_path / "source" / "quantize_config.json").write_text(
        f'{{"bits": 4, "group_size": {group_size}, "sym": true, "desc_act": false}}')
    reader = open_source(tmp_path / "source")
    assert reader.formats.linear == formats.get(f"w4a16-g{group_size}")
    found = reader.read("layers_1/mlp/down/w")
    np.testing.assert_array_equal(found.q, codes["model.layers.1.mlp.down_proj"])
    np.testing.assert_array_equal(found.scales, tensors["model.layers.1.mlp.down_proj.scales"])


def test_a_bias_of_zeros_is_ignored(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "quantize_config.json"):
        (source / name).write_bytes((SOURCE / name).read_bytes())
    tensors = load_file(SOURCE / "model.safetensors")
    save_file(tensors | {"model.layers.0.mlp.down_proj.bias": np.zeros(256, np.float16)}, source / "model.safetensors")
    assert open_source(source).kind == "GPTQ"
