"""Residual addition and RMSNorm against the formula in f64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import IMPLEMENTATIONS, relative_error
from lowering import cuda_text, launches

from pallas_kernels.norm import add_rms_norm, add_rms_norm_deferred

EPS = 1e-5


def problem(rows: int, columns: int, splits: int):
    rng = np.random.default_rng(rows * columns + splits)
    residual = (rng.normal(size=(rows, columns)) * 3 + 1).astype(np.float32)
    partials = rng.normal(size=(splits, rows, columns)).astype(np.float32) if splits else None
    weight = rng.normal(size=columns).astype(np.float32)
    total = residual.astype(np.float64) + (partials.astype(np.float64).sum(0) if splits else 0)
    normed = total / np.sqrt((total**2).mean(-1, keepdims=True) + EPS) * weight
    arrays = [None if array is None else jnp.asarray(array) for array in (residual, partials, weight)]
    return arrays, total, normed


def check(rows: int, columns: int, splits: int, implementation: str) -> None:
    arrays, total, normed = problem(rows, columns, splits)
    out, out_normed = add_rms_norm(*arrays, eps=EPS, out_dtype=jnp.float16, implementation=implementation)
    assert (out.dtype, out_normed.dtype) == (jnp.float32, jnp.float16)
    assert relative_error(out, total) < 1e-6
    assert relative_error(out_normed, normed) < 5e-4


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("rows", "columns", "splits"), [(1, 64, 0), (7, 576, 1), (3, 100, 4), (60, 32, 2)])
def test_adds_partials_and_normalises(rows, columns, splits, implementation):
    check(rows, columns, splits, implementation)


def check_deferred(rows: int, columns: int, splits: int, implementation: str) -> None:
    arrays, total, normed = problem(rows, columns, splits)
    out, values, scale, peaks = add_rms_norm_deferred(*arrays, eps=EPS, out_dtype=jnp.float16, with_peaks=True,
                                                      implementation=implementation)
    assert (out.dtype, values.dtype) == (jnp.float32, jnp.float16)
    assert relative_error(out, total) < 1e-6
    assert (scale is None) == (implementation == "reference" or rows > 64)
    factor = 1 if scale is None else scale.values[:, None]
    assert relative_error(values.astype(jnp.float32) * factor, normed) < 5e-4
    assert (peaks is None) == (scale is None)
    if peaks is not None:
        np.testing.assert_array_equal(peaks.max(axis=1), jnp.abs(values).max(axis=1))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("rows", "columns", "splits"), [(1, 64, 0), (7, 576, 1), (3, 1300, 4), (65, 32, 2)])
def test_a_deferred_factor_makes_the_normalised_rows(rows, columns, splits, implementation):
    check_deferred(rows, columns, splits, implementation)


@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name != "reference"])
def test_what_a_deferred_factor_cannot_bring_back_is_no_number(implementation):
    rows = jnp.ones((2, 64)).at[1, 5].set(7e4)
    _, values, _, peaks = add_rms_norm_deferred(rows, None, jnp.ones(64), eps=EPS, out_dtype=jnp.float16, with_peaks=True,
                                                implementation=implementation)
    np.testing.assert_array_equal(np.argwhere(~np.isfinite(values)), [[1, 5]])
    np.testing.assert_array_equal(peaks, [[1], [np.inf]])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_row_without_a_norm_is_no_number_and_leaves_others_alone(value, reproducible, implementation):
    """The squares of 1e30 are infinite, and 1e30 times the reciprocal of their root would be 0."""
    rows = jnp.ones((3, 64)).at[1, 5].set(value)
    options = dict(eps=EPS, out_dtype=jnp.float32, reproducible=reproducible, implementation=implementation)
    _, normed = add_rms_norm(rows, None, jnp.ones(64), **options)
    _, scaled, scale, _ = add_rms_norm_deferred(rows, None, jnp.ones(64), **options)
    deferred = scaled if scale is None else scaled * scale.values[:, None]
    for found in (normed, deferred):
        assert np.isnan(found[1, 5]) and np.isnan(found[1, 0])
        np.testing.assert_allclose(found[::2], 1.0, rtol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_weight_that_takes_a_row_past_half_precision_makes_it_no_number(implementation):
    weight = jnp.ones(64).at[3].set(1e5)
    _, normed = add_rms_norm(jnp.ones((2, 64)), None, weight, eps=EPS, out_dtype=jnp.float16, implementation=implementation)
    np.testing.assert_array_equal(np.argwhere(np.isnan(normed)), [[0, 3], [1, 3]])


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [576, 1536, 4096, 8192])
@pytest.mark.parametrize("rows", [1, 8, 16, 30, 60, 64, 128])
def test_real_sizes_on_gpu(rows, columns):
    for splits in (0, 1, 8, 16):
        check(rows, columns, splits, "kernel")
        check_deferred(rows, columns, splits, "kernel")


@pytest.mark.parametrize("columns", [576, 4096, 8192])
@pytest.mark.parametrize("splits", [0, 1, 8])
def test_is_one_launch(columns, splits):
    shapes = [(60, columns)] + [(splits, 60, columns)] * bool(splits) + [(columns,)]

    def function(residual, *rest):
        partials, weight = rest if splits else (None, *rest)
        return add_rms_norm(residual, partials, weight, eps=EPS, out_dtype=jnp.float16, implementation="kernel")

    def deferred(residual, *rest):
        partials, weight = rest if splits else (None, *rest)
        return add_rms_norm_deferred(residual, partials, weight, eps=EPS, out_dtype=jnp.float16, implementation="kernel")

    def peaked(residual, *rest):
        partials, weight = rest if splits else (None, *rest)
        return add_rms_norm_deferred(residual, partials, weight, eps=EPS, out_dtype=jnp.float16, with_peaks=True,
                                     implementation="kernel")

    for each in (function, deferred, peaked):
        assert launches(cuda_text(each, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))) == 1


def test_names_the_offending_array():
    residual, weight = jnp.zeros((2, 8)), jnp.zeros(8)
    with pytest.raises(ValueError, match=r"residual is float16\[2, 8\]"):
        add_rms_norm(residual.astype(jnp.float16), None, weight, eps=EPS, out_dtype=jnp.float16)
    with pytest.raises(ValueError, match=r"partials have shape \[1, 3, 8\]; expected \[S, 2, 8\]"):
        add_rms_norm(residual, jnp.zeros((1, 3, 8)), weight, eps=EPS, out_dtype=jnp.float16)
    with pytest.raises(ValueError, match=r"weight is float32\[9\]; expected float32\[8\]"):
        add_rms_norm(residual, None, jnp.zeros(9), eps=EPS, out_dtype=jnp.float16)
