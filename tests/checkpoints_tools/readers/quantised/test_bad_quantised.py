"""What is wrong with a quantised source is found when it is opened and said in one line, and nothing is written."""

import json

import numpy as np
import pytest
from packers import LAYOUTS, TOKENS, write_quantised
from refusals import refuse, truncate

Q, OUT, DOWN = (f"model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"))


def set_to(name, change):
    def apply(tensors):
        tensors[name] = change(tensors[name]) if name in tensors else change(None)
    return apply


def drop(name):
    return lambda tensors: tensors.pop(name)


def everywhere(suffix, change):
    def apply(tensors):
        for name in [name for name in tensors if name.endswith(suffix)]:
            tensors[name] = change(tensors[name])
    return apply


def as_plain_values(tensors):
    for name in [name for name in tensors if name.startswith(f"{DOWN}.")]:
        del tensors[name]
    tensors[f"{DOWN}.weight"] = np.zeros((256, 384), np.float16)


def with_row(index, group):
    def change(groups):
        groups = groups.copy()
        groups[index] = group
        return groups
    return change


@pytest.mark.parametrize(("layout", "change", "parts"), [
    ("gptq-v1", drop(f"{Q}.scales"), [f"lacks the tensor {Q}.scales"]),
    ("gptq-v1", set_to(f"{Q}.scales", lambda scales: scales[:1]), [f"{Q}.scales has shape [1, 128]", "asks for [2, 128]"]),
    ("gptq-v1", set_to(f"{Q}.scales", lambda scales: scales.astype(np.int32)), [f"{Q}.scales has type I32"]),
    ("gptq-v1", set_to(f"{Q}.g_idx", lambda groups: groups[:9]), [f"{Q}.g_idx has shape [9]", "asks for [256]"]),
    ("gptq-v1", set_to(f"{Q}.g_idx", with_row(0, 2)), [f"{Q}.g_idx puts a row into group 2", "0 to 1"]),
    ("gptq-act-order", set_to(f"{Q}.g_idx", with_row(0, -1)), [f"{Q}.g_idx puts a row into group -1", "0 to 1"]),
    ("gptq-v1", set_to(f"{Q}.g_idx", with_row(0, 1)), [f"{Q}.g_idx puts 127 rows into group 0", "expected 128"]),
    ("gptq-act-order", set_to(f"{Q}.g_idx", lambda groups: groups[::-1].copy()), [Q, "k_proj", "different orders (g_idx)"]),
    ("gptq-v1", set_to(f"{Q}.bias", lambda _: np.ones(128, np.float16)), [f"{Q}.bias is not zero"]),
    ("gptq-v1", set_to(f"{Q}.input_scale", lambda _: np.ones(1, np.float16)), [f"holds the tensor {Q}.input_scale"]),
    ("gptq-v1", as_plain_values, [f"holds {DOWN} as plain values, not as int4 g128", "mixed precisions"]),
    ("gptq-v2", everywhere(".qzeros", lambda zeros: zeros.view(np.uint32) // 8 * 7), ["has type U32", "expected I32"]),
    ("gptq-v2", set_to(f"{Q}.qzeros", lambda zeros: np.full_like(zeros, 0x77777777)), [f"{Q}.qzeros", "other than 8"]),
    ("auto-round", set_to(f"{Q}.qzeros", lambda zeros: np.full_like(zeros, 0x77777777)), [f"{Q}.qzeros", "other than 8"]),
    ("marlin", set_to(f"{Q}.qweight", lambda words: words[:, :128]), [f"{Q}.qweight has shape [16, 128]", "[16, 256]"]),
    ("marlin", set_to(f"{Q}.g_idx", lambda _: np.zeros(256, np.int32)), [f"holds the tensor {Q}.g_idx"]),
    ("qqq", set_to(f"{Q}.s_group", lambda _: np.ones((2, 128), np.float16)), [f"holds the tensor {Q}.s_group"]),
    ("qqq-g128", drop(f"{OUT}.s_group"), [f"lacks the tensor {OUT}.s_group"]),
    ("qqq-g128", set_to(f"{OUT}.s_channel", lambda scales: scales.astype(np.float16)), [f"{OUT}.s_channel has type F16"]),
    ("compressed", set_to(f"{Q}.weight_shape", lambda shape: shape + 1), [f"{Q}.weight_shape holds [129, 257]"]),
    ("compressed", set_to(f"{Q}.weight_scale", lambda scales: scales[:, :1]), [f"{Q}.weight_scale has shape [128, 1]"]),
    ("compressed-act-order", set_to(f"{Q}.weight_g_idx", with_row(0, 7)), [f"{Q}.weight_g_idx", "group 7"]),
    ("compressed-int8", set_to(f"{Q}.input_scale", lambda _: np.ones(1, np.float16)), [f"holds the tensor {Q}.input_scale"]),
    ("compressed-int8", set_to(f"{Q}.weight", lambda values: values.astype(np.float16)), [f"{Q}.weight has type F16"]),
    ("qserve-int8", drop(f"{Q}.dequant_scale"), [f"holds {Q} as plain values", "mixed precisions"]),
    ("qoq", drop(f"{Q}.s1_szeros"), [f"lacks the tensor {Q}.s1_szeros"]),
    ("qoq-g128", drop(f"{Q}.s2_zeros"), [f"lacks the tensor {Q}.s2_zeros"]),
    ("qoq-g128", set_to(f"{Q}.s2_zeros", lambda zeros: zeros[:1]), [f"{Q}.s2_zeros has shape [1, 128]", "[2, 128]"]),
    ("qoq-g128", everywhere(".s2_scales", lambda scales: scales * 0 + 127), [f"{Q}.s2_scales", "beyond 8 bits"]),
])
def test_tensors_that_are_not_as_they_should_be(tmp_path, layout, change, parts):
    write_quantised(tmp_path / "source", LAYOUTS[layout], change=change)
    refuse(tmp_path, tmp_path / "source", *parts)


@pytest.mark.parametrize(("layout", "settings", "parts"), [
    ("gptq-v1", {"bits": 3}, ["3 bits", "only 4"]),
    ("gptq-v1", {"sym": False}, ["sym = false"]),
    ("gptq-v1", {"group_size": 48}, ["group_size 48", "supported are -1, 32, 64, 128"]),
    ("gptq-v1", {"checkpoint_format": "bitblas"}, ["'bitblas'", "'gptq', 'gptq_v2'"]),
    ("gptq-v1", {"dynamic": {"+:.*down": {"bits": 8}}}, ["+:.*down to 8 bits", "mixed precisions"]),
    ("gptq-v1", {"quant_method": "awq"}, ["'awq'", "'gptq', 'auto-round', 'qqq'"]),
    ("marlin", {"bits": 8}, ["8 bits", "only 4"]),
    ("auto-round", {"packing_format": "auto_round:auto_awq"}, ["packing_format 'auto_round:auto_awq'"]),
    ("auto-round", {"extra_config": {DOWN: {"bits": 16}}}, [f"{DOWN} to 16 bits", "mixed precisions"]),
    ("auto-round", {"act_bits": 8}, ["8-bit activations"]),
    ("qqq", {"wbits": 8}, ["8 bits", "only 4"]),
    ("qqq", {"group_size": 64}, ["QQQ group_size 64"]),
    ("compressed", {"format": "nvfp4-pack-quantized"}, ["'nvfp4-pack-quantized'"]),
    ("compressed", {"config_groups": {}}, ["0 config_groups"]),
    ("compressed", {"config_groups": [1]}, ["malformed config_groups"]),
    ("compressed", {"kv_cache_scheme": {"num_bits": 8}}, ["kv_cache_scheme"]),
    ("compressed", {"transform_config": {"config_groups": {"R3": {}}}}, ["transform_config"]),
])
def test_settings_that_are_not_read(tmp_path, layout, settings, parts):
    write_quantised(tmp_path / "source", LAYOUTS[layout], settings=settings)
    refuse(tmp_path, tmp_path / "source", *parts)


@pytest.mark.parametrize(("layout", "part", "changes", "expected"), [
    ("compressed", "weights", {"num_bits": 3}, "3 bits"),
    ("compressed", "weights", {"symmetric": False}, "symmetric = False"),
    ("compressed", "weights", {"type": "float"}, "type = 'float'"),
    ("compressed", "weights", {"strategy": "block"}, "strategy 'block'"),
    ("compressed", "weights", {"group_size": 16}, "group_size 16"),
    ("compressed", "input_activations", TOKENS, "activations of 4-bit weights"),
    ("compressed-int8", "weights", {"num_bits": 4}, "4 bits"),
    ("compressed-int8", "weights", {"strategy": "tensor"}, "strategy 'tensor'"),
    ("compressed-int8", "input_activations", {"dynamic": False}, "dynamic = False"),
    ("compressed-int8", "output_activations", TOKENS, "output_activations"),
])
def test_schemes_of_compressed_tensors_that_are_not_read(tmp_path, layout, part, changes, expected):
    write_quantised(tmp_path / "source", LAYOUTS[layout])
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    group[part] = {**(group[part] or {}), **changes}
    path.write_text(json.dumps(config))
    refuse(tmp_path, tmp_path / "source", expected)


def test_two_schemes_in_one_model(tmp_path):
    write_quantised(tmp_path / "source", LAYOUTS["compressed"], settings={"config_groups": {"a": {}, "b": {}}})
    refuse(tmp_path, tmp_path / "source", "2 config_groups", "mixed precisions")


@pytest.mark.parametrize("layout", ["gptq-v1", "qqq", "compressed"])
def test_quantised_weights_without_a_word_on_them(tmp_path, layout):
    write_quantised(tmp_path / "source", LAYOUTS[layout])
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    refuse(tmp_path, tmp_path / "source", "holds quantised weights", "no quantization_config")


@pytest.mark.parametrize("layout", ["marlin", "qoq-g128", "compressed-int8"])
def test_a_truncated_file(tmp_path, layout):
    write_quantised(tmp_path / "source", LAYOUTS[layout])
    truncate(tmp_path / "source" / "model.safetensors", 50)
    refuse(tmp_path, tmp_path / "source", "truncated")
