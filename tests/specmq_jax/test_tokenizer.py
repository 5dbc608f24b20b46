"""Tokenizers: chat templates, stop tokens, text that comes piece by piece, broken files."""

import json
import shutil

import pytest
from fakes import DATA

from specmq_jax.errors import UserError
from specmq_jax.tokenizer import TextStream, decode, encode_chat, load_tokenizer, stop_tokens

SOURCE = DATA / "checkpoints" / "fp16"
GOLDEN = json.loads((DATA / "smollm2_135m_greedy.json").read_text())


@pytest.fixture
def directory(tmp_path):
    shutil.copytree(SOURCE, tmp_path / "model", copy_function=shutil.copyfile)
    return tmp_path / "model"


def test_without_a_template_a_conversation_is_plain_text(directory):
    tokenizer = load_tokenizer(directory)
    messages = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}]
    assert encode_chat(tokenizer, messages) == tokenizer.encode("one two\n\nthree")


def test_a_template_that_refuses_is_one_line(directory):
    tokenizer = load_tokenizer(directory)
    tokenizer.chat_template = "{{ raise_exception('system first') }}"
    with pytest.raises(UserError, match="the chat template refuses the conversation: system first"):
        encode_chat(tokenizer, [{"role": "user", "content": "x"}])


def test_stop_tokens_come_from_every_file(directory):
    tokenizer = load_tokenizer(directory)
    (directory / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert stop_tokens(tokenizer, directory) == (1, 7, 9)
    (directory / "generation_config.json").unlink()
    assert stop_tokens(tokenizer, directory) == (1,)


@pytest.mark.parametrize("text", ["plain words", "naïve café", "日本語 😀 done", "  spaces\n\nlines"])
def test_streamed_pieces_join_to_the_whole_text(directory, text):
    tokenizer = load_tokenizer(directory)
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer)
    pieces = [stream.add([token]) for token in ids]
    assert "".join(pieces) == decode(tokenizer, ids) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_special_tokens_are_not_text(directory):
    tokenizer = load_tokenizer(directory)
    ids = [*tokenizer.encode("words"), tokenizer.eos_token_id]
    assert decode(tokenizer, ids) == TextStream(tokenizer).add(ids) == "words"


def test_a_missing_and_a_broken_tokenizer(directory):
    (directory / "tokenizer.json").write_text('{"version"')
    with pytest.raises(UserError, match="can't be loaded") as caught:
        load_tokenizer(directory)
    assert "\n" not in str(caught.value)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        load_tokenizer(directory)


@pytest.mark.slow
@pytest.mark.parametrize("golden", GOLDEN, ids=lambda g: str(g["question_id"]))
def test_the_demo_models_tokenizer_gives_hugging_faces_ids(demo_directory, golden):
    tokenizer = load_tokenizer(demo_directory)
    assert tokenizer.encode(golden["prompt"]) == golden["input_ids"]
    assert decode(tokenizer, golden["greedy_ids"]) == golden["text"]
    question = golden["prompt"].split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
    assert encode_chat(tokenizer, [{"role": "user", "content": question}]) == golden["input_ids"]
    assert stop_tokens(tokenizer, demo_directory) == (2,)
