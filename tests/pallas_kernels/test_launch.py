"""The choice of an implementation and of tuned sizes."""

import json
import os
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


def test_compiling_asks_nobody_for_names_of_functions():
    assert os.environ["LLVM_DISABLE_SYMBOLIZATION"]  # set by the import, or by the user


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


def test_a_device_without_a_table_takes_that_of_its_compute_capability(tmp_path, monkeypatch):
    class Device:
        device_kind, compute_capability = "NVIDIA H100 80GB HBM3", "9.0"

    def write(path, table):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(table))
        launch._table.cache_clear()

    monkeypatch.setattr(launch, "__file__", str(tmp_path / "launch.py"))
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    assert launch.tuned("norm", "64") is None
    write(tmp_path / "norm" / "tuned" / "nvidia_h200.json", {"64": {"num_warps": 4}, "65": {"num_warps": 8}})
    assert launch.table_path("norm").name == "nvidia_h100_80gb_hbm3.json"
    assert launch.tuned("norm", "64") == {"num_warps": 4}
    write(launch.table_path("norm"), {"64": {"num_warps": 2}})
    assert [launch.tuned("norm", key) for key in ("64", "65", "66")] == [{"num_warps": 2}, {"num_warps": 8}, None]
    monkeypatch.setattr(Device, "compute_capability", "8.9")
    assert launch.tuned("norm", "65") is None


@pytest.mark.parametrize(("value", "expected"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_power_of_two_is_the_next_one(value, expected):
    assert launch.power_of_two(value) == expected
