"""An answer's text: as if all of it were decoded and cut at the stop string that is complete first."""

import time
import types

import pytest
from byte_tokens import END, TOKENIZER, ids
from fuzzing import lengths, searching
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from experiments.serving.answer_text import AnswerText
from specmq_jax.tokenizer import decode

WORDS = ["a", "b", "ab", "aab", "ba a", "é", "\ufffd", "b\ufffd", "<0xC3>", "<0xA9>", "<0x61>", "<s>"]


def words():
    """Tokens of several letters, of bytes, and a special one."""
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(WORDS)}, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<s>"])
    return types.SimpleNamespace(backend_tokenizer=backend)


TOKENIZERS = {"bytes": types.SimpleNamespace(backend_tokenizer=TOKENIZER), "words": words()}
LETTERS = {"bytes": [*ids("abé"), *ids("a\ufffdb"), 200], "words": range(len(WORDS))}
STOPS = st.lists(st.text("aabbé\ufffd ", min_size=1, max_size=4), max_size=4)


def expected(text, stops):
    """The text before the stop string that is complete first, the longest of those with one end."""
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return text[:min(ends)[1]] if ends else text


@lengths
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("end", [[], [-1]], ids=["no stop token", "a stop token"])
def test_the_text_is_all_tokens_decoded_and_cut_where_it_ends(name, end, examples):
    tokenizer = TOKENIZERS[name]

    @searching(examples)
    @given(st.lists(st.lists(st.sampled_from(LETTERS[name]), max_size=4), max_size=6), STOPS)
    def check(chunks, stops):
        tokens = [token for chunk in chunks for token in chunk]
        answer = AnswerText(tokenizer, (-1,), stops)
        shown = [answer.add(chunk) for chunk in [*chunks, end]]
        assert all(stop not in "".join(shown) for stop in stops)  # no stop string is shown at any time
        whole = decode(tokenizer, tokens)
        told = "".join(shown) + answer.rest()
        assert told == expected(whole, stops)
        assert answer.ended == (bool(end) or told != whole)
        assert answer.rest() == answer.add(tokens if answer.ended else []) == ""

    check()


def test_a_stop_token_counts_and_so_does_the_one_that_completes_a_stop_string():
    for stops, tokens in (((), [*ids("abc"), END]), (("bc",), ids("abc"))):
        answer = AnswerText(TOKENIZERS["bytes"], (END,), stops)
        assert answer.add([*tokens, *ids("more")]) == ("abc" if not stops else "a")
        assert answer.ended and answer.tokens == len(tokens)


def test_a_tail_that_completes_a_stop_string_is_no_part_of_the_answer():
    answer = AnswerText(TOKENIZERS["bytes"], (END,), ["\ufffd"])
    assert answer.add([*ids("ok "), ids("é")[0]]) == "ok " and not answer.ended
    assert answer.rest() == "" and answer.ended


def test_an_empty_stop_string_ends_nothing():
    answer = AnswerText(TOKENIZERS["bytes"], (END,), ["", "z"])
    assert answer.add(ids("abc")) == "abc" and not answer.ended


def test_a_long_stop_string_costs_no_more_a_token():
    stop = "ab" * 500_000 + "a" * 500_000
    start = time.perf_counter()
    answer = AnswerText(TOKENIZERS["bytes"], (END,), [stop, "a" * 2_000_000])
    text = "ab" * 4000 + "a" * 4000
    told = "".join(answer.add([token]) for token in ids(text))
    assert told + answer.rest() == text and not answer.ended
    assert time.perf_counter() - start < 5  # a third of a second; trying every beginning of it takes minutes
