"""The dense product against f64, and its bits against those of other numbers of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import IMPLEMENTATIONS, relative_error
from lowering import cuda_text, launches

from pallas_kernels.dense import Config, matmul_partials

EXACT = ["interpret", pytest.param("kernel", marks=pytest.mark.gpu)]
REAL = [(4096, 6144, False), (4096, 28672, False), (14336, 4096, False), (4096, 128256, False), (576, 960, False),
        (1536, 576, False), (576, 49152, True)]


def problem(rows: int, inner: int, columns: int, transposed: bool, dtype):
    """x, the weights, and their product in f64."""
    rng = np.random.default_rng([rows, inner, columns])
    x, weights = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((rows, inner), (inner, columns)))
    expected = np.asarray(x.astype(jnp.float32), np.float64) @ np.asarray(weights.astype(jnp.float32), np.float64)
    return x, weights.T if transposed else weights, expected


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(("shape", "dtype", "config"), [
    ((1, 64, 48), jnp.float16, None),
    ((7, 330, 100), jnp.bfloat16, Config(block_n=64, block_k=32, split_k=3)),
    ((60, 200, 17), jnp.float32, Config(block_n=16, block_k=16, split_k=2)),
    ((130, 96, 40), jnp.float16, Config(block_n=32, block_k=32)),
    ((60, 96, 40), jnp.float16, Config(block_n=32, block_k=32, slab=64)),
    ((33, 96, 40), jnp.bfloat16, Config(block_n=32, block_k=32, slab=32, split_k=2)),
])
def test_adds_up_to_the_product(shape, dtype, config, transposed, implementation):
    x, weights, expected = problem(*shape, transposed, dtype)
    partials = matmul_partials(x, weights, transposed=transposed, config=config, implementation=implementation)
    assert partials.dtype == jnp.float32
    assert relative_error(np.asarray(partials, np.float64).sum(0), expected) < 2e-6


def check_bits(inner: int, columns: int, transposed: bool, dtype, config: Config | None, implementation: str) -> None:
    x, weights, _ = problem(130, inner, columns, transposed, dtype)
    options = dict(transposed=transposed, reproducible=True, config=config, implementation=implementation)
    whole = np.asarray(matmul_partials(x, weights, **options))
    # each is a compilation, and the interpreter's take a second
    for rows in (1, 7, 33, 65) if implementation == "interpret" else (1, 2, 7, 16, 17, 33, 60, 64, 65):
        for first in (0, 5, 130 - rows):
            part = matmul_partials(x[first:first + rows], weights, **options)
            np.testing.assert_array_equal(part, whole[:, first:first + rows], err_msg=f"{rows} rows from {first}")


@pytest.mark.parametrize("implementation", EXACT)
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_a_row_has_the_same_bits_among_any_others(dtype, transposed, implementation):
    check_bits(200, 72, transposed, dtype, Config(block_n=32, block_k=32, split_k=2), implementation)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize(("inner", "columns", "transposed"), REAL)
def test_real_sizes_on_gpu(inner, columns, transposed, dtype):
    check_bits(inner, columns, transposed, dtype, None, "kernel")
    x, weights, expected = problem(60, inner, min(columns, 6144), transposed, dtype)
    for reproducible in (True, False):
        partials = matmul_partials(x, weights, transposed=transposed, reproducible=reproducible)
        assert relative_error(partials.sum(0), expected) < 1e-5


@pytest.mark.parametrize(("inner", "columns", "transposed"), [*REAL, (100, 70, True), (100, 70, False)])
def test_lowers_to_one_launch_that_shares_k_alike_for_any_rows(inner, columns, transposed):
    for dtype in (jnp.float16, jnp.float32):
        shares = set()
        for rows in (1, 60, 200):
            avals = (jax.ShapeDtypeStruct((rows, inner), dtype),
                     jax.ShapeDtypeStruct((columns, inner) if transposed else (inner, columns), dtype))

            def product(x, weights):
                return matmul_partials(x, weights, transposed=transposed, reproducible=True, implementation="kernel")

            assert launches(cuda_text(product, *avals)) == 1
            shares.add(jax.eval_shape(product, *avals).shape[0])
        assert len(shares) == 1


def test_names_the_offending_array():
    x = jnp.zeros((2, 8), jnp.float16)
    with pytest.raises(ValueError, match=r"x is int32\[2, 8\]"):
        matmul_partials(x.astype(jnp.int32), x.T)
    with pytest.raises(ValueError, match=r"weights are float16\[2, 8\]; expected float16\[8, N\]"):
        matmul_partials(x, x)
    with pytest.raises(ValueError, match=r"weights are float32\[2, 8\]; expected float16\[N, 8\]"):
        matmul_partials(x, x.astype(jnp.float32), transposed=True)


@pytest.mark.parametrize("fields", [{"block_n": 24}, {"block_k": 8}, {"split_k": 0}])
def test_config_names_the_offending_field(fields):
    [(name, value)] = fields.items()
    with pytest.raises(ValueError, match=f"{name} is {value}; expected"):
        Config(**fields)
