"""Whatever a head's files say that the official network does not do is refused by name, and by both that read them."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from written_heads import BASES, HEADS, settings_of, tensors_of, write_head

import specmq_jax as sm
from specmq_jax.loading.head import head_version, outline_head
from specmq_jax.loading.model import outline

NORM = np.ones(256, np.float16)


@pytest.fixture(scope="module")
def bases():
    return {version: sm.load(path) for version, path in BASES.items()}


@pytest.fixture(scope="module")
def outlines():
    return {version: outline(path) for version, path in BASES.items()}


def refusal(load, *arguments, **options):
    with pytest.raises(sm.UserError) as error:
        load(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def refuses(bases, outlines):
    """Both functions refuse a directory in the same words, which have those given in them."""
    def check(directory, version, *parts, precision=None):
        message = refusal(sm.load_head, directory, bases[version], precision=precision)
        assert message == refusal(outline_head, directory, outlines[version], precision=precision)
        for part in (str(directory), *parts):
            assert part in message
    return check


def layers0(name):
    return name.replace("midlayer.", "layers.0.")


SPECULATORS = {"speculators_model_type": "eagle3", "transformer_layer_config": {"hidden_size": 256}}


@pytest.mark.parametrize(("version", "changes", "layout"), [
    (3, dict(rename=layers0, **SPECULATORS), "in the layout of vLLM's speculators"),
    (3, SPECULATORS, "in the layout of vLLM's speculators (config.json has transformer_layer_config, of kind eagle3)"),
    (3, dict(rename=layers0), "is named layers.0., officially midlayer."),
    (3, dict(rename=lambda name: name if "lm_head" in name or "2" in name else f"model.{name}"), "names begin with model."),
    (2, dict(rename=lambda name: f"module.{name}"), "names begin with module."),
    (3, dict(dflash_config={"mask_token_id": 3}), "a DFlash head"),
    (3, dict(architectures=["DFlashDraftModel"]), "a DFlash head"),
    (3, dict(dflash_config={"causal_head": True}), "a JetSpec head"),
    (3, dict(tensors={"mask_hidden": np.zeros((1, 1, 768), np.float16)}), "a P-EAGLE head"),
    (2, dict(tensors={"0.0.linear.weight": np.zeros((4, 4), np.float16), "fc.weight": None}), "Medusa heads"),
    (2, dict(medusa_num_heads=4), "Medusa heads"),
    (2, dict(model_type="mlp_speculator"), "an MLP speculator"),
    (2, dict(tensors={"mtp.0.enorm.weight": NORM}), "multi-token prediction (MTP; tensor mtp.0.enorm.weight)"),
    (3, dict(architectures=["Eagle3DeepseekV2ForCausalLM"]), "multi-head latent attention (MLA)"),
    (2, dict(quantization_config={"quant_method": "gptq"}), "a quantised head (config.json has quantization_config)"),
    (2, dict(tensors={"fc.qweight": np.zeros((4, 4), np.int32), "fc.weight": None}), "a quantised head (tensor fc.qweight)"),
    (2, dict(model={"hidden_size": 256}), "vLLM's EAGLE configurations"),
])
def test_a_head_of_another_layout_is_told_by_its_name(refuses, tmp_path, version, changes, layout):
    write_head(tmp_path, version, **changes)
    refuses(tmp_path, version, layout, "only EAGLE-1, -2 and -3 heads in the official layout (SafeAILab/EAGLE) are read")
    assert layout in refusal(head_version, tmp_path)


@pytest.mark.parametrize(("version", "name", "shape"), [
    (2, "layers.0.input_layernorm.weight", (256,)), (2, "norm.weight", (256,)), (2, "norm.bias", (256,)),
    (2, "layers.0.self_attn.q_norm.weight", (64,)), (3, "midlayer.self_attn.k_norm.weight", (64,)),
    (3, "fc_norm.0.weight", (256,)), (3, "input_norm.weight", (768,)), (3, "extra.weight", (3, 4)),
    (3, "midlayer.self_attn.q_proj.bias", (7,)), (3, "midlayer.mlp.gate_proj.lora_A.weight", (8, 256))])
def test_a_tensor_that_the_network_does_not_use_is_named(refuses, tmp_path, version, name, shape):
    write_head(tmp_path, version, {name: np.ones(shape, np.float16)})
    refuses(tmp_path, version, f"holds the tensor {name}, which an EAGLE-{version} head of 1 layer does not use")


@pytest.mark.parametrize(("version", "name", "size"), [
    (2, "layers.0.self_attn.q_proj.bias", 256), (3, "midlayer.self_attn.v_proj.bias", 128), (3, "fc.bias", 256),
    (3, "midlayer.mlp.down_proj.bias", 256), (3, "lm_head.bias", 128)])
def test_a_bias_counts_only_where_it_is_zero(bases, tmp_path, version, name, size):
    bias = np.zeros(size, np.float16)
    found = sm.load_head(write_head(tmp_path, version, {name: bias}), bases[version])
    expected = sm.load_head(HEADS[version], bases[version])
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    bias[3] = 0.01
    assert f"tensor {name} is not zero" in refusal(sm.load_head, write_head(tmp_path, version, {name: bias}), bases[version])


@pytest.mark.parametrize(("version", "entry", "value"), [
    (3, "norm_before_residual", True), (3, "norm_before_fc", True), (3, "fc_norm", True), (3, "norm_output", True),
    (3, "norm_output", "false"), (2, "fc_norm", 1), (3, "bias", True), (2, "bias", "no"), (2, "bias", None),
    (2, "qkv_bias", True), (3, "use_qk_norm", True), (3, "parallel_drafting", True), (3, "logit_scale", 0.5),
    (3, "has_own_embed_tokens", True), (2, "has_own_embed_tokens", False), (3, "has_own_lm_head", False),
    (2, "rotated_target", True), (3, "rotated_target", "yes"), (3, "draft_vocab_size", 127), (2, "draft_vocab_size", 300),
    (3, "draft_vocab_size", True), (3, "target_hidden_size", 128), (3, "hidden_size", "256"), (3, "hidden_size", -1),
    (3, "num_hidden_layers", 2), (2, "num_hidden_layers", 9), (3, "eagle_config", "nothing"),
    (2, "eagle_aux_hidden_state_layer_ids", [2, 3, 4]), (3, "eagle_aux_hidden_state_layer_ids", [4, 3, 2]),
    (3, "eagle_aux_hidden_state_layer_ids", [2, 2, 3]), (3, "eagle_aux_hidden_state_layer_ids", "2, 3, 4"),
    (3, "eagle_aux_hidden_state_layer_ids", [2, 3, 4.0]), (3, "eagle_aux_hidden_state_layer_ids", [True, 3, 4])])
def test_an_entry_that_is_not_honoured_is_named(refuses, tmp_path, version, entry, value):
    refuses(write_head(tmp_path, version, **{entry: value}), version, f"config.json has {entry}")


@pytest.mark.parametrize(("entry", "value"), [
    ("use_aux_hidden_state", False), ("use_mtp_layernorm", True), ("eh_proj_before_attn", True), ("parallel_draft_step", 2),
    ("use_last_layernorm", False), ("use_input_layernorm_in_first_layer", False), ("norm_before_fc", True),
    ("return_hidden_post_norm", True), ("something_else", 1)])
def test_an_entry_inside_eagle_config_is_named_with_its_place(refuses, tmp_path, entry, value):
    refuses(write_head(tmp_path, 3, eagle_config={entry: value}), 3, "config.json has", f"eagle_config.{entry}")


def test_entries_that_state_the_official_network_change_nothing(bases, tmp_path):
    stated = dict(norm_before_residual=False, fc_norm=None, norm_output=False, bias=False, logit_scale=1.0,
                  has_own_embed_tokens=False, has_own_lm_head=True, target_hidden_size=256, num_hidden_layers=1,
                  draft_vocab_size=128, eagle_aux_hidden_state_layer_ids=[2, 3, 4], target_layer_ids=[1, 2, 3],
                  aux_hidden_state_layer_ids=[2, 3, 4], speculators_version="0.1", auto_map={}, rotated_target=False,
                  architectures=["LlamaForCausalLMEagle3"],
                  eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 2, 3], "use_aux_hidden_state": True,
                                "use_last_layernorm": True, "parallel_draft_step": 1})
    found, expected = (sm.load_head(path, bases[3]) for path in (write_head(tmp_path, 3, **stated), HEADS[3]))
    assert found.capture == expected.capture == (2, 3, 4)
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


def features(base, directory):
    """What the head computes of a few tokens with the streams that it reads of them."""
    head, tokens = sm.load_head(directory, base), jnp.asarray([5, 9, 77, 300, 12, 8, 41])
    module = base.module.clone(capture=head.capture)

    @jax.jit
    def run(target, params):
        _, streams, _ = module.apply(target, tokens, base.new_cache(128))
        return head.module.apply(params, tokens, streams, head.new_cache(128), jnp.arange(len(tokens)), None, own=False)[0]

    return np.asarray(run(base.params, head.params["head"]))


@pytest.mark.parametrize("settings", [dict(eagle_aux_hidden_state_layer_ids=[1, 2, 3]), dict(eagle_config={
    "eagle_aux_hidden_state_layer_ids": [0, 1, 2]}), dict(eagle_aux_hidden_state_layer_ids=[1, 2, 3], eagle_config={
        "eagle_aux_hidden_state_layer_ids": [0, 1, 2]})])
def test_a_head_reads_the_layers_that_it_names(bases, tmp_path, settings):
    """Two heads read the same two streams of three: each has the columns of the third at zero."""
    first, second, _ = np.split(tensors_of(3)["fc.weight"], 3, axis=1)
    none = np.zeros_like(first)
    usual = write_head(tmp_path / "usual", 3, {"fc.weight": np.concatenate([first, second, none], 1)})
    named = write_head(tmp_path / "named", 3, {"fc.weight": np.concatenate([none, first, second], 1)}, **settings)
    assert sm.load_head(named, bases[3]).capture == (1, 2, 3)
    expected = features(bases[3], usual)
    np.testing.assert_allclose(features(bases[3], named), expected, rtol=1e-4, atol=1e-4)
    assert np.abs(features(bases[3], HEADS[3]) - expected).max() > 0.1


def test_lists_of_layers_that_contradict_are_refused(refuses, tmp_path):
    name = "eagle_aux_hidden_state_layer_ids"
    both = dict(eagle_config={name: [2, 3, 4]})
    for settings, parts in (
            ({name: [2, 3, 4], **both}, ("two lists of layers", "layers [2, 3, 4] and [3, 4, 5]")),
            ({"target_layer_ids": [2, 3, 4]}, ("target_layer_ids = [2, 3, 4]", "layers [3, 4, 5]; this head reads [2, 3, 4]")),
            ({"aux_hidden_state_layer_ids": [1, 3, 4]}, ("aux_hidden_state_layer_ids = [1, 3, 4]", "reads [2, 3, 4]"))):
        refuses(write_head(tmp_path, 3, **settings), 3, *parts)


def test_more_layers_or_fewer_than_the_target_has_are_refused(bases, tmp_path):
    name = "eagle_aux_hidden_state_layer_ids"
    for ids, part in (([2, 3, 7], "layers (2, 3, 7); this target has 7, at least 8 are needed"),
                      ([-1, 2, 3], "layers (-1, 2, 3)"), ([2, 3], "reads states of width 768")):
        assert part in refusal(sm.load_head, write_head(tmp_path, 3, **{name: ids}), bases[3])


def test_a_tied_head_has_the_scores_that_it_says(refuses, bases, tmp_path):
    table = np.zeros((512, 256), np.float16)
    whole = dict(d2t=None, t2d=None)
    whole["lm_head.weight"] = None
    for tensors in (whole, whole | {"embed_tokens.weight": table}):
        write_head(tmp_path, 3, tensors, absent=("draft_vocab_size",), tie_word_embeddings=True)
        refuses(tmp_path, 3, "tie_word_embeddings = true", "save the embedding as lm_head.weight")
    assert sm.load_head(write_head(tmp_path, 3, tie_word_embeddings=True), bases[3]).config.layer.vocab_size == 128


def test_masks_of_the_draft_vocabulary_agree_with_its_ids(bases, tmp_path):
    ids = np.arange(128) + tensors_of(3)["d2t"]
    known = np.zeros(512, bool)
    known[ids] = True
    sm.load_head(write_head(tmp_path, 3, {"t2d": known}), bases[3])
    wrong = known.copy()
    wrong[ids[7]] = False
    other = int(np.flatnonzero(~known)[0])
    more = known.copy()
    more[other] = True
    for mask, part in ((wrong, f"t2d is False for token {ids[7]}, which the draft vocabulary has by tensor d2t"),
                       (more, f"t2d is True for token {other}, which the draft vocabulary lacks by tensor d2t"),
                       (known.astype(np.uint8) * 2, "t2d is 2 for token")):
        assert part in refusal(sm.load_head, write_head(tmp_path, 3, {"t2d": mask}), bases[3])
    assert "(there is no tensor d2t)" in refusal(sm.load_head, write_head(tmp_path, 2, {"t2d": known}), bases[2])
    for mask in (np.zeros((), bool), np.zeros((512, 1), bool)):
        assert "for a vocabulary of" in refusal(sm.load_head, write_head(tmp_path, 3, {"t2d": mask}), bases[3])


PLACES = [(2, name) for name in ("fc.weight", "fc.bias", "embed_tokens.weight", "layers.0.mlp.up_proj.weight",
                                 "layers.0.post_attention_layernorm.weight")]
PLACES += [(3, name) for name in ("norm.weight", "midlayer.hidden_norm.weight", "midlayer.input_layernorm.weight",
                                  "lm_head.weight", "midlayer.self_attn.k_proj.weight")]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("version", "name"), PLACES)
def test_a_value_that_is_not_finite_is_refused(bases, tmp_path, version, name, value):
    values = tensors_of(version)[name].copy()
    values.reshape(-1)[5] = value
    write_head(tmp_path, version, {name: values})
    precision = "w4a16-g64" if value == np.inf else None
    message = refusal(sm.load_head, tmp_path, bases[version], precision=precision)
    assert f"tensor {name} holds values that are not finite" in message


@pytest.mark.parametrize("precision", ["fp16", "w4a16-g64"])
def test_a_value_beyond_the_range_of_its_format_is_refused(bases, tmp_path, precision):
    for name, part in (("fc.weight", "fc.weight"), ("layers.0.self_attn.v_proj.weight", "self_attn.v_proj.weight")):
        values = tensors_of(2)[name].astype(np.float32)
        values[3, 4] = 1e6
        write_head(tmp_path, 2, {name: values})
        message = refusal(sm.load_head, tmp_path, bases[2], precision=precision)
        assert f"{part} holds values up to 1e+06, beyond the range of float16; choose another precision" in message
        assert sm.load_head(tmp_path, bases[2], precision="fp32").config.version == 2
    tiny = tensors_of(2)["fc.weight"].astype(np.float32) * 1e-9
    message = refusal(sm.load_head, write_head(tmp_path, 2, {"fc.weight": tiny}), bases[2], precision=precision)
    assert "tensor fc.weight holds values of at most" in message and "below the range of float16" in message
    huge = tensors_of(2)["fc.weight"].astype(np.float64)
    huge[0, 0] = 1e300
    message = refusal(sm.load_head, write_head(tmp_path, 2, {"fc.weight": huge}), bases[2], precision="fp32")
    assert "tensor fc.weight holds values up to 1e+300, beyond the range of float32" in message


@pytest.mark.parametrize("version", [2, 3])
def test_a_head_is_the_same_in_every_dtype_that_holds_it(bases, tmp_path, version):
    plain = {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors_of(version).items() if value.dtype == np.float16}
    expected = sm.load_head(write_head(tmp_path / "bf16", version, plain), bases[version])
    dtypes = 9 * [np.float32, ml_dtypes.bfloat16, np.float64]
    kinds = [{name: value.astype(dtype) for (name, value), dtype in zip(plain.items(), dtypes, strict=False)},
             *({name: value.astype(dtype) for name, value in plain.items()} for dtype in (np.float32, np.float64))]
    for number, tensors in enumerate(kinds):
        found = sm.load_head(write_head(tmp_path / str(number), version, tensors), bases[version])
        jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


@pytest.mark.parametrize(("version", "name", "dtype", "found"), [
    (2, "fc.weight", np.int8, "I8"), (2, "fc.bias", np.int32, "I32"), (3, "norm.weight", np.bool_, "BOOL"),
    (3, "lm_head.weight", ml_dtypes.float8_e4m3fn, "F8_E4M3"), (3, "d2t", np.float32, "F32"), (3, "t2d", np.float16, "F16")])
def test_a_tensor_of_another_type_is_named(refuses, tmp_path, version, name, dtype, found):
    values = tensors_of(version).get(name, np.zeros(512)).astype(dtype)
    path = write_head(tmp_path, version, {name: None})
    tensors = {key: value for key, value in tensors_of(version).items() if key != name}
    write_safetensors(path / "model.safetensors", tensors | {name: values}, {name: found})
    refuses(path, version, f"tensor {name} has type {found}; expected")


def write_safetensors(path, tensors, types):
    """With types that NumPy has no name for."""
    names = {np.dtype(np.float16): "F16", np.dtype(np.int64): "I64", np.dtype(bool): "BOOL"}
    header, parts, offset = {}, [], 0
    for name, value in tensors.items():
        data = np.ascontiguousarray(value).tobytes()
        header[name] = {"dtype": types.get(name) or names[value.dtype], "shape": list(value.shape),
                        "data_offsets": [offset, offset + len(data)]}
        parts.append(data)
        offset += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))


def shards(directory, version, split):
    """The head in two files and their index."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(settings_of(version)))
    places = {name: f"model-0000{1 + (number >= split)}-of-00002.safetensors"
              for number, name in enumerate(sorted(tensors_of(version)))}
    for file in sorted(set(places.values())):
        save_file({name: value for name, value in tensors_of(version).items() if places[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return directory, places


@pytest.mark.parametrize("version", [2, 3])
def test_a_head_in_shards_equals_the_one_file(bases, outlines, tmp_path, version):
    directory, _ = shards(tmp_path, version, 4)
    found, expected = (sm.load_head(path, bases[version]) for path in (directory, HEADS[version]))
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    assert outline_head(directory, outlines[version]).config == expected.config


def test_shards_and_their_index_hold_the_same_tensors(refuses, tmp_path):
    directory, places = shards(tmp_path, 2, 4)
    first, second = sorted(set(places.values()))
    index = directory / "model.safetensors.index.json"

    def say(weight_map):
        index.write_text(json.dumps({"weight_map": weight_map}))

    for wrong in ({}, {"fc.weight": 3}, {"fc.weight": "../model.safetensors"}, ["fc.weight"], {"fc.weight": "model.bin"}):
        say(wrong)
        refuses(directory, 2, f"{index} must hold a weight_map")
    say(places | {"norm.weight": first})
    refuses(directory, 2, f"places tensor norm.weight in file {first}; it is in none")
    say(places | {"fc.weight": second})
    refuses(directory, 2, f"places tensor fc.weight in file {second}; it is in {first}")
    say({name: file for name, file in places.items() if name != "fc.weight"})
    refuses(directory, 2, f"places tensor fc.weight in file none; it is in {first}")
    say(places)
    save_file({"fc.bias": tensors_of(2)["fc.bias"], **{name: value for name, value in tensors_of(2).items()
                                                       if places[name] == second}}, directory / second)
    refuses(directory, 2, f"holds tensor fc.bias twice, in {first} and in {second}")
    (directory / second).unlink()
    refuses(directory, 2, f"{second} is missing; {index.name} names it")
    directory, _ = shards(tmp_path / "both", 2, 4)
    refuses(write_head(directory, 2), 2, "holds model.safetensors and an index of other files, model.safetensors.index.json")


def test_a_directory_without_a_head_is_told(refuses, bases, tmp_path):
    refuses(tmp_path / "none", 2, "does not exist; expected the directory of an EAGLE head")
    refuses(HEADS[2] / "config.json", 2, "is a file; expected the directory of an EAGLE head")
    (tmp_path / "model.safetensors").mkdir()
    refuses(tmp_path, 2, "holds neither model.safetensors nor pytorch_model.bin")
    assert "from the path of its directory; found a int" in refusal(sm.load_head, 5, bases[2])
    assert "must be what specmq_jax.load returns; found a str" in refusal(sm.load_head, HEADS[2], "model")
    refuses(write_head(tmp_path / "empty", 2, {"fc.bias": np.zeros(0, np.float16)}), 2, "tensor fc.bias is empty")
