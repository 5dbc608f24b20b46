"""A head whose files have been changed in any way is loaded or refused in one line, by `load_head` and `outline_head` alike."""

import json
import re

import jax
import ml_dtypes
import numpy as np
import pytest
from fuzzing import lengths, searching
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save
from written_heads import BASES, HEADS, settings_of, tensors_of

import specmq_jax as sm
from specmq_jax.loading.head import head_version, outline_head
from specmq_jax.loading.model import outline

LAYERS = "eagle_aux_hidden_state_layer_ids"
OWN_ENTRIES = ("bias", "draft_vocab_size", "target_hidden_size", "hidden_size", "vocab_size", "norm_before_residual",
               "norm_before_fc", "fc_norm", "norm_output", "eagle_config", LAYERS, "target_layer_ids", "rotated_target",
               "has_own_embed_tokens", "has_own_lm_head", "architectures", "model_type", "dflash_config", "model",
               "speculators_model_type", "quantization_config", "qkv_bias", "parallel_draft_step", "logit_scale")
LLAMA_ENTRIES = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers",
                 "rms_norm_eps", "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "hidden_act",
                 "tie_word_embeddings", "attention_bias", "mlp_bias", "sliding_window")
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 600) | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["llama3", "dynamic", "256", "eagle3"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from([LAYERS, "rope_type", "factor", "use_aux_hidden_state", "rope_theta", "x"]), inner, max_size=3),
    max_leaves=5)
DTYPES = (np.float16, np.float32, np.float64, ml_dtypes.bfloat16, np.int8, np.int64, np.uint8, np.bool_)
ABOUT_VALUES = re.compile("not finite|the range of|d2t stands for|t2d is|is not zero|rotated")


@pytest.fixture(scope="module")
def targets():
    return {version: (sm.load(path), outline(path)) for version, path in BASES.items()}


def agree(directory, version, targets):
    """What `load_head` and `outline_head` say of a directory, which stays as it is."""
    before = sorted(directory.rglob("*"))
    target, outlined = targets[version]
    results = []
    for make, base in ((sm.load_head, target), (outline_head, outlined)):
        try:
            results.append(make(directory, base))
        except sm.UserError as error:
            assert "\n" not in str(error)
            results.append(str(error))
    found, described = results
    if isinstance(described, str):
        assert found == described
    elif isinstance(found, str):
        assert ABOUT_VALUES.search(found)
    else:
        assert (found.config, found.capture) == (described.config, described.capture)
        shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (found.params, described.params))
        assert shapes[0] == shapes[1]
        assert head_version(directory) == found.config.version
    assert sorted(directory.rglob("*")) == before


def changed_entries(names):
    return st.dictionaries(st.sampled_from(names), VALUES, min_size=1, max_size=3)


def fuzz_entries(examples, names, targets, directory):
    for version, head in HEADS.items():
        (directory / str(version)).mkdir()
        (directory / str(version) / "model.safetensors").symlink_to(head / "model.safetensors")

    @searching(examples)
    @given(st.sampled_from([2, 3]), changed_entries(names), st.lists(st.sampled_from(names), max_size=1))
    def check(version, entries, absent):
        settings = {key: value for key, value in (settings_of(version) | entries).items() if key not in absent}
        (directory / str(version) / "config.json").write_text(json.dumps(settings))
        agree(directory / str(version), version, targets)

    check()


@lengths
def test_any_entries_of_heads_in_config_json(examples, targets, tmp_path):
    fuzz_entries(examples, OWN_ENTRIES, targets, tmp_path)


@st.composite
def changed_tensors(draw):
    """A version, and its tensors after a few changes."""
    version = draw(st.sampled_from([2, 3]))
    tensors = dict(tensors_of(version))
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(tensors)))
        value = tensors.pop(name)
        match draw(st.integers(0, 6)):
            case 0:
                tensors[draw(st.sampled_from(["norm.weight", "layers.1.mlp.up_proj.weight", "x", f"model.{name}", "t2d", "d2t",
                                              name.replace("weight", "bias"), name.replace("midlayer", "layers.0")]))] = value
            case 1:
                tensors[name] = np.resize(value, draw(st.lists(st.sampled_from([0, 1, 3, 128, 256, 512]), max_size=3)))
            case 2:
                with np.errstate(invalid="ignore", over="ignore"):
                    tensors[name] = value.astype(draw(st.sampled_from(DTYPES)))
            case 3 if value.size:
                tensors[name] = value.copy()
                place = draw(st.integers(0, value.size - 1))
                odd = draw(st.sampled_from([np.nan, np.inf, -6e4] if value.dtype.kind == "f" else [1, 7]))
                tensors[name].reshape(-1)[place] = odd
            case 4:
                tensors[name] = value.T
            case 5:
                tensors |= {name: value, name.replace("weight", "bias"): np.zeros(value.shape[:1], np.float16)}
    return version, tensors


@lengths
def test_any_tensors(examples, targets, tmp_path):
    for version, head in HEADS.items():
        (tmp_path / str(version)).mkdir()
        (tmp_path / str(version) / "config.json").write_bytes((head / "config.json").read_bytes())

    @searching(examples)
    @given(changed_tensors())
    def check(changed):
        version, tensors = changed
        (tmp_path / str(version) / "model.safetensors").write_bytes(
            save({name: np.ascontiguousarray(value) for name, value in tensors.items()}))
        agree(tmp_path / str(version), version, targets)

    check()


@lengths
def test_any_bytes(examples, targets, tmp_path):
    whole = (HEADS[2] / "model.safetensors").read_bytes()
    header = int.from_bytes(whole[:8], "little")
    (tmp_path / "config.json").write_bytes((HEADS[2] / "config.json").read_bytes())

    @searching(examples)
    @given(st.integers(0, header + 40) | st.integers(0, len(whole)), st.integers(0, 3), st.binary(max_size=12))
    def check(place, how, inserted):
        rest = {0: b"", 1: whole[place:], 2: whole[place + len(inserted):], 3: whole[place + 1:]}[how]
        (tmp_path / "model.safetensors").write_bytes(whole[:place] + inserted + rest)
        agree(tmp_path, 2, targets)

    check()


@lengths
def test_any_index(examples, targets, tmp_path):
    (tmp_path / "config.json").write_bytes((HEADS[2] / "config.json").read_bytes())
    (tmp_path / "one.safetensors").write_bytes((HEADS[2] / "model.safetensors").read_bytes())
    names, index = sorted(tensors_of(2)), tmp_path / "model.safetensors.index.json"

    @searching(examples)
    @given(VALUES | st.dictionaries(st.sampled_from(["weight_map", "metadata"]), VALUES) | st.fixed_dictionaries(
        {"weight_map": st.dictionaries(st.sampled_from([*names, "x"]), st.sampled_from(
            ["one.safetensors", "two.safetensors", "../one.safetensors", "", "."]) | VALUES)}))
    def check(content):
        index.write_text(json.dumps(content))
        agree(tmp_path, 2, targets)

    check()
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "one.safetensors")}))
    assert sm.load_head(tmp_path, targets[2][0]).config.version == 2


@lengths
def test_any_entries_of_a_llama_in_config_json(examples, targets, tmp_path):
    fuzz_entries(examples, LLAMA_ENTRIES, targets, tmp_path)
