"""Rows rounded to 8 bits, and their products with 8-bit weights, against numpy's integers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import IMPLEMENTATIONS
from lowering import cuda_text, launches

from pallas_kernels.w8a8 import Config, matmul_partials, quantise_rows

LLAMA_8B = [(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)]
SMOLLM = [(576, 960), (576, 576), (576, 3072), (1536, 576)]


def problem(rows: int, inner: int, outputs: int):
    rng = np.random.default_rng([rows, inner, outputs])
    q = rng.integers(-127, 128, (rows, inner)).astype(np.int8)
    values = rng.integers(-128, 128, (outputs, inner)).astype(np.int8)
    row_scales, scales = (rng.uniform(0.01, 0.1, size).astype(np.float32) for size in (rows, outputs))
    # in the order of the product's definition, each step in f32
    exact = q.astype(np.float64) @ values.astype(np.float64).T  # exact there too, and faster
    return tuple(map(jnp.asarray, (q, row_scales, values, scales))), exact.astype(np.float32) * scales * row_scales[:, None]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(1, 576, 40), (7, 130, 33), (60, 256, 64), (200, 96, 20), (520, 96, 20)])
def test_an_unsplit_product_is_exact(shape, implementation):
    operands, expected = problem(*shape)
    found = matmul_partials(*operands, config=Config(block_m=128, block_n=32, block_k=64), implementation=implementation)
    assert found.shape == (1, *expected.shape)
    np.testing.assert_array_equal(found[0], expected)


@pytest.mark.parametrize("config", [Config(block_n=16, block_k=32, split_k=3), Config(split_k=2, num_warps=1), None])
def test_shares_add_up_to_the_product(config):
    operands, expected = problem(5, 1000, 48)
    partials = matmul_partials(*operands, config=config, implementation="interpret")
    np.testing.assert_allclose(partials.sum(0), expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_rows_are_rounded_half_to_even(dtype, implementation):
    x = np.random.default_rng(0).normal(size=(6, 300)).astype(np.float32)
    x[2] = 0
    x[3] = np.arange(300) / 2 - 75  # its largest value is 75, which is no code's half step
    x[4, :4] = 127, 0.5, 1.5, -2.5
    x[4, 4:] = 0
    x = jnp.asarray(x, dtype)
    codes, scales = quantise_rows(x, implementation=implementation)
    wanted_codes, wanted_scales = rounded(x)
    np.testing.assert_array_equal(codes, wanted_codes)
    np.testing.assert_array_equal(codes[4, :4], [127, 0, 2, -2])
    np.testing.assert_allclose(scales, wanted_scales, rtol=1e-7)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("sums", [None, -1, 128])
@pytest.mark.parametrize(("rows", "columns"), [(1, 100), (3, 1500), (2, 4096)])
def test_known_peaks_change_nothing(rows, columns, sums, implementation):
    check_known_peaks(rows, columns, sums, implementation)


def check_known_peaks(rows: int, columns: int, sums: int | None, implementation: str) -> None:
    x = np.random.default_rng(columns).normal(size=(rows, columns)).astype(np.float16)
    x[-1] *= rows == 1  # a row of zeros, where there are others
    peaks = jnp.stack([jnp.abs(part).max(axis=1) for part in jnp.array_split(jnp.asarray(x, jnp.float32), 3, axis=1)], axis=1)
    known = quantise_rows(jnp.asarray(x), peaks=peaks, sums=sums, implementation=implementation)
    wanted = quantise_rows(jnp.asarray(x), sums=sums, implementation=implementation)
    for found, expected in zip(known[:2], wanted[:2], strict=True):
        np.testing.assert_array_equal(found, expected)
    if sums is not None:
        found, expected = known[2], wanted[2]
        np.testing.assert_array_equal(found.sum(0) if sums == -1 else found, expected.sum(0) if sums == -1 else expected)


def rounded(x: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """By numpy, whose division rounds as IEEE 754 says; XLA's on a GPU may err in the last bit."""
    values = np.asarray(x, np.float32)
    largest = np.abs(values).max(1)
    steps = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest != 0)
    return np.rint(values * steps[:, None]), largest / np.float32(127)


@pytest.mark.parametrize(("inner", "outputs"), LLAMA_8B + SMOLLM + [(130, 17)])
def test_each_lowers_to_one_launch(inner, outputs):
    for rows, config in ((30, None), (300, Config(block_m=128))):
        avals = (jax.ShapeDtypeStruct((rows, inner), jnp.int8), jax.ShapeDtypeStruct((rows,), jnp.float32),
                 jax.ShapeDtypeStruct((outputs, inner), jnp.int8), jax.ShapeDtypeStruct((outputs,), jnp.float32))
        product = functools.partial(matmul_partials, config=config, implementation="kernel")
        assert launches(cuda_text(product, *avals)) == 1
    x = jax.ShapeDtypeStruct((30, inner), jnp.float16)
    assert launches(cuda_text(lambda x: quantise_rows(x, implementation="kernel"), x)) == 1
    peaks = jax.ShapeDtypeStruct((30, 5), jnp.float32)
    for sums in (None, -1, 128):
        rounding = functools.partial(quantise_rows, sums=sums, implementation="kernel")
        assert launches(cuda_text(lambda x, peaks, rounding=rounding: rounding(x, peaks=peaks), x, peaks)) == 1


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "inner", "outputs"), [
    (1, 4096, 6144), (8, 4096, 4096), (16, 576, 960), (30, 14336, 4096), (60, 4096, 28672), (64, 1536, 576), (128, 4096, 28672),
    (500, 14336, 4096)])
def test_real_sizes_on_gpu(rows, inner, outputs):
    operands, expected = problem(rows, inner, outputs)
    np.testing.assert_array_equal(matmul_partials(*operands, config=Config(), implementation="kernel")[0], expected)
    partials = matmul_partials(*operands, implementation="kernel")
    np.testing.assert_allclose(partials.sum(0), expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    x = jax.random.normal(jax.random.key(rows), (rows, inner), jnp.float16)
    for found, wanted in zip(quantise_rows(x, implementation="kernel"), rounded(x), strict=True):
        np.testing.assert_array_equal(found, wanted)
    for sums in (None, -1, 128):
        check_known_peaks(rows, inner, sums, "kernel")


def test_names_the_offending_array():
    (q, row_scales, values, scales), _ = problem(2, 64, 16)
    with pytest.raises(ValueError, match=r"values are int8\[16, 32\]; expected int8\[N, 64\]"):
        matmul_partials(q, row_scales, values[:, :32], scales)
    with pytest.raises(ValueError, match=r"scales are float32\[15\]; expected float32\[16\]"):
        matmul_partials(q, row_scales, values, scales[:15])
    with pytest.raises(ValueError, match=r"q is int8\[2, 64\] with scales float32\[1\]"):
        matmul_partials(q, row_scales[:1], values, scales)
    with pytest.raises(ValueError, match=r"x is int8\[2, 64\]; expected float16"):
        quantise_rows(q)
    with pytest.raises(ValueError, match=r"peaks are float32\[3, 1\]; expected float32\[2, C\]"):
        quantise_rows(jnp.zeros((2, 64)), peaks=jnp.zeros((3, 1)))


@pytest.mark.parametrize("fields", [{"block_m": 48}, {"block_n": 24}, {"block_k": 16}, {"split_k": 0}])
def test_config_names_the_offending_field(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))} is {next(iter(fields.values()))}; expected"):
        Config(**fields)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("inner", "outputs"), [(600, 70), pytest.param(4096, 6144, marks=pytest.mark.slow)])
def test_reproducible_rows_have_the_same_bits_in_every_block_of_rows(inner, outputs, implementation):
    (q, row_scales, *weight), _ = problem(512, inner, outputs)
    product = functools.partial(matmul_partials, implementation=implementation, reproducible=True)
    whole = product(q, row_scales, *weight)
    for rows in (slice(0, 1), slice(60, 124), slice(200, 460)):
        np.testing.assert_array_equal(product(q[rows], row_scales[rows], *weight), whole[:, rows])
