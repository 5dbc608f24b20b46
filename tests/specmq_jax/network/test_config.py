"""config.json: what the reference computes is computed, and what is senseless or not honoured is one line."""

import math

import numpy as np
import pytest
import transformers
from configs import PLAIN
from fuzzing import lengths, searching
from hypothesis import given
from hypothesis import strategies as st

import specmq_jax as sm
from specmq_jax.network.config import LlamaConfig, RopeConfig

MISTRAL = PLAIN | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
HUGE = 10**5000


def refusal(config) -> str:
    with pytest.raises(sm.UserError) as caught:
        LlamaConfig.from_hf(config)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 300
    return message


def rope(**entries) -> RopeConfig:
    plain = {key: value for key, value in PLAIN.items() if key != "rope_parameters"}
    return LlamaConfig.from_hf(plain | entries).rope


@pytest.mark.parametrize(("key", "values"), [
    ("vocab_size", [None, "97", 97.0, True, 0, -1, [97], {}, HUGE, 2**31]),
    ("hidden_size", ["64", 64.5, False, 0, HUGE]),
    ("intermediate_size", [None, "x", -96]),
    ("num_hidden_layers", ["2", 2.0, True, 0, 10**9, HUGE]),
    ("num_attention_heads", ["4", 4.0, 0, -4]),
    ("num_key_value_heads", ["2", 2.0, True, 0, -2, 3, 8, [2]]),
    ("head_dim", ["16", 16.0, True, 0, -16, 15, HUGE]),
    ("rms_norm_eps", ["x", "1e-5", None, True, 0, 0.0, -1, -1e-5, math.nan, math.inf, 1e-50, 1e300, HUGE, [1e-5]]),
    ("max_position_embeddings", [None, "256", 256.0, True, 0, -1, HUGE]),
    ("tie_word_embeddings", ["false", "true", None, 0, 1, [], {}]),
    ("attention_bias", [None, 1]), ("mlp_bias", ["false"]),
    ("hidden_act", [None, "gelu", "relu", 1, ["silu"]]),
    ("architectures", ["LlamaForCausalLM", {}, [1], [None], ["GPT2LMHeadModel"], 1, True]),
    ("model_type", ["qwen2", "mistral", 1, ["llama"], True]),
    ("eos_token_id", ["2", 2.0, [[1], 2], ["1"], True, {}, HUGE]),
    ("bos_token_id", ["1", [1], 1.5, True]),
    ("pad_token_id", ["0", [0], False]),
    ("rope_parameters", [[1], "linear", 1, True, [], ""]),
    ("rope_scaling", [[1], "linear", 1, False, [], 0]),
    ("rope_theta", [None, "10000", 0, -1.0, math.nan, math.inf, True, HUGE, [1]]),
])
def test_an_entry_of_another_kind_is_named(key, values):
    for value in values:
        without_theta = {"rope_parameters": {}} if key == "rope_theta" else {}
        found = refusal(PLAIN | without_theta | {key: value})
        assert key.removesuffix("s") in found


@pytest.mark.parametrize(("entries", "part"), [
    ({"rope_type": "linear", "factor": 0}, "'factor'"), ({"rope_type": "linear", "factor": -2.0}, "'factor'"),
    ({"rope_type": "linear"}, "'factor'"), ({"rope_type": "linear", "factor": "2"}, "'factor'"),
    ({"rope_type": "linear", "factor": True}, "'factor'"), ({"rope_type": "dynamic", "factor": math.inf}, "'factor'"),
    ({"rope_type": "linear", "factor": None}, "'factor'"), ({"rope_type": "yarn"}, "'factor'"),
    (LLAMA3 | {"low_freq_factor": 0}, "'low_freq_factor'"), (LLAMA3 | {"high_freq_factor": None}, "'high_freq_factor'"),
    (LLAMA3 | {"high_freq_factor": 1.0}, "'high_freq_factor' above"),
    (LLAMA3 | {"original_max_position_embeddings": "32"}, "original_max_position_embeddings"),
    (LLAMA3 | {"original_max_position_embeddings": 32.0}, "original_max_position_embeddings"),
    (YARN | {"original_max_position_embeddings": 0}, "original_max_position_embeddings"),
    (YARN | {"original_max_position_embeddings": None}, "original_max_position_embeddings"),
    (YARN | {"attention_factor": 0}, "'attention_factor'"), (YARN | {"attention_factor": "1"}, "'attention_factor'"),
    (YARN | {"beta_fast": -1}, "'beta_fast'"), (YARN | {"beta_slow": "1"}, "'beta_slow'"),
    (YARN | {"mscale": -1}, "'mscale'"), (YARN | {"mscale_all_dim": [1]}, "'mscale_all_dim'"),
    (YARN | {"truncate": "no"}, "'truncate'"), (YARN | {"truncate": None}, "'truncate'"),
    (YARN | {"rope_theta": 1.0}, "'rope_theta' above 1"), ({"rope_theta": None}, "'rope_theta'"),
    ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}, "'longrope'"),
    ({"rope_type": "proportional"}, "'proportional'"), ({"rope_type": None, "type": "linear", "factor": 2.0}, "type None"),
    ({"rope_type": ["linear"]}, "['linear']"), ({"rope_type": {}}, "rope"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"), ({"partial_rotary_factor": True}, "partial_rotary_factor"),
    ({"full_attention": {"rope_type": "linear", "factor": 2.0}}, "'full_attention'"),
    ({"llama_4_scaling_beta": 0.1}, "llama_4_scaling_beta"),
])
@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
def test_a_senseless_or_unknown_rope_is_refused_by_name(name, entries, part):
    found = refusal(PLAIN | {"rope_parameters": None} | {name: entries})
    assert name in found and part in found


def test_a_rope_of_two_dimensions_can_not_stretch():
    assert "head_dim" in refusal(PLAIN | {"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0}})


LENGTHS = st.sampled_from([1, 32, 256, 300])
NUMBERS = st.sampled_from([1.0, 2, 4.0, 0.5, 40.0])
ROPES = st.fixed_dictionaries({}, optional={
    "rope_type": st.sampled_from(["default", "linear", "dynamic", "llama3", "yarn"]),
    "type": st.sampled_from(["default", "linear", "dynamic", "llama3", "yarn"]), "rope_theta": NUMBERS, "factor": NUMBERS,
    "low_freq_factor": st.just(1.0), "high_freq_factor": st.just(4.0), "original_max_position_embeddings": LENGTHS,
    "attention_factor": NUMBERS, "beta_fast": NUMBERS, "beta_slow": NUMBERS, "mscale": NUMBERS, "mscale_all_dim": NUMBERS,
    "truncate": st.booleans(), "finetuned": st.booleans(), "partial_rotary_factor": st.just(1.0)})
ENTRIES = st.fixed_dictionaries({}, optional={
    "rope_parameters": st.none() | ROPES, "rope_scaling": st.none() | ROPES, "rope_theta": NUMBERS,
    "original_max_position_embeddings": LENGTHS, "max_position_embeddings": LENGTHS,
    "partial_rotary_factor": st.just(1.0)})
FIELDS = {"theta": "rope_theta", "original_max_position": "original_max_position_embeddings"}


def reference_rope(config: dict) -> dict | None:
    """transformers' own settled rope entries; None where it refuses them or can't compute with them."""
    try:
        made = transformers.LlamaConfig(**config)
        made.standardize_rope_params()
        made.validate_rope()
    except (KeyError, ValueError, ZeroDivisionError):
        return None
    return made.rope_parameters


@lengths
def test_the_rope_in_force_is_the_references(examples):
    @searching(examples)
    @given(ENTRIES)
    def search(found):
        config = {key: value for key, value in PLAIN.items() if key not in ENTRIES_TAKEN} | found
        expected = reference_rope({key: dict(value) if isinstance(value, dict) else value for key, value in config.items()})
        try:
            made = LlamaConfig.from_hf(config).rope
        except sm.UserError:
            assert expected is None or (expected["rope_type"] == "yarn" and expected["rope_theta"] <= 1)
            return
        assert expected is not None and made.type == expected["rope_type"] and made.theta == expected["rope_theta"]
        read = {"default": [], "linear": ["factor"], "dynamic": ["factor"],
                "llama3": ["factor", "low_freq_factor", "high_freq_factor", "original_max_position"],
                "yarn": ["factor", "original_max_position", "attention_factor", "beta_fast", "beta_slow", "mscale",
                         "mscale_all_dim", "truncate"]}
        for field in read[made.type]:
            default = RopeConfig.__dataclass_fields__[field].default
            assert getattr(made, field) == expected.get(FIELDS.get(field, field), default), field

    ENTRIES_TAKEN = {"rope_parameters", "max_position_embeddings"}
    search()


def test_a_scaling_replaces_the_parameters_and_their_base():
    parameters = {"rope_type": "default", "rope_theta": 5e5}
    assert rope(rope_parameters=parameters).theta == 5e5
    made = rope(rope_parameters=parameters, rope_scaling={"type": "linear", "factor": 4.0})
    assert (made.type, made.factor, made.theta) == ("linear", 4.0, 10000.0)
    made = rope(rope_parameters=parameters, rope_scaling={"type": "linear", "factor": 4.0}, rope_theta=7e4)
    assert (made.type, made.factor, made.theta) == ("linear", 4.0, 7e4)
    assert rope(rope_parameters=parameters, rope_scaling={}, rope_theta=7e4) == rope(rope_parameters=parameters)


def test_dynamic_scaling_begins_beyond_the_models_positions():
    dynamic = {"rope_type": "dynamic", "factor": 4.0}
    expected = rope(rope_parameters=dynamic).frequencies(16, 512)[0]
    for beside in ({}, {"original_max_position_embeddings": 8}):
        made = rope(rope_parameters=dynamic | {"original_max_position_embeddings": 8}, **beside)
        np.testing.assert_array_equal(made.frequencies(16, 512)[0], expected)
        np.testing.assert_array_equal(made.frequencies(16, 256)[0], rope(rope_theta=10000.0).frequencies(16, 256)[0])


def test_an_original_length_beside_the_parameters_overrides_theirs():
    inside = {"original_max_position_embeddings": 32}
    for kind in (LLAMA3, YARN):
        assert rope(rope_parameters=kind | inside).original_max_position == 32
        assert rope(rope_parameters=kind).original_max_position == 256
        assert rope(rope_parameters=kind | inside, original_max_position_embeddings=64).original_max_position == 64


def test_yarn_without_a_number_scales_by_the_ratio_of_lengths():
    made = rope(rope_parameters={"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32})
    assert made.factor == 8.0 and made.frequencies(16, 256)[1] == pytest.approx(0.1 * math.log(8) + 1)


def test_yarn_of_one_original_position_changes_no_frequency():
    made = rope(rope_parameters=YARN | {"original_max_position_embeddings": 1})
    low, high = made.interpolated(16)
    assert low == 0 and high == math.ceil(16 * math.log(1 / (2 * math.pi)) / (2 * math.log(10000))) < 0
    np.testing.assert_array_equal(made.frequencies(16, 256)[0], rope(rope_theta=10000.0).frequencies(16, 256)[0])


@pytest.mark.parametrize(("key", "values"), [
    ("sliding_window", [255, 0, False, "4096", 4096.0]),
    ("attention_multiplier", [0.0078125, 1.0]), ("embedding_multiplier", [12.0]), ("logits_scaling", [8.0]),
    ("residual_multiplier", [0.22]), ("final_logit_softcapping", [30.0]), ("attn_logit_softcapping", [50.0]),
    ("use_qk_norm", [True]), ("qk_layernorm", [True]), ("clip_qkv", [8.0]), ("logit_scale", [0.0625, True]),
    ("partial_rotary_factor", [0.5, "1"]), ("num_experts", [8]), ("num_local_experts", [8]), ("n_routed_experts", [64]),
    ("layer_types", [["full_attention", "sliding_attention"], ["chunked_attention"], "full_attention", 2]),
    ("no_rope_layers", [[1, 0], 4, [True, True]]), ("no_rope_layer_interval", [4]), ("query_pre_attn_scalar", [256]),
    ("rope_condense_ratio", [8]), ("position_embedding_type", ["alibi"]), ("alibi", [True]), ("scale_emb", [12]),
    ("scale_depth", [1.4]), ("rope_interleaved", [True]), ("parallel_residual", [True]), ("attention_chunk_size", [8192]),
    ("per_layer_config", [{"0": {"head_dim": 8}}]), ("use_bidirectional_attention", [True]), ("kv_lora_rank", [512]),
    ("attn_temperature_tuning", [True]), ("pruned_heads", [{"0": [1]}]), ("is_encoder_decoder", [True]),
])
def test_an_entry_that_would_change_the_function_is_refused_by_name(key, values):
    for value in values:
        assert f"config.json sets {key} = " in refusal(PLAIN | {key: value})


def test_entries_that_change_nothing_are_accepted():
    harmless = {"torch_dtype": "bfloat16", "dtype": "float16", "use_cache": True, "initializer_range": 0.02,
                "attention_dropout": 0.1, "bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": -1,
                "pretraining_tp": 2, "transformers_version": "5.24.0", "_name_or_path": "x", "hidden_act": "swish",
                "attention_bias": False, "mlp_bias": False, "sliding_window": None, "rope_scaling": None,
                "layer_types": ["full_attention", "full_attention"], "no_rope_layers": [1, 1], "logit_scale": 1.0,
                "embedding_multiplier": 1, "num_experts": 0, "use_qk_norm": False, "partial_rotary_factor": 1.0,
                "is_encoder_decoder": False, "pruned_heads": {}, "chunk_size_feed_forward": 16, "num_labels": HUGE}
    assert LlamaConfig.from_hf(PLAIN | harmless) == LlamaConfig.from_hf(PLAIN)


def test_absent_entries_have_the_references_defaults():
    lacking = {key: value for key, value in PLAIN.items() if key not in (
        "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "head_dim", "model_type")}
    made = LlamaConfig.from_hf(lacking)
    expected = transformers.LlamaConfig(**{key: value for key, value in lacking.items() if key != "architectures"})
    assert (made.num_kv_heads, made.max_position, made.rms_norm_eps, made.tie_embeddings, made.head_dim) == (
        expected.num_key_value_heads, expected.max_position_embeddings, expected.rms_norm_eps,
        expected.tie_word_embeddings, expected.head_dim)
    lacking = {key: value for key, value in MISTRAL.items() if key not in ("num_key_value_heads", "max_position_embeddings")}
    lacking |= {"num_attention_heads": 16}
    made = LlamaConfig.from_hf(lacking)
    expected = transformers.MistralConfig(**{key: value for key, value in lacking.items() if key != "architectures"})
    assert (made.num_kv_heads, made.max_position) == (expected.num_key_value_heads, expected.max_position_embeddings)
    assert LlamaConfig.from_hf(lacking | {"num_key_value_heads": None}).num_kv_heads == 16


def test_a_mistral_that_says_nothing_of_its_window_has_one():
    lacking = {key: value for key, value in MISTRAL.items() if key != "sliding_window"}
    window = transformers.MistralConfig().sliding_window
    assert LlamaConfig.from_hf(lacking | {"max_position_embeddings": window + 1}).windows == (window, window)
    assert LlamaConfig.from_hf(lacking | {"max_position_embeddings": window}).windows == ()


def test_a_window_over_all_positions_hides_none():
    for window in (256, 4096):
        assert LlamaConfig.from_hf(MISTRAL | {"sliding_window": window}) == LlamaConfig.from_hf(MISTRAL)


def test_a_hidden_size_that_heads_do_not_divide_needs_a_head_dim():
    assert "hidden_size 66 is not a multiple of 4" in refusal(PLAIN | {"hidden_size": 66, "head_dim": None})
    assert LlamaConfig.from_hf(PLAIN | {"hidden_size": 66}).head_dim == 16


ODD = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just(HUGE), st.just(-1),
                st.just(2**31), st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=5), st.integers()))
DANGEROUS = ["rope_scaling", "rope_theta", "sliding_window", "layer_types", "no_rope_layers", "num_experts", "clip_qkv",
             "eos_token_id", "bos_token_id", "partial_rotary_factor", "original_max_position_embeddings", "attention_bias",
             "per_layer_config", "logit_scale", "pruned_heads"]
ROPE_KEYS = ["rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "attention_factor",
             "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"]
ROPE_ODD = st.dictionaries(st.sampled_from(ROPE_KEYS), ODD | st.sampled_from(["linear", "dynamic", "llama3", "yarn", 4.0]))


@lengths
def test_any_configuration_is_read_or_refused_in_one_line(examples):
    @searching(examples)
    @given(st.dictionaries(st.sampled_from([*PLAIN, *DANGEROUS]), ODD, max_size=3), st.none() | ROPE_ODD,
           st.sampled_from(["rope_parameters", "rope_scaling"]))
    def search(changes, scaling, name):
        config = PLAIN | changes | ({} if scaling is None else {name: scaling})
        try:
            made = LlamaConfig.from_hf(config)
        except sm.UserError as error:
            assert "\n" not in str(error)
            return
        frequencies, scale = made.rope.frequencies(min(made.head_dim, 256), 4096)
        assert not np.isnan(frequencies).any() and scale > 0

    search()
