"""Memory that a conversion takes follows from a model's largest matrix, not from its depth."""

import pathlib
import subprocess
import sys

import pytest
from sources import TINY, write_large

_PROGRAM = """
import resource, sys
import jax
from checkpoints_tools.convert import convert
from checkpoints_tools.export import export
from checkpoints_tools.rotate import rotate

source, destination, work = sys.argv[1:]
jax.numpy.zeros(1).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if work == "rotate":
    rotate(source, destination)
elif work == "export":
    export(source, destination, "hf", shard_bytes=128 << 20)
else:
    convert(source, destination, work)
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def peak_bytes(directory, work, **sizes):
    """The most memory that `work` on a model of these sizes takes, beside what the program itself does; and the model's."""
    config = TINY | {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 4,
                     "head_dim": 64} | sizes
    source = directory / f"source-{config['num_hidden_layers']}-{config['vocab_size']}"
    size = source.stat().st_size if source.exists() else write_large(source, config)
    made = directory / f"{source.name}-{work}"
    result = subprocess.run([sys.executable, "-c", _PROGRAM, source, made, work], capture_output=True, text=True, check=True,
                            cwd=pathlib.Path(__file__).parents[2])
    return int(result.stdout.split()[-1]), size


@pytest.mark.slow
@pytest.mark.parametrize("work", ["w4a16", "rotate", "export"])
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path, work):
    few, size = peak_bytes(tmp_path, work, num_hidden_layers=4, vocab_size=1024)
    many, larger = peak_bytes(tmp_path, work, num_hidden_layers=28, vocab_size=1024)
    # a shard of up to 128 MB is held, and written from a copy, whatever the depth; few layers do not fill one
    assert many - few < 0.5 * (larger - size)


@pytest.mark.slow
def test_a_large_vocabulary_takes_its_matrix_twice(tmp_path):
    found, _ = peak_bytes(tmp_path, "fp16", num_hidden_layers=1, vocab_size=1 << 18)
    matrix = 2 * (1 << 18) * 1024
    assert found < 2.5 * matrix
