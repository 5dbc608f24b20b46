"""Families of dense decoders: their logits and tokens are those of a second decoder and of Hugging Face's, whatever style
config.json has; what is not covered is refused by name."""

import dataclasses
import json
import pathlib
import re
import shutil

import numpy as np
import pytest
from configs import PLAIN
from fakes import OracleDrafter
from family_models import MODELS, VOCAB

import specmq_jax as sm
from checkpoints_tools.conversion import convert
from experiments.timing.random_models import random_head
from specmq_jax import formats
from specmq_jax.network.config import LlamaConfig
from specmq_jax.network.families import FAMILIES

GOLDENS = pathlib.Path(__file__).parents[4] / "shared" / "families"
FILES = ("cohere2", "exaone4", "gemma2", "gemma3", "glm4", "granite", "llama-bias", "llama-headdim", "mistral", "olmo2",
         "olmo3", "phi3", "phi3-longrope", "phi3-partial", "qwen2", "qwen2-gptq", "qwen2-window", "qwen3", "smollm3",
         "stablelm", "starcoder2")
PROMPT = np.random.default_rng(7).integers(3, VOCAB, 21)
NEW = 12


@pytest.fixture(scope="module", params=MODELS)
def family(request, tmp_path_factory):
    """A model's description, its tensors as in the file, and what is loaded."""
    directory = tmp_path_factory.mktemp("family")
    tensors = MODELS[request.param].write(directory / "source")
    return MODELS[request.param], tensors, sm.load(convert(directory / "source", directory / "made"))


def test_every_family_is_declared_spoken_of_and_has_a_model():
    page = (pathlib.Path(__file__).parents[3] / "README.md").read_text()
    (table,) = re.findall(r"^\| `model_type` .*\n\|[-|]*\n((?:\|.*\n)*)", page, re.MULTILINE)
    listed = [name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(listed) == sorted(FAMILIES) == sorted({model.config["model_type"] for model in MODELS.values()})


def test_logits_are_the_second_decoders(family):
    model, tensors, loaded = family
    np.testing.assert_allclose(sm.logits(loaded, PROMPT), model.decoder.logits(tensors, PROMPT), atol=5e-5)


def test_cached_decoding_takes_the_best_token_of_whole_sequences(family):
    model, tensors, loaded = family
    decoder = sm.Decoder(loaded, sm.NoDrafter(), sm.DecodeConfig(max_len=48, prefill_chunks=(8,)))
    tokens = np.asarray(decoder.generate(PROMPT, max_new_tokens=NEW).tokens)
    scores = model.decoder.logits(tensors, [*PROMPT, *tokens])[len(PROMPT) - 1:-1]
    np.testing.assert_array_equal(tokens, scores.argmax(-1))


def test_both_styles_of_config_say_the_same(family):
    model, _, loaded = family
    assert LlamaConfig.from_hf(model.config_v4) == LlamaConfig.from_hf(model.config) == loaded.config


def test_a_family_is_told_by_either_name(family):
    model, *_ = family
    for key in ("architectures", "model_type"):
        assert LlamaConfig.from_hf({k: v for k, v in model.config.items() if k != key}) == LlamaConfig.from_hf(model.config)


@pytest.mark.parametrize("name", ["qwen2-window", "gemma3", "stablelm-parallel"])
def test_drafts_of_a_chain_change_no_token(tmp_path, name):
    MODELS[name].write(tmp_path / "source")
    target = sm.load(convert(tmp_path / "source", tmp_path / "made"))
    config = sm.DecodeConfig(max_len=64)
    plain = sm.Decoder(target, sm.NoDrafter(), config).generate(PROMPT, max_new_tokens=24)
    found = sm.Decoder(target, sm.ChainDrafter(target.with_precision("w8a16"), length=3), config).generate(
        PROMPT, max_new_tokens=24)
    np.testing.assert_array_equal(found.tokens, plain.tokens)
    assert np.mean(found.accept_lengths) > 1.5


@pytest.mark.parametrize(("name", "reproducible"), [("gemma3", False), ("cohere2", True), ("exaone4", False)])
def test_drafts_in_a_tree_have_the_windows_of_their_paths(tmp_path, name, reproducible):
    """Trees that hold the true continuation in places, among wrong tokens, are accepted as far as it goes."""
    MODELS[name].write(tmp_path / "source")
    target = sm.load(convert(tmp_path / "source", tmp_path / "made"))
    config = sm.DecodeConfig(max_len=80, reproducible=reproducible)
    plain = sm.Decoder(target, sm.NoDrafter(), config).generate(PROMPT, max_new_tokens=24)
    drafter = OracleDrafter.random([*PROMPT, *plain.tokens], size=14, vocab=VOCAB, skill=0.9, seed=1)
    found = sm.Decoder(target, drafter, config).generate(PROMPT, max_new_tokens=24)
    np.testing.assert_array_equal(found.tokens, plain.tokens)
    assert np.mean(found.accept_lengths) > 2


@pytest.mark.parametrize(("name", "version"), [("qwen3", 2), ("cohere2", 3)])
def test_a_heads_drafts_change_no_token(tmp_path, name, version):
    MODELS[name].write(tmp_path / "source")
    target = sm.load(convert(tmp_path / "source", tmp_path / "made"))
    drafter = sm.EagleDrafter(random_head(target, version, 0), sm.TreeConfig(depth=2, top_k=3, size=8))
    plain, found = (sm.Decoder(target, each, sm.DecodeConfig(max_len=64)).generate(PROMPT, max_new_tokens=NEW)
                    for each in (sm.NoDrafter(), drafter))
    np.testing.assert_array_equal(found.tokens, plain.tokens)


def test_an_engine_gives_each_sequence_its_window(tmp_path):
    MODELS["gemma3"].write(tmp_path / "source")
    target = sm.load(convert(tmp_path / "source", tmp_path / "made"))
    prompts, config = [PROMPT[:5].tolist(), PROMPT.tolist(), PROMPT[3:15].tolist()], sm.DecodeConfig(max_len=64)
    with sm.Engine(target, sm.ChainDrafter(target.with_precision("w8a16"), length=2), config, slots=2) as engine:
        found = [generation.tokens.tolist() for generation in engine.generate(prompts, max_new_tokens=NEW)]
    alone = sm.Decoder(target, sm.NoDrafter(), config)
    assert found == [alone.generate(prompt, max_new_tokens=NEW).tokens.tolist() for prompt in prompts]


@pytest.mark.parametrize("name", [
    "qwen2", "gemma2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "glm4"))])
@pytest.mark.parametrize("precision", ["w4a16-g32", "w8a16", "w8a8"])
def test_weights_can_be_rounded(tmp_path, name, precision):
    """The layers' linear weights become the nearest codes, a group or a channel for itself, and all else stays."""
    model, weight_format = MODELS[name], formats.get(precision)
    tensors = model.write(tmp_path / "source")
    rounded = {}
    for key, values in tensors.items():
        is_linear = values.ndim == 2 and ".layers." in key
        rounded[key] = np.asarray(weight_format.unpack(weight_format.pack(values.T), values.T.shape)).T if is_linear else values
    found = np.asarray(sm.logits(sm.load(convert(tmp_path / "source", tmp_path / "made"), precision), PROMPT))
    expected = model.decoder.logits(rounded, PROMPT)
    if precision == "w8a8":  # its activations are rounded, too
        assert np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)
    else:
        np.testing.assert_allclose(found, expected, atol=1e-3)


def test_reproducible_decoding_of_a_window_is_plain_decoding(tmp_path):
    MODELS["cohere2"].write(tmp_path / "source")
    target = sm.load(convert(tmp_path / "source", tmp_path / "made"))
    tokens = [sm.Decoder(target, sm.NoDrafter(), sm.DecodeConfig(max_len=48, reproducible=flag)).generate(
        PROMPT, max_new_tokens=NEW).tokens for flag in (False, True)]
    np.testing.assert_array_equal(*tokens)


def test_longrope_takes_one_list_for_all_positions():
    rope = LlamaConfig.from_hf(MODELS["phi3-longrope"].config).rope
    plain = 10000.0 ** -(np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(rope.frequencies(8, 16)[0], plain / np.array(rope.short_factor), rtol=1e-6)
    np.testing.assert_allclose(rope.frequencies(8, 17)[0], plain / np.array(rope.long_factor), rtol=1e-6)


@pytest.mark.parametrize(("name", "changes", "part"), [
    ("llama", {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}, "'Qwen3MoeForCausalLM'"),
    ("llama", {"architectures": None, "model_type": "mamba2"}, "'mamba2'"),
    ("llama", {"sliding_window": 5}, "sliding_window"), ("qwen2", {"qk_layernorm": True}, "qk_layernorm"),
    ("qwen3", {"num_experts": 8}, "num_experts"), ("qwen3", {"hidden_act": "gelu"}, "hidden_act"),
    ("qwen2", {"layer_types": ["linear_attention"] * 3, "use_sliding_window": True}, "layer_types"),
    ("qwen2-window", {"layer_types": ["sliding_attention"]}, "layer_types"),
    ("qwen2-window", {"use_sliding_window": False}, "use_sliding_window"),
    ("qwen2-window", {"sliding_window": 0}, "sliding_window"), ("mistral", {"sliding_window": True}, "sliding_window"),
    ("mistral", {"attention_bias": True}, "attention_bias"), ("mistral", {"text_config": {}}, "text_config"),
    ("gemma2", {"sliding_window": None}, "sliding_window"), ("gemma2", {"use_bidirectional_attention": True}, "bidirectional"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("gemma3", {"hidden_activation": "silu"}, "hidden_activation"), ("olmo2", {"clip_qkv": 8.0}, "clip_qkv"),
    ("gemma3", {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}}, "rope_parameters"),
    ("olmo2", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters"),
    ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers"), ("glm4", {"kv_lora_rank": 512}, "kv_lora_rank"),
    ("phi3-longrope", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "factor"),
    ("phi3-longrope", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 4}}, "long_factor"),
    ("stablelm", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.4}}, "partial_rotary_factor"),
    ("exaone4", {"layer_types": None}, "layer_types"), ("granite", {"attention_multiplier": None}, "attention_multiplier"),
    ("starcoder2", {"hidden_act": "silu"}, "hidden_act"), ("cohere2", {"use_qk_norm": True}, "use_qk_norm"),
])
def test_what_a_family_does_not_have_is_refused_by_name(name, changes, part):
    with pytest.raises(sm.UserError) as caught:
        LlamaConfig.from_hf(MODELS[name].config | changes)
    assert part in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "tensor"), [("qwen2", "self_attn.o_proj.bias"), ("qwen3", "self_attn.q_norm.bias"),
                                              ("olmo2", "input_layernorm.weight"), ("glm4", "mlp.gate_proj.weight")])
def test_a_tensor_that_the_family_does_not_have_is_refused(tmp_path, name, tensor):
    extra = {f"model.layers.0.{tensor}": np.ones(32, np.float32)}
    MODELS[name].write(tmp_path / "source", tensors=MODELS[name].tensors() | extra)
    with pytest.raises(sm.UserError, match=rf"model.layers.0.{tensor}.* of type '?{MODELS[name].config['model_type']}"):
        convert(tmp_path / "source", tmp_path / "made")


@pytest.mark.parametrize(("fields", "part"), [
    ({"norm": "batch"}, "norm"), ({"block": "before"}, "block"), ({"mlp": "relu"}, "mlp"), ({"qk_norm": "some"}, "qk_norm"),
    ({"biases": ("q",)}, "biases"), ({"windows": (4,)}, "windows"), ({"ropes": (None,) * 3}, "ropes")])
def test_a_field_of_another_value_is_refused(fields, part):
    with pytest.raises(ValueError, match=part):
        dataclasses.replace(LlamaConfig.from_hf(PLAIN), **fields)


@pytest.mark.shared
@pytest.mark.parametrize("style", ["config.json", pytest.param("config_v4.json", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FILES)
def test_hugging_faces_logits_and_tokens(tmp_path, name, style):
    shutil.copytree(GOLDENS / name, tmp_path / "source")
    shutil.copyfile(GOLDENS / name / style, tmp_path / "source" / "config.json")
    model, expected = sm.load(convert(tmp_path / "source", tmp_path / "made")), np.load(GOLDENS / name / "expected.npz")
    np.testing.assert_allclose(sm.logits(model, expected["input_ids"]), expected["logits"],
                               atol=1e-3 if name == "qwen2-gptq" else 5e-4)
    decoder = sm.Decoder(model, sm.NoDrafter(), sm.DecodeConfig(max_len=128, prefill_chunks=(16,)))
    found = decoder.generate(expected["input_ids"], max_new_tokens=len(expected["greedy_tokens"]))
    np.testing.assert_array_equal(found.tokens, expected["greedy_tokens"])


@pytest.mark.shared
def test_a_short_sequence_of_longrope_has_the_short_list(tmp_path):
    source, expected = GOLDENS / "phi3-longrope", np.load(GOLDENS / "phi3-longrope" / "expected.npz")
    model = sm.load(convert(source, tmp_path / "made"))
    np.testing.assert_allclose(sm.logits(model, expected["short_input_ids"]), expected["short_logits"], atol=5e-4)
    limit = json.loads((source / "config.json").read_text())["original_max_position_embeddings"]
    decoder = sm.Decoder(model, sm.NoDrafter(), sm.DecodeConfig(max_len=limit))
    found = decoder.generate(expected["short_input_ids"], max_new_tokens=32)
    np.testing.assert_array_equal(found.tokens, expected["short_greedy_tokens"])
