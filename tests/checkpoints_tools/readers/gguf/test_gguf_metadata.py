"""GGUF metadata: the rotation is llama.cpp's, and what is damaged, senseless or not honoured is one line."""

import math

import gguf
import numpy as np
import pytest
from fuzzing import lengths, searching
from gguf.gguf_writer import GGUFValue
from hypothesis import given
from hypothesis import strategies as st
from sources import TINY, random_tensors, write_gguf
from test_gguf import byte_level_metadata, sentence_piece_metadata

from checkpoints_tools.readers import open_source
from checkpoints_tools.readers.gguf import gguf_rope
from checkpoints_tools.readers.gguf.gguf_file import Metadata, open_file
from specmq_jax.errors import UserError
from specmq_jax.network.config import RopeConfig

CONFIG = TINY | {"vocab_size": 280, "num_hidden_layers": 1}
KINDS = gguf.GGUFValueType
SCALING = "llama.rope.scaling."


def write(path, changes=None, tokenizer=byte_level_metadata, extra=None, tensors=None):
    """A GGUF whose metadata is changed: {key: (value, type)}, or {key: None} to leave one out."""
    def metadata(writer):
        if tokenizer is not None:
            tokenizer(writer)
        for key, value in (changes or {}).items():
            if value is None:
                writer.kv_data[0].pop(key)
            else:
                value, kind, *inner = value
                writer.kv_data[0][key] = GGUFValue(value, kind, *inner)

    write_gguf(path, CONFIG, random_tensors(CONFIG) if tensors is None else tensors, metadata=metadata, extra=extra)
    return path


def refusal(path) -> str:
    with pytest.raises(UserError) as caught:
        reader = open_source(path)
        reader.save_tokenizer(path.parent)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and len(message) < 300 + len(str(path))
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    return message


def test_what_is_changed_below_is_read_unchanged(tmp_path):
    for tokenizer in (byte_level_metadata, sentence_piece_metadata, None):
        assert open_source(write(tmp_path / "x.gguf", tokenizer=tokenizer)).llama.num_layers == 1


SIZES = ["llama.block_count", "llama.context_length", "llama.embedding_length", "llama.feed_forward_length",
         "llama.attention.head_count", "llama.attention.head_count_kv", "llama.vocab_size"]


@pytest.mark.parametrize("key", SIZES)
def test_a_size_that_is_none(tmp_path, key):
    for value in (("2", KINDS.STRING), (2.0, KINDS.FLOAT32), (True, KINDS.BOOL), ([2, 2], KINDS.ARRAY, KINDS.INT32),
                  (-1, KINDS.INT32), (0, KINDS.UINT32), (2**63, KINDS.UINT64)):
        assert f"needs a positive integer '{key}'" in refusal(write(tmp_path / "x.gguf", {key: value}))


def test_a_size_that_is_missing_or_contradicts_the_tensors(tmp_path):
    for key in SIZES[:5]:
        assert f"'{key}'; found None" in refusal(write(tmp_path / "x.gguf", {key: None}))
    assert "num_hidden_layers" in refusal(write(tmp_path / "x.gguf", {"llama.block_count": (2**31 - 1, KINDS.UINT32)}))
    for size in (279, 281):
        assert "token_embd.weight has shape [280, 64]" in refusal(
            write(tmp_path / "x.gguf", {"llama.vocab_size": (size, KINDS.UINT32)}))
    assert "lacks both llama.vocab_size" in refusal(write(tmp_path / "x.gguf", {"llama.vocab_size": None}, tokenizer=None))


@pytest.mark.parametrize(("key", "values"), [
    ("llama.attention.layer_norm_rms_epsilon", [("x", KINDS.STRING), (0.0, KINDS.FLOAT32), (-1.0, KINDS.FLOAT32),
                                                (math.nan, KINDS.FLOAT32), (math.inf, KINDS.FLOAT32), None]),
    ("llama.rope.freq_base", [("x", KINDS.STRING), (0.0, KINDS.FLOAT32), (-1.0, KINDS.FLOAT32), (math.nan, KINDS.FLOAT32)]),
    (f"{SCALING}factor", [("4", KINDS.STRING), (-4.0, KINDS.FLOAT32), (math.inf, KINDS.FLOAT32), (True, KINDS.BOOL)]),
    ("llama.rope.scale_linear", [("4", KINDS.STRING), (-4.0, KINDS.FLOAT32)]),
    (f"{SCALING}type", [(1, KINDS.UINT32), ("longrope", KINDS.STRING), ("x", KINDS.STRING)]),
    (f"{SCALING}attn_factor", [("1", KINDS.STRING), (0.0, KINDS.FLOAT32), (1.5, KINDS.FLOAT32)]),
    ("general.architecture", [(1, KINDS.UINT32), ("qwen2", KINDS.STRING), (["llama"], KINDS.ARRAY, KINDS.STRING)]),
    ("llama.expert_count", [(8, KINDS.UINT32), ("0", KINDS.STRING), (False, KINDS.BOOL)]),
    ("split.count", [(3, KINDS.UINT16), ("3", KINDS.STRING)]),
    ("llama.rope.dimension_count", [(8, KINDS.UINT32), ("16", KINDS.STRING)]),
    ("llama.attention.key_length", [("16", KINDS.STRING), (0, KINDS.UINT32)]),
    ("llama.attention.value_length", [(8, KINDS.UINT32)]),
    ("llama.attention.sliding_window", [(255, KINDS.UINT32), ("256", KINDS.STRING)]),
    ("llama.attention.causal", [(False, KINDS.BOOL)]),
    ("llama.attention.scale", [(0.5, KINDS.FLOAT32)]), ("llama.logit_scale", [(0.5, KINDS.FLOAT32)]),
    ("llama.residual_scale", [(0.5, KINDS.FLOAT32)]), ("llama.embedding_scale", [(12.0, KINDS.FLOAT32)]),
    ("llama.attention.clamp_kqv", [(8.0, KINDS.FLOAT32)]), ("llama.attention.max_alibi_bias", [(8.0, KINDS.FLOAT32)]),
    ("llama.final_logit_softcapping", [(30.0, KINDS.FLOAT32)]),
    ("tokenizer.ggml.bos_token_id", [("1", KINDS.STRING), (-1, KINDS.INT32), (280, KINDS.UINT32)]),
    ("tokenizer.ggml.eos_token_id", [(1.0, KINDS.FLOAT32), (2**40, KINDS.UINT64)]),
    ("tokenizer.ggml.eot_token_id", [(10**6, KINDS.UINT32)]), ("tokenizer.ggml.unknown_token_id", [(280, KINDS.UINT32)]),
    ("tokenizer.ggml.tokens", [("ab", KINDS.STRING), ([1, 2], KINDS.ARRAY, KINDS.INT32), None,
                               (["a", "a"], KINDS.ARRAY, KINDS.STRING),
                               ([str(i) for i in range(300)], KINDS.ARRAY, KINDS.STRING)]),
    ("tokenizer.ggml.token_type", [([1], KINDS.ARRAY, KINDS.INT32), (["1"] * 265, KINDS.ARRAY, KINDS.STRING),
                                   (1, KINDS.UINT32)]),
    ("tokenizer.ggml.merges", [([1], KINDS.ARRAY, KINDS.INT32), (["h"], KINDS.ARRAY, KINDS.STRING),
                               (["h zz"], KINDS.ARRAY, KINDS.STRING), ("h e", KINDS.STRING)]),
    ("tokenizer.ggml.model", [(1, KINDS.UINT32), ("bert", KINDS.STRING), None]),
    ("tokenizer.ggml.pre", [(1, KINDS.UINT32), ("mystery", KINDS.STRING)]),
    ("tokenizer.ggml.add_bos_token", [(1, KINDS.UINT32), ("true", KINDS.STRING)]),
    ("tokenizer.chat_template", [(1, KINDS.UINT32), (["x"], KINDS.ARRAY, KINDS.STRING)]),
])
def test_an_entry_of_another_kind_or_beyond_what_is_honoured(tmp_path, key, values):
    for value in values:
        assert key.split(".")[-1].removesuffix("s").split("_")[0] in refusal(write(tmp_path / "x.gguf", {key: value})), value


@pytest.mark.parametrize(("changes", "part"), [
    ({"tokenizer.ggml.scores": None}, "no scores"),
    ({"tokenizer.ggml.scores": ([0.0, 1.0], KINDS.ARRAY, KINDS.FLOAT32)}, "has 2 numbers in tokenizer.ggml.scores"),
    ({"tokenizer.ggml.scores": (["x"] * 270, KINDS.ARRAY, KINDS.STRING)}, "a list of numbers 'tokenizer.ggml.scores'"),
    ({"tokenizer.ggml.scores": ([math.nan] * 270, KINDS.ARRAY, KINDS.FLOAT32)}, "not finite"),
    ({"tokenizer.ggml.add_space_prefix": (1, KINDS.UINT32)}, "true or false"),
    ({"tokenizer.ggml.tokens": ([f"{i}" + "x" * (5000 if i == 9 else 0) for i in range(270)], KINDS.ARRAY, KINDS.STRING)},
     "a token of 5001 characters"),
])
def test_a_damaged_sentence_piece_model(tmp_path, changes, part):
    assert part in refusal(write(tmp_path / "x.gguf", changes, sentence_piece_metadata))


def test_a_beginning_of_any_characters_is_put_before_a_text(tmp_path):
    from tokenizers import Tokenizer

    for odd in ("a b:0 $A", "$A", "::", "x:9"):
        def tokenizer(writer, odd=odd):
            byte_level_metadata(writer)
            writer.kv_data[0]["tokenizer.ggml.tokens"].value[0] = odd
            writer.add_add_bos_token(True)

        reader = open_source(write(tmp_path / "x.gguf", tokenizer=tokenizer))
        (tmp_path / "made").mkdir(exist_ok=True)
        reader.save_tokenizer(tmp_path / "made")
        assert Tokenizer.from_file(str(tmp_path / "made" / "tokenizer.json")).encode("h").tokens == [odd, "h"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_a_value_that_is_not_finite(tmp_path, name, value):
    tensors = random_tensors(CONFIG)
    tensors[name].flat[7] = value
    reader = open_source(write(tmp_path / "x.gguf", tensors=tensors))
    with pytest.raises(UserError, match=r"tensor (blk.0.ffn_up|output_norm).weight holds a value that is not finite"):
        for path in ("layers_0/mlp/gate_up/w", "norm/scale"):
            reader.read(path)


def test_a_quantised_block_whose_scale_is_not_finite(tmp_path, recwarn):
    tensors = random_tensors(CONFIG)
    write_gguf(tmp_path / "x.gguf", CONFIG, tensors, "Q8_0")
    part = next(part for part in open_file(tmp_path / "x.gguf").tensors if part.name == "blk.0.ffn_down.weight")
    with (tmp_path / "x.gguf").open("r+b") as file:
        file.seek(part.data_offset)
        file.write(np.array(np.inf, np.float16).tobytes())
    with pytest.raises(UserError, match=r"tensor blk.0.ffn_down.weight holds a value that is not finite"):
        open_source(tmp_path / "x.gguf").read("layers_0/mlp/down/w")
    assert not recwarn.list


def llama_cpp_rotation(keys: dict, head_dim: int, context: int, divisors: np.ndarray) -> tuple[np.ndarray, float]:
    """Angles a position, f64[head_dim // 2], and what multiplies cos and sin, as llama.cpp computes them.

    llama-model.cpp (load_hparams), llama-context.cpp (yarn_attn_factor) and ggml-cpu's rope_yarn.
    """
    base, kind = keys.get("llama.rope.freq_base", 10000.0), keys.get(f"{SCALING}type", "linear")
    factor = keys.get(f"{SCALING}factor", keys.get("llama.rope.scale_linear", 0.0)) or 1.0
    scale = 1.0 if kind == "none" else 1 / factor
    original = keys.get(f"{SCALING}original_context_length", context) or context
    pairs = np.arange(head_dim // 2)
    outside = base ** (-2 * pairs / head_dim) / divisors
    magnitude, mix = keys.get(f"{SCALING}attn_factor", 1.0), 0.0
    if kind == "yarn":
        low, high = (head_dim * math.log(original / (beta * 2 * math.pi)) / (2 * math.log(base)) for beta in (32, 1))
        low, high = max(0, math.floor(low)), min(head_dim - 1, math.ceil(high))
        mix = 1 - np.clip((pairs - low) / max(0.001, high - low), 0, 1)
        magnitude *= (1.0 if factor <= 1 else 0.1 * math.log(factor) + 1) / (1 + 0.1 * math.log(factor))
        magnitude *= 1 + 0.1 * math.log(1 / scale)
    return outside * scale * (1 - mix) + outside * mix, magnitude


def llama3_divisors(head_dim: int, base: float) -> np.ndarray:
    """What llama.cpp's convert_hf_to_gguf.py writes for Llama 3.1."""
    lengths = 2 * np.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (8192 / lengths - 1) / 3
    return np.where(lengths < 2048, 1, np.where(lengths > 8192, 8, 1 / ((1 - smooth) / 8 + smooth))).astype(np.float32)


KEYS = st.fixed_dictionaries({}, optional={
    "llama.rope.freq_base": st.sampled_from([10000.0, 500000.0]), "llama.rope.scale_linear": st.sampled_from([1.0, 2.0, 0.0]),
    f"{SCALING}type": st.sampled_from(["none", "linear", "yarn"]), f"{SCALING}factor": st.sampled_from([0.0, 0.5, 1.0, 4.0]),
    f"{SCALING}original_context_length": st.sampled_from([0, 1, 64, 4096]),
    f"{SCALING}attn_factor": st.sampled_from([1.0, 1.25]), f"{SCALING}finetuned": st.booleans()})


@lengths
def test_the_rotation_is_llama_cpps(examples):
    @searching(examples)
    @given(KEYS, st.sampled_from([None, "ones", "llama3", "others"]), st.sampled_from([16, 64]))
    def search(keys, factors, head_dim):
        base = keys.get("llama.rope.freq_base", 10000.0)
        divisors = {None: None, "ones": np.ones(head_dim // 2, np.float32), "llama3": llama3_divisors(head_dim, base),
                    "others": np.linspace(1, 3, head_dim // 2, dtype=np.float32)}[factors]
        expected, magnitude = llama_cpp_rotation(keys, head_dim, 2048, 1.0 if divisors is None else divisors)
        scaled = keys.get(f"{SCALING}type") != "none" and (
            keys.get(f"{SCALING}factor", keys.get("llama.rope.scale_linear", 1.0)) not in (0.0, 1.0))
        metadata = Metadata(lambda key, default=None: keys.get(key, default), "x")
        try:
            found = gguf_rope.find_rope(metadata, head_dim, 2048, divisors)
        except UserError:
            turned = factors in ("llama3", "others")
            assert factors == "others" or (turned and (scaled or keys.get(f"{SCALING}type") == "yarn")) or (
                keys.get(f"{SCALING}attn_factor") == 1.25 and keys.get(f"{SCALING}type") != "yarn")
            return
        rope = RopeConfig.from_hf({"rope_parameters": found, "max_position_embeddings": 2048})
        if rope.type == "yarn" and rope.interpolated(head_dim)[0] > rope.interpolated(head_dim)[1]:
            return  # refused by refuse_short_yarn
        frequencies, scale = rope.frequencies(head_dim, 2048)
        np.testing.assert_allclose(frequencies, expected, rtol=1e-4)
        assert scale == pytest.approx(magnitude, rel=1e-6)

    search()


def test_linear_scaling_needs_no_type_and_has_an_old_name(tmp_path):
    for key in (f"{SCALING}factor", "llama.rope.scale_linear"):
        rope = open_source(write(tmp_path / "x.gguf", {key: (4.0, KINDS.FLOAT32)})).llama.rope
        assert (rope.type, rope.factor) == ("linear", 4.0)
    rope = open_source(write(tmp_path / "x.gguf", {key: (4.0, KINDS.FLOAT32), f"{SCALING}type": ("none", KINDS.STRING)}))
    assert rope.llama.rope.type == "default"


def test_an_id_beyond_the_vocabulary_of_a_file_without_a_tokenizer(tmp_path):
    changes = {"tokenizer.ggml.eos_token_id": (280, KINDS.UINT32)}
    assert "eos_token_id 280 and a vocabulary of 280" in refusal(write(tmp_path / "x.gguf", changes, tokenizer=None))


def test_rotary_factors_beside_a_scaling(tmp_path):
    extra = {"rope_freqs.weight": llama3_divisors(16, 10000.0)}
    linear = {f"{SCALING}factor": (4.0, KINDS.FLOAT32)}
    assert "'linear' beside rotary factors" in refusal(write(tmp_path / "x.gguf", linear, extra=extra))
    assert open_source(write(tmp_path / "x.gguf", extra=extra)).llama.rope.type == "llama3"
    extra = {"rope_freqs.weight": np.ones(8, np.float32)}
    assert open_source(write(tmp_path / "x.gguf", linear, extra=extra)).llama.rope.type == "linear"
    for odd in (np.ones(7, np.float32), np.full(8, np.nan, np.float32), np.full(8, -1, np.float32)):
        assert "rope_freqs.weight" in refusal(write(tmp_path / "x.gguf", extra={"rope_freqs.weight": odd}))


@pytest.mark.parametrize(("name", "value"), [("yarn_beta_fast", 16.0), ("yarn_beta_slow", 2.0), ("yarn_ext_factor", 0.5),
                                             ("yarn_attn_factor", 1.0), ("yarn_log_multiplier", 0.1), ("yarn_beta_fast", "32")])
def test_yarn_on_which_the_references_differ(tmp_path, name, value):
    kind = KINDS.STRING if isinstance(value, str) else KINDS.FLOAT32
    yarn = {f"{SCALING}type": ("yarn", KINDS.STRING), f"{SCALING}factor": (4.0, KINDS.FLOAT32)}
    assert f"{SCALING}{name}" in refusal(write(tmp_path / "x.gguf", yarn | {f"{SCALING}{name}": (value, kind)}))
    agreed = {"yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0, "yarn_attn_factor": 0.1 * math.log(4) + 1}
    rope = open_source(write(tmp_path / "x.gguf", yarn | {f"{SCALING}{key}": (value, KINDS.FLOAT32)
                                                          for key, value in agreed.items()})).llama.rope
    assert (rope.type, rope.factor, rope.original_max_position) == ("yarn", 4.0, 256)


def test_yarn_too_short_for_its_ramp(tmp_path):
    yarn = {f"{SCALING}type": ("yarn", KINDS.STRING), f"{SCALING}factor": (4.0, KINDS.FLOAT32),
            f"{SCALING}original_context_length": (1, KINDS.UINT32)}
    assert "too short" in refusal(write(tmp_path / "x.gguf", yarn))


INNER = st.sampled_from([([1, 2], KINDS.INT32), ([1.5, 2.0], KINDS.FLOAT32), (["a", "b"], KINDS.STRING), ([True], KINDS.BOOL)])
ANY = st.one_of(
    st.tuples(st.integers(0, 2**32 - 1) | st.integers(0, 4), st.just(KINDS.UINT32)),
    st.tuples(st.integers(-2**63, 2**63 - 1), st.just(KINDS.INT64)), st.tuples(st.floats(width=32), st.just(KINDS.FLOAT32)),
    st.tuples(st.floats(), st.just(KINDS.FLOAT64)), st.tuples(st.booleans(), st.just(KINDS.BOOL)),
    st.tuples(st.text(max_size=4), st.just(KINDS.STRING)),
    INNER.map(lambda inner: (inner[0], KINDS.ARRAY, inner[1])))
KEYS_THERE = [*SIZES, "general.architecture", "llama.attention.layer_norm_rms_epsilon", "llama.rope.freq_base",
              *(f"tokenizer.ggml.{name}" for name in ("model", "pre", "tokens", "token_type", "merges", "scores",
                                                      "bos_token_id", "eos_token_id", "eot_token_id", "unknown_token_id")),
              "tokenizer.chat_template"]
KEYS_MORE = ["tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix", "llama.expert_count", "split.count",
             "llama.rope.dimension_count", "llama.attention.key_length", "llama.attention.sliding_window",
             "llama.rope.scale_linear", *(f"{SCALING}{name}" for name in (
                 "type", "factor", "attn_factor", "original_context_length", "yarn_beta_fast", "yarn_log_multiplier"))]


@lengths
def test_metadata_at_random_is_read_or_refused_in_one_line(tmp_path, examples):
    @searching(examples)
    @given(st.dictionaries(st.sampled_from([*KEYS_THERE, *KEYS_MORE]), ANY, min_size=1, max_size=3),
           st.sampled_from([byte_level_metadata, sentence_piece_metadata]))
    def search(changes, tokenizer):
        path = write(tmp_path / "x.gguf", changes, tokenizer)
        try:
            reader = open_source(path)
            reader.save_tokenizer(tmp_path)
        except UserError as error:
            assert "\n" not in str(error)
            return
        frequencies, scale = reader.llama.rope.frequencies(16, 4096)
        assert not np.isnan(frequencies).any() and scale > 0

    search()
