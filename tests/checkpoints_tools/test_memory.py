"""A model need not fit into host memory to be converted."""

import pathlib
import subprocess
import sys

import pytest
from sources import TINY, write_large

_PROGRAM = """
import resource, sys
from checkpoints_tools.convert import convert
import jax
jax.numpy.zeros(1).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(sys.argv[1], sys.argv[2], sys.argv[3])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "w4a16-g64"])
def test_converting_takes_far_less_memory_than_the_model(tmp_path, precision):
    config = TINY | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 31, "num_attention_heads": 16,
                     "num_key_value_heads": 16, "head_dim": 64, "vocab_size": 4096}
    size = write_large(tmp_path / "source", config)
    assert size > 1e9
    result = subprocess.run([sys.executable, "-c", _PROGRAM, tmp_path / "source", tmp_path / "made", precision],
                            capture_output=True, text=True, check=True, cwd=pathlib.Path(__file__).parents[2])
    assert int(result.stdout.split()[-1]) * 1024 < 0.6 * size
