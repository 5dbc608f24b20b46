"""Frequencies are transformers', whatever entries of the rope stand where.

`rope_frequencies.json` was made by transformers 5.24: its `LlamaConfig` settled each configuration's rope, and its
`ROPE_INIT_FUNCTIONS` computed with numpy's float64 in the place of torch, for a sequence of `length` tokens.
"""

import json

import numpy as np
import pytest
from configs import PLAIN
from fakes import DATA

from specmq_jax.network.config import LlamaConfig

CASES = json.loads((DATA / "rope_frequencies.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_frequencies_equal_transformers(case):
    sizes = {key: value for key, value in PLAIN.items() if key != "rope_parameters"}
    config = LlamaConfig.from_hf(sizes | case["config"])
    frequencies, scale = config.rope.frequencies(config.head_dim, case["length"])
    np.testing.assert_allclose(frequencies, case["frequencies"], rtol=1e-6)
    assert scale == pytest.approx(case["scale"], rel=1e-7)
