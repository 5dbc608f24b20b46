"""Speculation at precisions with 8-bit activations: on a CPU it gives the plain output, and leaves the plain cache's bits."""

import jax
import numpy as np
import pytest
from fakes import DATA, expanded, tiny_config

import specmq_jax as sm

PRECISIONS = {"w8a8": "eagle2", "w4a8-qqq": "hier", "w4a8-qqq-g128": "spec", "w4a8-qoq": "eagle2", "w4a8-qoq-g128": "spec"}
"""Each with the drafter that is not left to the slow tests."""
CONFIG = sm.DecodeConfig(max_len=256, prefill_chunks=(32,))
TREE = sm.TreeConfig(depth=3, top_k=4, size=12)


def drafter(method: str, target: sm.Model) -> sm.Drafter:
    if method == "spec":
        return sm.ChainDrafter(target.with_precision("w4a16-g64"), 4)
    verifier = target.with_precision("w4a8-qqq") if method == "hier" else target
    eagle = sm.EagleDrafter(sm.load_head(DATA / "eagle" / f"eagle{3 if method == 'eagle3' else 2}_head", verifier), TREE)
    return sm.HierarchicalDrafter(verifier, eagle, 2) if method == "hier" else eagle


def check(target: sm.Model, method: str) -> None:
    """Tokens, and on a CPU the bits of the cache, are the plain ones behind prompts of several lengths."""
    prompts = [np.random.default_rng(seed).integers(0, target.config.vocab_size, length).tolist()
               for seed, length in enumerate((1, 30, 70))]
    plain, decoder = sm.Decoder(target, config=CONFIG), sm.Decoder(target, drafter(method, target), CONFIG)
    for prompt in prompts:
        (tokens, rows), (found_tokens, found_rows) = decode(plain, prompt), decode(decoder, prompt)
        assert found_tokens == tokens
        if jax.default_backend() == "cpu":
            for i, (found, wanted) in enumerate(zip(found_rows, rows, strict=True)):
                np.testing.assert_array_equal(found, wanted, err_msg=f"array {i}")


def decode(decoder: sm.Decoder, prompt: list[int]) -> tuple[list[int], list[np.ndarray]]:
    """The tokens, and the keys and values of each layer behind all of them but the last."""
    state = decoder.prefill(prompt, 40)
    while not state.done:
        state = decoder.round(state)
    length = int(state.length)
    return (np.asarray(state.tokens)[:length].tolist(),
            [np.asarray(rows)[:length - 1] for rows in jax.tree.leaves(state.cache.layers)])


@pytest.mark.parametrize(("precision", "method"), [
    pytest.param(precision, method, marks=[pytest.mark.slow] if method != fast else [])
    for precision, fast in PRECISIONS.items() for method in ("spec", "eagle2", "hier")])
def test_every_drafter_gives_the_plain_output_and_cache(precision, method):
    check(sm.load(DATA / "checkpoints" / "fp16", precision=precision), method)


def test_a_head_that_reads_captured_states_gives_the_plain_output_and_cache():
    check(sm.load(DATA / "eagle" / "eagle3_base", precision="w8a8"), "eagle3")


@pytest.mark.parametrize("precision", ["w8a8", pytest.param("w4a8-qoq", marks=pytest.mark.slow)])
def test_sizes_that_are_no_powers_of_two_give_the_plain_output_and_cache(precision):
    config = tiny_config(hidden_size=576, intermediate_size=1536, num_heads=9, num_kv_heads=3, head_dim=64)
    check(expanded(sm.random_model(config, "fp32", seed=4), precision), "spec")
