"""Products of half-precision rows with 8-bit weights against f64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import IMPLEMENTATIONS, relative_error
from lowering import cuda_text, launches

from pallas_kernels.w8a16 import Config, matmul_partials

LLAMA_8B = [(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096), (4096, 128256)]
SMOLLM = [(576, 960), (576, 576), (576, 3072), (1536, 576)]


def problem(rows: int, inner: int, outputs: int):
    """x, values and scales, and the product in f64; values take all of a byte's numbers."""
    rng = np.random.default_rng([rows, inner, outputs])
    x = rng.normal(size=(rows, inner)).astype(np.float16)
    values = rng.integers(-128, 128, (outputs, inner)).astype(np.int8)
    values.flat[:256] = np.arange(-128, 128)[:values.size]
    scales = rng.uniform(-0.1, 0.1, outputs).astype(np.float32)
    expected = x.astype(np.float64) @ values.astype(np.float64).T * scales
    return tuple(map(jnp.asarray, (x, values, scales))), expected


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("config", [
    Config(block_n=32, block_k=64, split_k=3), Config(block_m=128, num_warps=1, least_rows=16), None])
@pytest.mark.parametrize("shape", [(1, 576, 40), (7, 130, 33), (60, 1000, 64), (65, 256, 20), (150, 96, 24), (520, 128, 20)])
def test_the_shares_add_up_to_the_product(shape, config, implementation):
    operands, expected = problem(*shape)
    partials = matmul_partials(*operands, config=config, implementation=implementation)
    assert partials.dtype == jnp.float32 and partials.shape[1:] == expected.shape
    assert relative_error(partials.sum(0), expected) < 2e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_code_is_the_number_it_stands_for(implementation):
    values = jnp.arange(-128, 128, dtype=jnp.int8).reshape(4, 64)
    x = jnp.eye(64, dtype=jnp.float16)
    found = matmul_partials(x, values, jnp.ones(4), config=Config(block_n=16), implementation=implementation)
    np.testing.assert_array_equal(found.sum(0).T, np.arange(-128, 128).reshape(4, 64))


TENSOR_CORE_SUMS = 5e-5
"""The tensor core truncates its f32 sums, here of up to 14336 products, where IEEE addition rounds them."""


@pytest.mark.gpu
@pytest.mark.parametrize("inline_asm", [True, False])
@pytest.mark.parametrize(("inner", "outputs"), LLAMA_8B + SMOLLM)
def test_every_form_of_the_kernel_on_gpu(inner, outputs, inline_asm):
    rng = np.random.default_rng(0)
    values = jnp.asarray(rng.integers(-128, 128, (outputs, inner), dtype=np.int8))
    scales = jnp.asarray(rng.uniform(0.01, 0.1, outputs), jnp.float32)
    sample = np.unique(np.r_[:64, outputs - 64:outputs, rng.integers(0, outputs, 128)])
    weights = np.asarray(values[sample], np.float64).T * np.asarray(scales[sample], np.float64)
    for rows in (1, 8, 16, 30, 60, 64, 100, 256, 520):
        x = jnp.asarray(rng.normal(size=(rows, inner)), jnp.float16)
        expected = np.asarray(x, np.float64) @ weights
        for block_m, block_n, block_k, split_k, num_warps in [(64, 32, 64, 3, 1), (64, 64, 128, 1, 4), (128, 128, 64, 2, 8)]:
            config = Config(block_m=block_m, block_n=block_n, block_k=block_k, split_k=split_k, num_warps=num_warps,
                            inline_asm=inline_asm)
            found = matmul_partials(x, values, scales, config=config).sum(0)[:, sample]
            assert relative_error(found, expected) < TENSOR_CORE_SUMS, (rows, config)
        assert relative_error(matmul_partials(x, values, scales).sum(0)[:, sample], expected) < TENSOR_CORE_SUMS, rows


@pytest.mark.gpu
def test_reproducible_rows_have_the_same_bits_in_every_block_of_rows_on_gpu():
    (x, values, scales), _ = problem(500, 600, 70)
    whole = matmul_partials(x, values, scales, reproducible=True)
    for rows in (slice(0, 1), slice(30, 90), slice(99, 100), slice(200, 460)):
        np.testing.assert_array_equal(matmul_partials(x[rows], values, scales, reproducible=True), whole[:, rows])


@pytest.mark.parametrize("inline_asm", [True, False])
@pytest.mark.parametrize(("inner", "outputs"), LLAMA_8B + SMOLLM + [(130, 17)])
def test_lowers_to_one_launch(inner, outputs, inline_asm):
    for rows in (1, 16, 60, 300):
        avals = (jax.ShapeDtypeStruct((rows, inner), jnp.float16), jax.ShapeDtypeStruct((outputs, inner), jnp.int8),
                 jax.ShapeDtypeStruct((outputs,), jnp.float32))
        text = cuda_text(lambda *operands: matmul_partials(*operands, config=Config(inline_asm=inline_asm),
                                                           implementation="kernel"), *avals)
        assert launches(text) == 1


def test_names_the_offending_array():
    (x, values, scales), _ = problem(2, 64, 16)
    with pytest.raises(ValueError, match=r"x is float32\[2, 64\]; expected float16 \[M, K\]"):
        matmul_partials(x.astype(jnp.float32), values, scales)
    with pytest.raises(ValueError, match=r"values are int8\[16, 32\]; expected int8\[N, 64\]"):
        matmul_partials(x, values[:, :32], scales)
    with pytest.raises(ValueError, match=r"scales are float32\[15\]; expected float32\[16\]"):
        matmul_partials(x, values, scales[:15])


@pytest.mark.parametrize("fields", [{"block_m": 48}, {"block_n": 24}, {"block_k": 16}, {"split_k": 0}, {"least_rows": 4}])
def test_config_names_the_offending_field(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))} is {next(iter(fields.values()))}; expected"):
        Config(**fields)
