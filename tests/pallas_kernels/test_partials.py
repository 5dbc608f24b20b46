"""Partial sums in half precision: those of f32, rounded, and no numbers where they leave f16's range."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import IMPLEMENTATIONS

from experiments.kernels import cases
from pallas_kernels import w4a8, w8a8

ROWS, INNER, OUTPUTS = 5, 300, 48


def product(kind: str, factor: float, rows: int = ROWS):
    """A function of `halves` and `implementation` that multiplies, with scales of `factor` times the usual."""
    of_x, of_weights, of_scales = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(of_x, (rows, INNER), jnp.float16)
    scales = factor * jax.random.uniform(of_scales, (OUTPUTS,), minval=0.01, maxval=0.02)
    if kind == "w8a8":
        values = jax.random.bits(of_weights, (OUTPUTS, INNER), jnp.uint8).view(jnp.int8)
        return functools.partial(w8a8.matmul_partials, *w8a8.quantise_rows(x), values, scales)
    codes = jax.random.randint(of_weights, (INNER, OUTPUTS), 0, 16).astype(jnp.uint8)
    packed, zeros, groups = w4a8.pack(codes.T), "qoq" in kind, -(-INNER // w4a8.BLOCK)
    rows_given = w8a8.quantise_rows(x, sums=w4a8.BLOCK if kind.endswith("-g128") else -1)
    if not kind.endswith("-g128"):
        return functools.partial(w4a8.channel_partials, *rows_given, packed, scales, scales * 7 if zeros else None)
    group_scales = jnp.full((groups, OUTPUTS), 5, jnp.uint8 if zeros else jnp.float16)
    words = w4a8.pack_groups(group_scales, jnp.full((groups, OUTPUTS), -35, jnp.int16) if zeros else None)
    saturates = None if zeros else jnp.zeros(1, jnp.int32)
    return functools.partial(w4a8.group_partials, *rows_given, packed, words, scales, saturates)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", cases.INTEGER_KINDS)
def test_halves_are_the_rounded_sums(kind, implementation):
    multiply = product(kind, 1.0)
    sums, halves = (multiply(halves=halves, implementation=implementation) for halves in (False, True))
    assert (sums.dtype, halves.dtype) == (jnp.float32, jnp.float16)
    np.testing.assert_array_equal(halves, sums.astype(jnp.float16))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", cases.INTEGER_KINDS)
def test_halves_beyond_the_range_are_no_numbers(kind, implementation):
    multiply = product(kind, 4e4 if kind.startswith("w4") else 2e3)
    sums, halves = (multiply(halves=halves, implementation=implementation) for halves in (False, True))
    assert float(jnp.abs(sums).max()) > 65536
    np.testing.assert_array_equal(halves, jnp.where(jnp.abs(sums) <= 65504, sums, jnp.nan).astype(jnp.float16))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_row_that_is_not_finite_has_no_scale(value, known, implementation):
    x = jnp.ones((3, 256), jnp.float16).at[1, 200].set(value)
    peaks = jnp.asarray([[1, 1], [1, jnp.inf], [1, 1]], jnp.float32) if known else None
    _, scales = w8a8.quantise_rows(x, peaks=peaks, implementation=implementation)
    np.testing.assert_allclose(scales, [1 / 127, jnp.nan, 1 / 127], rtol=1e-6)


@pytest.mark.parametrize("kind", cases.INTEGER_KINDS)
def test_more_rows_than_the_kernel_takes(kind):
    multiply = product(kind, 1.0, rows=150)
    sums, halves = (multiply(halves=halves, implementation="interpret") for halves in (False, True))
    assert halves.dtype == jnp.float16
    np.testing.assert_allclose(halves, sums, rtol=2e-3, atol=1e-2)
