"""Every entry of a quantization_config is honoured, known to change nothing, or refused by name."""

import json

import numpy as np
import pytest
from anything import JSON
from fuzzing import lengths, searching
from hypothesis import given
from hypothesis import strategies as st
from packers import LAYOUTS, pack_gptq, write_quantised
from refusals import refuse
from test_bad_quantised import DOWN, Q

from checkpoints_tools.readers import open_source
from specmq_jax.errors import UserError

GPTQ_MODEL = {"format": "gptq", "method": "gptq", "pack_dtype": "int32", "lm_head": False, "damp_percent": 0.05, "mse": 0.0,
              "true_sequential": True, "act_group_aware": True, "is_marlin_format": False, "dynamic": {"-:.*vision.*": {}},
              "meta": {"quantizer": ["gptqmodel:5.0.0"], "static_groups": False}, "model_name_or_path": "a/b", "adapter": None}
AUTO_ROUND = {"autoround_version": "0.9", "iters": 200, "nsamples": 128, "seqlen": 2048, "lr": 0.005, "low_gpu_mem_usage": True,
              "enable_quanted_input": True, "enable_minmax_tuning": True, "act_dynamic": True, "act_data_type": "int",
              "block_name_to_quantize": "model.layers", "super_bits": None, "extra_config": {"lm_head": {"bits": 16}}}
COMPRESSED = {"global_compression_ratio": 1.5, "version": "0.12.2", "sparsity_config": {"format": "dense"},
              "transform_config": {}}


@pytest.mark.parametrize(("layout", "settings"), [
    ("gptq-v1", GPTQ_MODEL), ("gptq-v2", AUTO_ROUND), ("auto-round", AUTO_ROUND), ("marlin", GPTQ_MODEL),
    ("qqq-g128", {"bits": 4, "desc_act": False, "sym": True, "checkpoint_format": "qqq", "meta": {}, "pack_dtype": "int32"}),
    ("compressed", COMPRESSED), ("compressed-int8", COMPRESSED)])
def test_what_toolkits_write_of_how_the_weights_were_made_is_passed_over(tmp_path, layout, settings):
    write_quantised(tmp_path / "source", LAYOUTS[layout], settings=settings)
    assert open_source(tmp_path / "source").formats.linear.name == LAYOUTS[layout].linear


@pytest.mark.parametrize("layout", ["gptq-v1", "auto-round", "marlin", "qqq", "compressed", "compressed-int8"])
def test_an_entry_that_nobody_knows_is_refused_by_name(tmp_path, layout):
    write_quantised(tmp_path / "source", LAYOUTS[layout], settings={"clip_outputs": 3})
    refuse(tmp_path, tmp_path / "source", "clip_outputs = 3", "may change what the weights mean")


@pytest.mark.parametrize(("layout", "settings", "parts"), [
    ("gptq-v1", {"adapter": {"name": "lora", "path": "x", "rank": 8}}, ["adapter"]),
    ("gptq-v1", {"rotation": "hadamard"}, ["rotation = 'hadamard'"]),
    ("gptq-v1", {"is_marlin_format": True}, ["is_marlin_format"]),
    ("gptq-v1", {"pack_dtype": "int16"}, ["pack_dtype 'int16'", "'int32'"]),
    ("gptq-v1", {"method": "gptaq"}, ["quant_method 'gptq' and method 'gptaq'"]),
    ("gptq-v1", {"dynamic": {"+:.*down": {"group_size": 64}}}, ["+:.*down with group_size = 64", "128"]),
    ("gptq-v1", {"dynamic": {"+:.*down": {"sym": False}}}, ["+:.*down with sym = False"]),
    ("gptq-v1", {"dynamic": {"+:.*down": {"codebook": 1}}}, ["+:.*down", "codebook = 1"]),
    ("gptq-v1", {"dynamic": {"+:.*": "y"}}, ["dynamic for +:.* is 'y'", "expected an object"]),
    ("gptq-v1", {"dynamic": ["-:x"]}, ["dynamic = ['-:x']", "expected an object"]),
    ("gptq-v1", {"bits": "4"}, ["bits = '4'", "expected a whole number"]),
    ("gptq-v1", {"bits": True}, ["bits = True", "expected a whole number"]),
    ("gptq-v1", {"group_size": 128.0}, ["group_size = 128.0", "expected a whole number"]),
    ("gptq-v1", {"sym": "false"}, ["sym = 'false'", "expected true or false"]),
    ("gptq-v1", {"desc_act": "false"}, ["desc_act = 'false'", "expected true or false"]),
    ("gptq-v1", {"checkpoint_format": ["gptq"]}, ["checkpoint_format = ['gptq']", "expected a text"]),
    ("auto-round", {"extra_config": {DOWN: {"data_type": "mx_fp"}}}, [f"{DOWN} with data_type = 'mx_fp'"]),
    ("auto-round", {"extra_config": {DOWN: {"act_bits": 8}}}, [f"{DOWN} with act_bits = 8", "16"]),
    ("auto-round", {"regex_config": {".*down": {"bits": 8}}}, [".*down to 8 bits"]),
    ("auto-round", {"data_type": "nv_fp"}, ["data_type 'nv_fp'"]),
    ("auto-round", {"static_kv_dtype": "fp8"}, ["static_kv_dtype = 'fp8'"]),
    ("auto-round", {"super_bits": 6}, ["super_bits = 6"]),
    ("auto-round", {"act_bits": "8"}, ["act_bits = '8'"]),
    ("qqq", {"bits": 8}, ["8 bits"]),
    ("qqq", {"sym": False}, ["sym = false"]),
    ("qqq-g128", {"desc_act": True}, ["desc_act = true", "static_groups"]),
    ("compressed", {"kv_cache_scheme": {"num_bits": 8}}, ["kv_cache_scheme"]),
    ("compressed", {"sparsity_config": {"format": "sparse-bitmask"}}, ["sparsity_config of format 'sparse-bitmask'"]),
    ("compressed", {"ignore": [Q]}, [f"{Q} is quantised", "(ignore)"]),
    ("compressed-int8", {"ignore": [Q]}, [f"{Q} is quantised", "(ignore)"]),
    ("compressed", {"config_groups": "x"}, ["malformed config_groups"]),
])
def test_entries_that_would_change_the_weights_are_refused(tmp_path, layout, settings, parts):
    write_quantised(tmp_path / "source", LAYOUTS[layout], settings=settings)
    refuse(tmp_path, tmp_path / "source", *parts)


def change_group(directory, part, changes):
    """Changes an entry of the one scheme, or with a part None the scheme itself."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    (group if part is None else group[part]).update(changes)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(("layout", "part", "changes", "parts"), [
    ("compressed", None, {"targets": ["Linear", "LlamaAttention"]}, ["'LlamaAttention' (targets)"]),
    ("compressed", None, {"targets": "Linear"}, ["targets = 'Linear'", "expected a list"]),
    ("compressed", None, {"format": "int-quantized"}, ["format 'pack-quantized'", "'int-quantized'"]),
    ("compressed", "weights", {"actorder": "sideways"}, ["actorder = 'sideways'"]),
    ("compressed", "weights", {"block_structure": [128, 128]}, ["block_structure"]),
    ("compressed", "weights", {"num_bits": "4"}, ["num_bits = '4'"]),
    ("compressed-channel", "weights", {"group_size": 64}, ["strategy 'channel' and group_size 64"]),
    ("compressed-act-order", "weights", {"actorder": None}, ["weight_g_idx puts rows out of the order", "actorder"]),
    ("compressed-int8", "input_activations", {"symmetric": 1}, ["symmetric = 1"]),
    ("compressed-int8", None, {"input_activations": [1]}, ["input_activations = [1]", "expected an object"]),
])
def test_schemes_that_would_change_the_weights_are_refused(tmp_path, layout, part, changes, parts):
    write_quantised(tmp_path / "source", LAYOUTS[layout])
    change_group(tmp_path / "source", part, changes)
    refuse(tmp_path, tmp_path / "source", *parts)


def without_order(tensors):
    for name in [name for name in tensors if name.endswith("g_idx")]:
        del tensors[name]


@pytest.mark.parametrize(("layout", "settings", "part"), [
    ("gptq-act-order", {}, "desc_act = true and lacks the tensor model.layers.0.self_attn.q_proj.g_idx"),
    ("compressed-act-order", {}, "actorder = 'group' and lacks the tensor"),
    ("marlin", {"static_groups": False}, "desc_act = true and lacks the tensor"),
])
def test_act_order_without_the_order_is_refused(tmp_path, layout, settings, part):
    write_quantised(tmp_path / "source", LAYOUTS[layout], change=without_order, settings=settings)
    refuse(tmp_path, tmp_path / "source", part)


@pytest.mark.parametrize("settings", [{"desc_act": False}, {"static_groups": True}, {"meta": {"static_groups": True}}])
def test_without_act_order_no_order_is_needed(tmp_path, settings):
    expected = write_quantised(tmp_path / "source", LAYOUTS["gptq-v1"], change=without_order, settings=settings)
    found = open_source(tmp_path / "source").read("layers_0/mlp/down/w")
    np.testing.assert_array_equal(found.dense(), expected["layers_0/mlp/down/w"].dense())


def test_group_indices_of_one_group_are_looked_at(tmp_path):
    channel = LAYOUTS["marlin-channel"]._replace(pack=pack_gptq(7))

    def spoil(tensors):
        tensors[f"{DOWN}.g_idx"] = tensors[f"{DOWN}.g_idx"] + 1

    write_quantised(tmp_path / "source", channel, change=spoil)
    refuse(tmp_path, tmp_path / "source", f"{DOWN}.g_idx puts a row into group 1; expected 0 to 0")


def test_a_quantization_config_that_is_no_object(tmp_path):
    for value in ([], [1], "gptq", 0, False):
        write_quantised(tmp_path / "source", LAYOUTS["gptq-v1"])
        path = tmp_path / "source" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": value}))
        refuse(tmp_path, tmp_path / "source", "quantization_config", "expected an object")


@lengths
@pytest.mark.parametrize("layout", ["gptq-v1", "auto-round", "marlin", "qqq-g128", "compressed-act-order", "compressed-int8"])
def test_any_entry_may_be_wrong(tmp_path, layout, examples):
    write_quantised(tmp_path / "source", LAYOUTS[layout])
    path = tmp_path / "source" / "config.json"
    sound = json.loads(path.read_text())
    settings = sound["quantization_config"]
    known = ["dynamic", "extra_config", "meta", "method", "format", "sparsity_config", "config_groups", "ignore", "act_bits"]
    inner = st.sampled_from(["bits", "sym", "weights", "targets", "format", "group_0"])
    values = JSON | st.dictionaries(inner, JSON, max_size=3)

    @searching(examples)
    @given(st.sampled_from(sorted({*settings, *known})) | st.text(max_size=5), values, st.booleans())
    def search(key, value, inside):
        spoilt = settings | {key: value}
        if inside and "config_groups" in settings:
            group = settings["config_groups"]["group_0"]
            part = "weights" if key in group["weights"] or not group["input_activations"] else "input_activations"
            spoilt = settings | {"config_groups": {"group_0": group | {part: group[part] | {key: value}}}}
        path.write_text(json.dumps(sound | {"quantization_config": spoilt}))
        try:
            open_source(tmp_path / "source")
        except UserError as error:
            assert "\n" not in str(error)

    search()
