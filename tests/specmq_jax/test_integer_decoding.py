"""Speculation at precisions with 8-bit activations: a CPU gives a small model's plain output there too."""

import numpy as np
import pytest
from fakes import DATA

import specmq_jax as sm

PRECISIONS = ["w8a8", "w4a8-qqq", "w4a8-qqq-g128", "w4a8-qoq", "w4a8-qoq-g128"]
CONFIG = sm.DecodeConfig(max_len=256, prefill_chunks=(16, 64))
TREE = sm.TreeConfig(depth=3, top_k=4, size=12)


def drafter(method: str, target: sm.Model) -> sm.Drafter:
    if method == "spec":
        return sm.ChainDrafter(target.with_precision("w4a16-g64"), 4)
    verifier = target.with_precision("w4a8-qqq") if method == "hier" else target
    eagle = sm.EagleDrafter(sm.load_head(DATA / "eagle" / "eagle2_head", verifier), TREE)
    return sm.HierarchicalDrafter(verifier, eagle, 2) if method == "hier" else eagle


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_drafter_gives_the_plain_output(precision):
    target = sm.load(DATA / "checkpoints" / "fp16", precision=precision)
    prompts = [np.random.default_rng(seed).integers(0, target.config.vocab_size, length).tolist()
               for seed, length in enumerate((1, 30, 70))]
    plain = sm.Decoder(target, config=CONFIG)
    expected = [plain.generate(prompt, 40).tokens.tolist() for prompt in prompts]
    for method in ("spec", "eagle2", "hier"):
        decoder = sm.Decoder(target, drafter(method, target), CONFIG)
        assert [decoder.generate(prompt, 40).tokens.tolist() for prompt in prompts] == expected, method
