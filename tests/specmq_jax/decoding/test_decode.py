"""What users of `Decoder` rely on: speculation changes the speed of decoding and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import OracleDrafter, tiny_config
from scipy import stats

import specmq_jax as sm
from specmq_jax.decoding import decode

PROMPTS = [np.random.default_rng(i).integers(0, 61, 1 + 3 * i).tolist() for i in range(20)]
NEW = 40


@pytest.fixture(scope="module")
def plain(tiny):
    return sm.Decoder(tiny, config=sm.DecodeConfig(max_len=256))


def greedy_by_full_passes(model, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(jnp.argmax(sm.logits(model, tokens)[-1])))
    return tokens[len(prompt):]


def test_plain_decoding_equals_repeated_full_forward_passes(tiny, plain):
    assert plain.generate(PROMPTS[0], 3).tokens.tolist() == greedy_by_full_passes(tiny, PROMPTS[0], 3)


def test_every_token_of_plain_decoding_is_the_best_of_a_full_forward_pass(tiny, plain):
    for prompt in PROMPTS[::7]:
        tokens = plain.generate(prompt, 12).tokens.tolist()
        assert sm.logits(tiny, prompt + tokens)[len(prompt) - 1:-1].argmax(-1).tolist() == tokens


@pytest.mark.parametrize("length", [4, *(pytest.param(length, marks=pytest.mark.slow) for length in (1, 7))])
def test_a_chain_drafter_changes_no_token(tiny, tiny_draft, plain, length):
    decoder = sm.Decoder(tiny, sm.ChainDrafter(tiny_draft, length), sm.DecodeConfig(max_len=256))
    accept_lengths = []
    for prompt in PROMPTS:
        expected, found = plain.generate(prompt, NEW), decoder.generate(prompt, NEW)
        assert found.tokens.tolist() == expected.tokens.tolist()
        assert 1 + found.accept_lengths[:-1].sum() < NEW <= 1 + found.accept_lengths.sum()
        assert [t for part in decoder.stream(prompt, NEW, rounds=2) for t in part] == expected.tokens.tolist()
        accept_lengths.extend(found.accept_lengths)
    assert set(accept_lengths) >= {1, length + 1}, "rejections and full acceptances must both have been met"


@pytest.mark.parametrize(("size", "skill"), [
    (1, 1.0), (7, 0.9),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, 1.0), (33, 0.7), (60, 0.9), (100, 0.8)))])
def test_a_tree_drafter_of_any_size_changes_no_token(tiny, plain, size, skill):
    for seed, prompt in enumerate(PROMPTS[:6:3]):
        expected = plain.generate(prompt, NEW).tokens
        truth = np.concatenate([prompt, expected])
        drafter = OracleDrafter.random(truth, size=size, vocab=61, skill=skill, seed=seed)
        found = sm.Decoder(tiny, drafter, sm.DecodeConfig(max_len=256)).generate(prompt, NEW)
        assert found.tokens.tolist() == expected.tolist()
        assert size == 1 or found.accept_lengths.max() > 1


@pytest.mark.parametrize("length", [2, *(pytest.param(length, marks=pytest.mark.slow) for length in (4, 7))])
def test_a_stop_token_cuts_the_output_wherever_it_stands_in_an_accepted_run(tiny, plain, length):
    prompt = PROMPTS[4]
    expected = plain.generate(prompt, NEW).tokens.tolist()
    self_draft = sm.ChainDrafter(tiny, length)
    for place in range(length + 2):  # the first token, and all of a run
        stop = expected[place]
        cut = expected[:expected.index(stop) + 1]
        config = sm.DecodeConfig(max_len=256, stop_tokens=(stop,))
        decoder = sm.Decoder(tiny, self_draft, config)
        found = decoder.generate(prompt, NEW)
        assert found.tokens.tolist() == cut and found.stopped
        assert [t for part in decoder.stream(prompt, NEW) for t in part] == cut
    found = sm.Decoder(tiny, config=config).generate(prompt, NEW)
    assert found.tokens.tolist() == cut and found.stopped


@pytest.mark.parametrize(("short", "rounds", "sizes"), [
    (np.inf, None, [1, 1, 2, 4, 8, 16, 8]), (0.0, None, [1] * NEW), (np.inf, 3, [1] + 13 * [3])])
def test_a_stream_takes_more_rounds_a_call_as_long_as_calls_are_short(monkeypatch, plain, short, rounds, sizes):
    monkeypatch.setattr(decode, "_SHORT_CALL", short)
    parts = list(plain.stream(PROMPTS[3], NEW, rounds=rounds))
    assert [len(part) for part in parts] == sizes
    assert sum(parts, []) == plain.generate(PROMPTS[3], NEW).tokens.tolist()


def test_the_phases_of_a_round_take_time(tiny, tiny_draft, plain):
    assert plain.phase_times(PROMPTS[3]).draft == 0
    phases = sm.Decoder(tiny, sm.ChainDrafter(tiny_draft, 3), sm.DecodeConfig(max_len=256)).phase_times(PROMPTS[3])
    assert min(phases.prefill, phases.draft, phases.verify, phases.round) > 0
    with pytest.raises(sm.UserError, match="leaves no room"):
        sm.Decoder(tiny, sm.ChainDrafter(tiny_draft, 3), sm.DecodeConfig(max_len=12)).phase_times(PROMPTS[3])


def test_rounds_by_hand_equal_generate(tiny, tiny_draft, plain):
    decoder = sm.Decoder(tiny, sm.ChainDrafter(tiny_draft, 3), sm.DecodeConfig(max_len=256))
    state = decoder.prefill(PROMPTS[5], 20)
    while not state.done:
        state = decoder.round(state)
    found = np.asarray(state.tokens)[len(PROMPTS[5]):int(state.length)]
    assert found.tolist() == plain.generate(PROMPTS[5], 20).tokens.tolist()


def test_a_prompt_in_several_chunks_equals_one_chunk(tiny):
    prompt = np.random.default_rng(0).integers(0, 61, 75).tolist()
    whole = sm.Decoder(tiny, config=sm.DecodeConfig(max_len=256, prefill_chunks=(128,)))
    parts = sm.Decoder(tiny, config=sm.DecodeConfig(max_len=256, prefill_chunks=(8, 16)))
    assert whole.generate(prompt, 20).tokens.tolist() == parts.generate(prompt, 20).tokens.tolist()


def test_after_any_acceptance_the_caches_equal_those_of_a_fresh_prefill(tiny, tiny_draft):
    decoder = sm.Decoder(tiny, sm.ChainDrafter(tiny_draft, 4), sm.DecodeConfig(max_len=256))
    state = decoder.prefill(PROMPTS[6], NEW)
    for _ in range(6):
        state = decoder.round(state)
        length = int(state.length)
        fresh = decoder.prefill(np.asarray(state.tokens)[:length - 1].tolist())
        assert int(state.cache.length) == int(state.drafter.cache.length) == length - 1
        assert int(state.drafter.previous) == int(fresh.drafter.previous)
        for kept, new, rows in ((state.cache, fresh.cache, length - 1), (state.drafter.cache, fresh.drafter.cache, length - 2)):
            for a, b in zip(jax.tree.leaves(kept.layers), jax.tree.leaves(new.layers), strict=True):
                np.testing.assert_allclose(a[:rows], b[:rows], rtol=1e-4, atol=1e-5)


SAMPLING = sm.Sampling(temperature=0.8, top_k=20, top_p=0.95)


def test_sampled_speculation_draws_the_tokens_that_plain_sampling_draws(tiny, tiny_draft):
    config = sm.DecodeConfig(max_len=256, sampling=SAMPLING)
    plain = sm.Decoder(tiny, config=config)
    decoder = sm.Decoder(tiny, sm.ChainDrafter(tiny_draft, 4), config)
    outputs = set()
    for seed, prompt in enumerate(PROMPTS[::2]):
        expected = plain.generate(prompt, NEW, seed=seed).tokens.tolist()
        assert decoder.generate(prompt, NEW, seed=seed).tokens.tolist() == expected
        assert [t for part in decoder.stream(prompt, NEW, seed=seed) for t in part] == expected
        outputs.add(tuple(expected))
    assert len(outputs) == len(PROMPTS[::2])


def test_sampled_speculation_has_the_targets_distribution():
    vocab, prompt, draws = 5, [3, 1, 4], 750
    model = sm.random_model(tiny_config(vocab_size=vocab, num_layers=1), "fp32", seed=3)
    sampling = sm.Sampling(temperature=1.5)
    decoder = sm.Decoder(model, sm.ChainDrafter(model.with_precision("w4a16-g32"), 3),
                         sm.DecodeConfig(max_len=64, sampling=sampling, prefill_chunks=(8,)))
    softmax = lambda tokens: np.asarray(jax.nn.softmax(sm.logits(model, tokens)[-1] / 1.5), np.float64)  # noqa: E731
    first = softmax(prompt)
    pairs = np.concatenate([first[a] * softmax([*prompt, a]) for a in range(vocab)])
    counts = np.zeros(vocab * vocab)
    for seed in range(draws):
        a, b = decoder.generate(prompt, 2, seed=seed).tokens
        counts[a * vocab + b] += 1
    common = pairs * draws >= 5
    observed, expected = np.append(counts[common], counts[~common].sum()), np.append(pairs[common], pairs[~common].sum())
    assert stats.chisquare(observed, expected / expected.sum() * draws).pvalue > 0.001


def test_errors_say_what_to_do(tiny, plain):
    with pytest.raises(sm.UserError, match="the prompt has 300 tokens, the cache holds 256"):
        plain.generate([1] * 300)
    with pytest.raises(sm.UserError, match="token id 61 lies outside the vocabulary of 61"):
        plain.generate([61])
    with pytest.raises(sm.UserError, match="at least one token id"):
        plain.generate([])
    with pytest.raises(sm.UserError, match="max_new_tokens must be a whole number of at least 1"):
        plain.generate([1], 0)
    with pytest.raises(sm.UserError, match="drafts at least 1 token"):
        sm.ChainDrafter(tiny, 0)


def test_a_draft_model_of_another_vocabulary_is_refused(tiny):
    other = sm.random_model(tiny_config(vocab_size=62), "fp32")
    with pytest.raises(sm.UserError, match="the draft model has 62 tokens, the target 61"):
        sm.Decoder(tiny, sm.ChainDrafter(other, 2))


def test_output_ends_where_the_cache_is_full(tiny):
    decoder = sm.Decoder(tiny, sm.ChainDrafter(tiny, 4), sm.DecodeConfig(max_len=32))
    found = decoder.generate([1, 2, 3])
    assert len(found.tokens) == 29 and not found.stopped


def test_a_round_reads_the_weights_once_and_moves_no_cache(tiny):
    decoder = sm.Decoder(tiny, sm.ChainDrafter(tiny, 4), sm.DecodeConfig(max_len=32))
    state = decoder.prefill([1, 2, 3])
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state.cache.layers)]
    state = decoder.round(state)
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state.cache.layers)] == buffers
