"""The choice of an implementation and of tuned sizes."""

import json
import warnings

import jax
import jax.numpy as jnp
import pytest
from lowering import cuda_text

from pallas_kernels import launch
from pallas_kernels.norm import add_rms_norm


def norm_avals() -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 64), (64,))]


def kernel_norm(residual, weight):
    return add_rms_norm(residual, None, weight, eps=1e-5, out_dtype=jnp.float16, implementation="kernel")


def test_a_backend_without_a_gpu_runs_the_reference():
    expected = "kernel" if jax.default_backend() == "gpu" else "reference"
    assert launch.choose(None) == expected


def test_an_unknown_implementation_is_named():
    with pytest.raises(ValueError, match="implementation 'fast' is unknown; expected None or one of"):
        add_rms_norm(jnp.zeros((1, 8)), None, jnp.zeros(8), eps=1e-5, out_dtype=jnp.float16, implementation="fast")


def test_lowering_does_not_warn_of_triton():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cuda_text(kernel_norm, *norm_avals())


def test_a_tuned_table_goes_before_the_heuristic(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "__file__", str(tmp_path / "launch.py"))
    table = launch.table_path("norm")
    table.parent.mkdir(parents=True)
    table.write_text(json.dumps({"64": {"num_warps": 2}}))
    assert launch.tuned("norm", "64") == {"num_warps": 2}
    assert launch.tuned("norm", "65") is None
    assert "num_warps = 2 " in cuda_text(lambda *operands: kernel_norm(*operands), *norm_avals())


@pytest.mark.parametrize(("value", "expected"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_power_of_two_is_the_next_one(value, expected):
    assert launch.power_of_two(value) == expected
