"""What a round of any method leaves alone: the host, and the compiler."""

import jax
import numpy as np
import pytest
from fakes import DATA

import specmq_jax as sm

METHODS = ("plain", "chain", pytest.param("eagle2", marks=pytest.mark.slow), "eagle3", "hierarchical")
TREE = sm.TreeConfig(depth=2, top_k=3, size=6)
CONFIG = sm.DecodeConfig(max_len=256, prefill_chunks=(16, 64))


@pytest.fixture(scope="module", params=METHODS)
def decoder(request):
    """One of each method, after its first generation."""
    method = request.param
    version = 3 if method == "eagle3" else 2
    target = sm.load(DATA / "eagle" / "eagle3_base" if version == 3 else DATA / "checkpoints" / "fp16")
    drafter = None
    if method == "chain":
        drafter = sm.ChainDrafter(target.with_precision("w4a16-g64"), 3)
    elif method != "plain":
        drafter = sm.EagleDrafter(sm.load_head(DATA / "eagle" / f"eagle{version}_head", target), TREE)
        if method == "hierarchical":
            drafter = sm.HierarchicalDrafter(target, drafter, 2)
    made = sm.Decoder(target, drafter, CONFIG)
    made.generate(prompt(0, 20), 8)
    return made


def prompt(seed, length):
    return np.random.default_rng(seed).integers(0, 512, length).tolist()


def test_a_round_visits_no_host(decoder):
    expected = decoder.generate(prompt(1, 9), 12).tokens.tolist()
    state = decoder.prefill(prompt(1, 9), 12)
    with jax.transfer_guard("disallow_explicit"):
        for _ in range(11):
            state = decoder.round(state)
    assert state.done and np.asarray(state.tokens)[9:int(state.length)].tolist() == expected


@pytest.fixture
def compiled():
    """A growing list with an entry for each program that the backend compiles or the persistent cache yields."""
    events = []

    def listen(event, *_, **__):
        if event.endswith("backend_compile_duration"):
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


def use(decoder, seed, length):
    generation = decoder.generate(prompt(seed, length), 4 + seed % 5)
    assert len(generation.tokens) == 4 + seed % 5
    assert sum(decoder.stream(prompt(seed, length), 4 + seed % 5), []) == generation.tokens.tolist()
    decoder.round(decoder.prefill(prompt(seed, length), 4))


def test_each_function_is_compiled_once_for_prompts_of_all_lengths(decoder, compiled):
    for length in (9, 30, 80):  # each chunk length, and both together
        use(decoder, 0, length)
    before = len(compiled)
    for seed in range(0, 50, 3):
        use(decoder, seed, 1 + 4 * seed)
    assert len(compiled) == before
    assert decoder._run._cache_size() == 1
    assert decoder._ingest._cache_size() == len(decoder.prefill_chunks)
    jax.jit(lambda x: x - 5)(np.zeros(77))
    assert len(compiled) > before, "the listener hears of compilations"


def test_scores_of_the_next_token_are_those_of_a_full_pass(decoder):
    for length in (1, 16, 70):
        expected = np.asarray(sm.logits(decoder.target, prompt(0, length)))[-1]
        found = decoder.next_logits(prompt(0, length))
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 if jax.default_backend() == "cpu" else 0.1)
    with pytest.raises(sm.UserError, match="the prompt has 256 tokens"):
        decoder.next_logits(prompt(0, 256))
