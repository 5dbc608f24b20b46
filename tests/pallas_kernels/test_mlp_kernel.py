"""The gated activation against the formula in f64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import IMPLEMENTATIONS, relative_error
from lowering import cuda_text, launches

from pallas_kernels.mlp import silu_mul
from pallas_kernels.norm import RowScale


def check(splits: int, rows: int, inner: int) -> None:
    rng = np.random.default_rng(splits)
    partials = (rng.normal(size=(splits, rows, 2 * inner)) * 3).astype(np.float32)
    total = partials.astype(np.float64).sum(0)
    gate, up = total[:, :inner], total[:, inner:]
    out, peaks = silu_mul(jnp.asarray(partials), out_dtype=jnp.float16)
    assert peaks is None
    assert out.dtype == jnp.float16
    assert relative_error(out, gate / (1 + np.exp(-gate)) * up) < 5e-4


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(("rows", "inner"), [(1, 1536), (7, 50), (60, 32)])
def test_gates_the_sum_of_partials(splits, rows, inner):
    check(splits, rows, inner)


@pytest.mark.gpu
@pytest.mark.parametrize("inner", [1536, 14336, 28672])
@pytest.mark.parametrize("rows", [1, 8, 16, 30, 60, 64, 128])
def test_real_sizes_on_gpu(rows, inner):
    check(4, rows, inner)
    check_peaks(4, rows, inner, "kernel")


def check_peaks(splits: int, rows: int, inner: int, implementation: str) -> None:
    rng = np.random.default_rng(splits)
    partials = jnp.asarray(rng.normal(size=(splits, rows, 2 * inner)) * 3, jnp.float32)
    scale = RowScale(jnp.asarray(rng.uniform(1, 9, (rows, 3)), jnp.float32), 32, 1e-5)
    for owed in (None, scale):
        values, peaks = silu_mul(partials, out_dtype=jnp.float16, row_scale=owed, with_peaks=True,
                                 implementation=implementation)
        expected, _ = silu_mul(partials, out_dtype=jnp.float16, row_scale=owed)
        assert values.dtype == jnp.float16
        assert relative_error(values, np.asarray(expected, np.float64)) < 1e-4
        assert (peaks is None) == (implementation == "reference" or rows > 64)
        if peaks is not None:
            np.testing.assert_array_equal(peaks.max(axis=1), jnp.abs(values).max(axis=1))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("with_peaks", [False, True])
def test_a_product_past_half_precision_is_no_number_and_its_peak_infinite(with_peaks, implementation):
    """gate and up of 300 make 90000."""
    gate_up = jnp.ones((1, 3, 128)).at[0, 1, 5].set(300).at[0, 1, 64 + 5].set(300)
    values, peaks = silu_mul(gate_up, out_dtype=jnp.float16, with_peaks=with_peaks, implementation=implementation)
    np.testing.assert_array_equal(np.argwhere(~np.isfinite(values)), [[1, 5]])
    assert np.isnan(values[1, 5])
    if peaks is not None:
        np.testing.assert_array_equal(np.isinf(peaks.max(axis=1)), [False, True, False])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("splits", "rows", "inner"), [(1, 1, 1536), (4, 7, 50), (2, 65, 32)])
def test_finds_the_peaks_of_what_it_gates(splits, rows, inner, implementation):
    check_peaks(splits, rows, inner, implementation)


@pytest.mark.parametrize("inner", [1536, 14336, 28672])
def test_with_peaks_it_is_one_launch(inner):
    def function(gate_up, squares):
        return silu_mul(gate_up, out_dtype=jnp.float16, row_scale=RowScale(squares, 4096, 1e-5), with_peaks=True,
                        implementation="kernel")

    avals = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 30, 2 * inner), (30, 8))]
    assert launches(cuda_text(function, *avals)) == 1


@pytest.mark.parametrize("with_peaks", [False, True])
def test_rejects_an_odd_width(with_peaks):
    with pytest.raises(ValueError, match=r"gate_up has shape \[1, 2, 7\]"):
        silu_mul(jnp.zeros((1, 2, 7)), out_dtype=jnp.float16, with_peaks=with_peaks)


def test_applies_the_factor_that_a_deferred_norm_owes():
    rng = np.random.default_rng(1)
    partials = rng.normal(size=(3, 5, 16)).astype(np.float32)
    scale = RowScale(jnp.asarray(rng.uniform(1, 9, (5, 2)), jnp.float32), 32, 1e-5)
    factor = 1 / np.sqrt(np.asarray(scale.squares, np.float64).sum(1) / 32 + 1e-5)
    paid, _ = silu_mul(jnp.asarray(partials * factor[:, None], jnp.float32), out_dtype=jnp.float32)
    owed, _ = silu_mul(jnp.asarray(partials), out_dtype=jnp.float32, row_scale=scale)
    assert relative_error(owed, paid) < 1e-6
