"""GGUF: every supported type, llama.cpp's row order undone, configuration and tokenizer rebuilt from metadata."""

import json

import gguf
import numpy as np
import pytest
from sources import TINY, logical, random_tensors, write_gguf
from tokenizers import Tokenizer, pre_tokenizers

from checkpoints_tools.conversion import convert
from checkpoints_tools.readers import open_source
from checkpoints_tools.readers.gguf import gguf_tokenizer
from specmq_jax.errors import UserError
from specmq_jax.loading import checkpoint
from specmq_jax.network.config import LlamaConfig
from specmq_jax.tokenizer import decode, encode_chat, load_tokenizer, stop_tokens

TIED = TINY | {"tie_word_embeddings": True}


@pytest.mark.parametrize(("kind", "precision"), [("F32", "fp32"), ("F16", "fp16"), ("BF16", "bf16"), ("Q8_0", "fp16"),
                                                 ("Q4_0", "fp16"), ("Q4_1", "fp16")])
def test_values_of_every_type(tmp_path, kind, precision):
    meant = write_gguf(tmp_path / "model.gguf", TINY, random_tensors(TINY), kind)
    reader = open_source(tmp_path / "model.gguf")
    for path, expected in logical(meant, TINY).items():
        np.testing.assert_array_equal(reader.read(path), expected, err_msg=path)
    assert reader.formats.names == {"linear": precision, "head": precision, "embed": precision}
    made = checkpoint.CheckpointReader(convert(tmp_path / "model.gguf", tmp_path / "made"))
    stored = made.read("layers_1/attention/qkv/w").values
    np.testing.assert_array_equal(stored, logical(meant, TINY)["layers_1/attention/qkv/w"].astype(stored.dtype))


def test_values_are_close_to_what_was_quantised(tmp_path):
    tensors = random_tensors(TIED)
    write_gguf(tmp_path / "model.gguf", TIED, tensors, "Q8_0")
    reader = open_source(tmp_path)
    for path, expected in logical(tensors, TIED).items():
        found = reader.read(path)
        assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected), path


@pytest.mark.parametrize("config", [TINY, TIED, TINY | {"num_key_value_heads": 4},
                                    TINY | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}])
def test_the_configuration_is_rebuilt(tmp_path, config):
    write_gguf(tmp_path / "model.gguf", config, random_tensors(config))
    assert open_source(tmp_path / "model.gguf").llama == LlamaConfig.from_hf(config)


def test_llama3_scaling_is_recognised_by_its_factors(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = TINY | {"rope_parameters": rope}
    frequencies = 500000.0 ** -(np.arange(0, 16, 2) / 16)
    factors = []
    for frequency in frequencies:  # as convert_hf_to_gguf.py's LlamaModel.generate_extra_tensors
        wavelength = 2 * np.pi / frequency
        smooth = (8192 / wavelength - 1) / (4 - 1)
        factors.append(1 if wavelength < 8192 / 4 else 32 if wavelength > 8192 else 1 / ((1 - smooth) / 32 + smooth))
    write_gguf(tmp_path / "model.gguf", config, random_tensors(config),
               extra={"rope_freqs.weight": np.array(factors, np.float32)})
    assert open_source(tmp_path / "model.gguf").llama == LlamaConfig.from_hf(config)


def test_linear_and_yarn_scaling(tmp_path):
    def linear(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    def yarn(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(64)

    for name, metadata, rope in (("linear", linear, {"factor": 4.0}),
                                 ("yarn", yarn, {"factor": 4.0, "original_max_position_embeddings": 64})):
        config = TINY | {"rope_parameters": {"rope_type": name, "rope_theta": 10000.0} | rope}
        write_gguf(tmp_path / f"{name}.gguf", config, random_tensors(config), metadata=metadata)
        assert open_source(tmp_path / f"{name}.gguf").llama == LlamaConfig.from_hf(config)


BYTES = [f"<0x{i:02X}>" for i in range(256)]


def byte_level_metadata(writer):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "12 3"]
    tokens = ["<s>", "</s>", *alphabet, *(merge.replace(" ", "") for merge in merges), "<tool>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (len(tokens) - 3), 4])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_eot_token_id(1)
    writer.add_chat_template("{% for m in messages %}<s>{{ m.content }}{% endfor %}"
                             "{% if add_generation_prompt %}</s>{% endif %}")


def sentence_piece_metadata(writer):
    pieces = {"▁": -5.0, "h": -6.0, "e": -7.0, "l": -8.0, "o": -9.0, "he": -1.0, "ll": -2.0, "hell": -3.0,
              "▁hello": -0.5, "hello": -2.5, "▁h": -4.0}
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *BYTES, *pieces])
    writer.add_token_scores([0.0, 0.0, 0.0, *[0.0] * 256, *pieces.values()])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * len(pieces)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def converted(tmp_path, metadata):
    config = TINY | {"vocab_size": 280}
    write_gguf(tmp_path / "model.gguf", config, random_tensors(config), metadata=metadata)
    return convert(tmp_path / "model.gguf", tmp_path / "made")


def test_a_byte_level_tokenizer(tmp_path):
    made = converted(tmp_path, byte_level_metadata)
    tokenizer = load_tokenizer(made)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("hello world 123<tool></s>")) == [
        "hello", "Ġw", "o", "r", "l", "d", "Ġ", "1", "2", "3", "<tool>", "</s>"]
    for text in ("hello  world\n", "naïve 日本 😀", "<tool> x"):
        assert decode(tokenizer, tokenizer.encode(text)) == text
    assert encode_chat(tokenizer, [{"role": "user", "content": "hello"}]) == tokenizer.encode("<s>hello</s>")
    assert stop_tokens(tokenizer, made) == (1,)


def test_a_sentence_piece_tokenizer(tmp_path):
    made = converted(tmp_path, sentence_piece_metadata)
    tokenizer = load_tokenizer(made)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("hello hell")) == ["<s>", "▁hello", "▁", "hell"]
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("é", add_special_tokens=False)) == ["▁", "<0xC3>", "<0xA9>"]
    for text in ("hello", "héllo  hello", "日本"):
        assert decode(tokenizer, tokenizer.encode(text)) == text
    assert stop_tokens(tokenizer, made) == (2,)


def test_a_llama3_tokenizer_splits_and_begins_as_the_original(tmp_path):
    values = {}

    class Recorder:
        def __getattr__(self, name):
            return lambda value: values.__setitem__(name.removeprefix("add_"), value)

    byte_level_metadata(Recorder())
    renamed = {"token_list": "tokens", "token_types": "token_type", "token_merges": "merges", "tokenizer_model": "model"}
    fields = {f"tokenizer.ggml.{renamed.get(name, name)}": value for name, value in values.items()}
    fields["tokenizer.ggml.pre"] = "llama-bpe"
    gguf_tokenizer.save(lambda key, default=None: fields.get(key, default), tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("hello 1234 w").tokens == ["<s>", "hello", "Ġ", "123", "4", "Ġw"]
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": [1]}


@pytest.mark.parametrize(("change", "message"), [
    (lambda w: w.add_tokenizer_model("bert"), "tokenizer model 'bert' is not supported"),
    (lambda w: (w.add_tokenizer_model("gpt2"), w.add_tokenizer_pre("mystery")), "pre-tokenizer 'mystery' is not supported"),
])
def test_an_unknown_tokenizer_is_refused_before_any_weight_is_read(tmp_path, change, message):
    def metadata(writer):
        change(writer)
        writer.add_token_list(["a", "b"])

    with pytest.raises(UserError, match=message):
        converted(tmp_path, metadata)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
