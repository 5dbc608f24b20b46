"""What a decoder refuses, each in a sentence of its own."""

import numpy as np
import pytest
from fakes import tiny_config

import specmq_jax as sm
from specmq_jax.loading.model import check_tokens


@pytest.fixture(scope="module")
def decoder(tiny):
    return sm.Decoder(tiny, config=sm.DecodeConfig(max_len=64, prefill_chunks=(16,)))


@pytest.mark.parametrize(("prompt", "message"), [
    ([1.5, 2.5], "token ids, which are integers; found float64"), ([1.0], "found float64"), ("text", "found a text"),
    (b"12", "found a text"), ([True, False], "found bool"), (["1"], "integers; found"), ([[1, 2]], r"found shape \(1, 2\)"),
    ([], r"found shape \(0,\)"), (7, r"found shape \(\)"), ([1, None], "integers; found object"), ([[1], [2, 3]], "no array"),
    ([2**40], f"token id {2**40} lies outside the vocabulary of 61"), ([-1], "token id -1 lies outside"),
    ([10**30], f"token id {10**30} lies outside"), (np.array([np.nan]), "found float64")])
def test_prompts_that_are_no_token_ids(decoder, prompt, message):
    with pytest.raises(sm.UserError, match=message):
        decoder.prefill(prompt)


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.uint16, np.uint64])
def test_integers_of_any_kind_are_token_ids(dtype):
    found = check_tokens(np.array([3, 60], dtype), tiny_config())
    assert found.dtype == np.int32 and found.tolist() == [3, 60]


@pytest.mark.parametrize("count", [0, -3, 1.5, True, "4", float("nan")])
def test_counts_that_are_none(decoder, count):
    with pytest.raises(sm.UserError, match="max_new_tokens must be a whole number of at least 1"):
        decoder.generate([1, 2], count)
    with pytest.raises(sm.UserError, match="rounds must be a whole number of at least 1"):
        next(decoder.stream([1, 2], 4, rounds=count))


@pytest.mark.parametrize("seed", [1.5, "1", None, True])
def test_seeds_that_are_no_integers(tiny, seed):
    from specmq_jax.decoding.sampling import seed_key

    with pytest.raises(sm.UserError, match="a seed is an integer"):
        seed_key(seed)


def test_a_cache_longer_than_the_models_positions(tiny):
    sm.Decoder(tiny, config=sm.DecodeConfig(max_len=512))
    with pytest.raises(sm.UserError, match="max_len is 513 tokens, and this model knows 512 positions"):
        sm.Decoder(tiny, config=sm.DecodeConfig(max_len=513))
