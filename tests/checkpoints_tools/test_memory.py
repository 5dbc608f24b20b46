"""A model need not fit into host memory to be converted."""

import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from sources import TINY, tensor_shapes

_PROGRAM = """
import resource, sys
from checkpoints_tools.convert import convert
import jax
jax.numpy.zeros(1).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(sys.argv[1], sys.argv[2], sys.argv[3])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def write_large(directory: pathlib.Path, config: dict) -> int:
    """A checkpoint of f16 noise, written without holding it; returns its bytes."""
    noise = (np.random.default_rng(0).standard_normal(4 << 20) * 0.02).astype(np.float16).tobytes()
    header, offset = {}, 0
    for name, shape in tensor_shapes(config).items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, offset, len(noise)):
            file.write(noise[:offset - start])
    return offset


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
