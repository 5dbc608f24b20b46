"""Text that comes token by token is the text of all tokens, whatever they are."""

import time
import types

import pytest
from fakes import DATA
from fuzzing import lengths, searching
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from specmq_jax.tokenizer import TextStream, decode

LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
BYTE_FALLBACK = {
    "with a prefix space": decoders.Sequence([*LLAMA, decoders.Strip(" ", 1, 0)]),
    "without one": decoders.Sequence(LLAMA),
    "changed once fused": decoders.Sequence([*LLAMA, decoders.Replace("ab", "c")]),
    "bytes alone": decoders.ByteFallback(),
    "metaspace": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
    "no decoder": None,
    "word pieces": decoders.WordPiece(),
    "suffixes": decoders.BPEDecoder(suffix="▁"),
}
PIECES = ["▁", "▁a", "a", "b", "▁▁", "\ufffd", "é", "日", "<0x1>", "<0xZZ>", "x", "<|tool|>", "<s>", "</s>", "##b"]


def wrapped(backend):
    return types.SimpleNamespace(backend_tokenizer=backend)


def byte_fallback(decoder):
    """A byte for each id from 0, then pieces, and special tokens between them."""
    spelled = [f"<0x{byte:02X}>" for byte in range(256)] + PIECES
    backend = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(spelled)}, merges=[], byte_fallback=True))
    backend.decoder = decoder
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens(["<|tool|>", "日本"])
    return wrapped(backend)


def byte_level():
    backend = Tokenizer.from_file(str(DATA / "checkpoints" / "fp16" / "tokenizer.json"))
    backend.add_tokens(["日本", "<|tool|>", "éa"])
    return wrapped(backend)


TOKENIZERS = {name: byte_fallback(decoder) for name, decoder in BYTE_FALLBACK.items()} | {"byte level": byte_level()}


def streamed(tokenizer, chunks):
    stream = TextStream(tokenizer)
    return "".join([*(stream.add(chunk) for chunk in chunks), stream.rest(), stream.rest()])


def token_ids(tokenizer):
    size = tokenizer.backend_tokenizer.get_vocab_size()
    every, rare = st.integers(0, size + 3), st.integers(max(size - len(PIECES) - 2, 0), size - 1)
    # bytes that begin, go on with or break a character
    edges = (0x41, 0x80, 0xBF, 0xC3, 0xE2, 0xED, 0xF0)
    spelled = [tokenizer.backend_tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in edges]
    return st.one_of(every, rare, st.sampled_from(spelled) if spelled[0] is not None else every)


@lengths
@pytest.mark.parametrize("name", TOKENIZERS)
def test_streamed_text_is_the_decoded_text(name, examples):
    tokenizer = TOKENIZERS[name]

    @searching(examples)
    @given(st.lists(st.lists(token_ids(tokenizer), max_size=5), max_size=8))
    def check(chunks):
        tokens = [token for chunk in chunks for token in chunk]
        if tokens:
            assert streamed(tokenizer, chunks) == decode(tokenizer, tokens)

    check()


@pytest.mark.parametrize("name", ["with a prefix space", "byte level"])
def test_whole_characters_are_not_held_back(name):
    tokenizer = TOKENIZERS[name]
    letters = [tokenizer.backend_tokenizer.token_to_id(letter) for letter in "abab"]
    stream = TextStream(tokenizer)
    assert [stream.add([token]) for token in letters] == list("abab")


def test_an_end_inside_a_character_and_a_true_replacement_character_are_told():
    tokenizer = TOKENIZERS["byte level"]
    whole = tokenizer.backend_tokenizer.encode("hi 😊").ids
    assert streamed(tokenizer, [whole[:-1]]) == decode(tokenizer, whole[:-1]) == "hi \ufffd"
    assert streamed(tokenizer, [tokenizer.backend_tokenizer.encode("ok \ufffd").ids]) == "ok \ufffd"


@pytest.mark.parametrize("name", ["with a prefix space", "byte level"])
def test_a_long_answer_costs_no_more_a_token(name):
    tokenizer = TOKENIZERS[name]
    spell = tokenizer.backend_tokenizer.token_to_id
    broken = spell("<0xF0>") if spell("<0xF0>") is not None else spell("ð")
    start = time.perf_counter()
    assert len(streamed(tokenizer, [[broken]] * 16000)) == 16000
    assert time.perf_counter() - start < 3  # a tenth of a second; decoding all again at each token takes half a minute


def test_every_byte_of_a_byte_level_vocabulary_is_the_librarys():
    backend = Tokenizer(models.BPE())
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(sorted(pre_tokenizers.ByteLevel.alphabet()))
    for low in range(256):
        for high in (0, 0x80, 0xC3, 0xE0):
            assert streamed(wrapped(backend), [[low], [high]]) == backend.decode([low, high])
