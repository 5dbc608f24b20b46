"""Decoding that ends at a string: what is kept and counted."""

import numpy as np
import pytest

import specmq_jax as sm
from experiments.benchmarks import stop_strings

NEW = 60
PROMPT = [5, 17, 3, 44]


def text(token_ids):
    """Two letters a token."""
    return "".join(chr(97 + token % 26) + chr(65 + token // 26) for token in token_ids)


@pytest.fixture(scope="module")
def target():
    config = sm.LlamaConfig(vocab_size=61, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2,
                            head_dim=16, max_position=512)
    return sm.random_model(config, "fp32", seed=1)


@pytest.fixture(scope="module", params=["plain", "chain"])
def decoder(request, target):
    drafter = sm.ChainDrafter(target.with_precision("w4a16-g32"), 3) if request.param == "chain" else None
    return sm.Decoder(target, drafter, sm.DecodeConfig(max_len=256))


@pytest.mark.parametrize("place", [1, 2, 7, 20, 41, NEW - 1])
def test_the_output_ends_with_the_token_that_completes_the_string(decoder, place):
    whole = decoder.generate(PROMPT, NEW)
    string = text(whole.tokens)[2 * place - 1:2 * place + 1]  # from the middle of a token into the next
    end = -(-(text(whole.tokens).index(string) + 2) // 2)
    found = stop_strings.generate(decoder, PROMPT, NEW, ["no such", string], text)
    assert found.tokens.tolist() == whole.tokens[:end].tolist() and not found.stopped
    assert stop_strings.cut(text(found.tokens), [string]) + string in text(found.tokens)
    # the rounds that were needed, and no more
    assert 1 + found.accept_lengths[:-1].sum() < end <= 1 + found.accept_lengths.sum()
    assert found.accept_lengths.tolist() == whole.accept_lengths[:len(found.accept_lengths)].tolist()
    assert found.seconds > 0 and found.prefill_seconds > 0


def test_without_the_string_the_output_is_that_of_generate(decoder):
    whole = decoder.generate(PROMPT, NEW)
    found = stop_strings.generate(decoder, PROMPT, NEW, ["no such"], text)
    assert found.tokens.tolist() == whole.tokens.tolist() and found.stopped == whole.stopped
    assert found.accept_lengths.tolist() == whole.accept_lengths.tolist()


def test_a_stop_token_ends_the_output_before_the_string(target):
    plain = sm.Decoder(target, config=sm.DecodeConfig(max_len=256))
    whole = plain.generate(PROMPT, NEW).tokens.tolist()
    stop = whole[9]
    decoder = sm.Decoder(target, config=sm.DecodeConfig(max_len=256, stop_tokens=(stop,)))
    found = stop_strings.generate(decoder, PROMPT, NEW, ["no such"], text)
    assert found.tokens.tolist() == whole[:whole.index(stop) + 1] and found.stopped


def test_time_behind_the_string_is_not_counted(decoder, monkeypatch):
    whole = text(decoder.generate(PROMPT, NEW).tokens)
    clock = iter(range(10**6))
    monkeypatch.setattr(stop_strings.time, "perf_counter", lambda: float(next(clock)))
    rounds = stop_strings._ROUNDS
    found = stop_strings.generate(decoder, PROMPT, NEW, [whole[40:44]], text)
    # each look at the text takes one second of this clock; of the last only the share of the rounds that were needed counts
    looks, rest = divmod(len(found.accept_lengths) - 1, rounds)
    assert found.seconds == pytest.approx(looks + (rest + 1) / _last_look(decoder, found, looks, rounds))


def _last_look(decoder, found, looks, rounds):
    """The rounds that were run between the last two looks at the text."""
    return min(rounds, len(decoder.generate(PROMPT, NEW).accept_lengths) - looks * rounds)


@pytest.mark.parametrize(("said", "strings", "kept"), [
    ("one\nQ: two\nQ:", ["\nQ:"], "one"), ("one", ["\nQ:"], "one"), ("a b c", ["c", "b"], "a "), ("", ["x"], ""),
    ("\nQ: at once", ["\nQ:"], ""),
])
def test_text_is_cut_before_the_first_of_the_strings(said, strings, kept):
    assert stop_strings.cut(said, strings) == kept


def test_completion_counts_tokens_of_whole_strings_only():
    words = ["one", "\n", "Q", ":", " two"]

    def spell(ids):
        return "".join(words[i] for i in ids)

    assert stop_strings.completion([0, 1, 2, 3, 4], ["\nQ:"], spell) == 4
    assert stop_strings.completion([0, 1, 2], ["\nQ:"], spell) is None
    assert stop_strings.completion(np.arange(1).tolist(), ["one"], spell) == 1
