"""The best of a log-softmax, and of a few values, against a stable sort and the formula in f64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import IMPLEMENTATIONS
from lowering import cuda_text, launches

from pallas_kernels.top_k import Config, log_softmax_top_k, ranks, top_k_small

SMALL = Config(block=64, num_warps=1, combine_warps=1)
LIBRARY = "chlo.top_k", "stablehlo.sort", "stablehlo.scatter"


def problem(rows: int, columns: int, *, masked: float = 0.0) -> np.ndarray:
    """Logits that tie often and otherwise differ by far more than a rounding, a share `masked` of them -inf."""
    rng = np.random.default_rng(rows * columns)
    logits = np.round(rng.normal(size=(rows, columns)) * 24) / 8
    logits[rng.random(logits.shape) < masked] = -np.inf
    logits[:, -1] = 1.0
    return logits


def check(logits: np.ndarray, k: int, implementation: str, *, dtype: jnp.dtype = jnp.float32,
          config: Config | None = None) -> None:
    scores, indices = log_softmax_top_k(jnp.asarray(logits, dtype), k, config=config, implementation=implementation)
    assert (scores.dtype, indices.dtype, scores.shape) == (jnp.float32, jnp.int32, (len(logits), k))
    expected = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(indices, expected)
    largest = logits.max(1, keepdims=True)
    log_sum = largest + np.log(np.exp(logits - largest).sum(1, keepdims=True))
    np.testing.assert_allclose(scores, np.take_along_axis(logits, expected, 1) - log_sum, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("rows", "columns", "k", "config"), [
    (1, 1, 1, None), (1, 7, 7, None), (10, 4096, 10, None), (10, 2500, 10, None), (60, 515, 4, None), (2, 1030, 64, None),
    (3, 515, 10, SMALL), (10, 64, 64, SMALL), (2, 65, 64, SMALL), (1, 300, 1, SMALL)])
def test_equals_a_stable_sort_of_the_log_softmax(rows, columns, k, config, implementation):
    check(problem(rows, columns), k, implementation, config=config)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_impossible_entries_come_last_and_in_order(implementation):
    check(problem(4, 300, masked=0.5), 64, implementation, config=SMALL)
    check(problem(4, 300, masked=0.99), 64, implementation, config=SMALL)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_of_equals_gives_its_first(implementation):
    signs = np.where(np.arange(200) % 3, 0.0, -0.0)
    check(np.stack([np.full(200, -2.0), signs]), 10, implementation, config=SMALL)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_narrow_logits_are_scored_in_f32(dtype, implementation):
    check(problem(3, 515), 10, implementation, dtype=dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_more_than_the_kernel_takes_is_found_too(implementation):
    check(problem(2, 515), 65, implementation)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1, 4, 8, 10])
@pytest.mark.parametrize("columns", [8192, 32768, 49152, 128256])
@pytest.mark.parametrize("rows", [1, 10])
def test_real_sizes_on_gpu(rows, columns, k):
    check(problem(rows, columns), k, "kernel")
    check(problem(rows, columns, masked=0.9), k, "kernel")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize(("rows", "columns", "k"), [(1, 1, 1), (10, 8192, 10), (10, 128256, 10), (60, 49152, 64)])
def test_is_two_launches(rows, columns, k, dtype):
    text = cuda_text(lambda logits: log_softmax_top_k(logits, k, implementation="kernel"),
                     jax.ShapeDtypeStruct((rows, columns), dtype))
    assert launches(text) == 2
    assert not any(name in text for name in LIBRARY)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("count", [1, 2, 100, 510, 1034])
def test_few_values_are_ordered_as_by_lax_top_k(count, implementation):
    rng = np.random.default_rng(count)
    for values in (rng.normal(size=count), np.round(rng.normal(size=count)), np.full(count, -np.inf),
                   rng.choice([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-45], size=count)):
        values = jnp.asarray(values, jnp.float32)
        expected, sequence = jax.lax.top_k(values, count)
        assert ranks(values, implementation=implementation)[sequence].tolist() == list(range(count))
        for k in sorted({1, min(10, count), min(59, count), count}):
            best, indices = top_k_small(values, k, implementation=implementation)
            assert (best.dtype, indices.dtype) == (jnp.float32, jnp.int32)
            np.testing.assert_array_equal(indices, sequence[:k])
            np.testing.assert_array_equal(np.asarray(best).view(np.int32), np.asarray(expected[:k]).view(np.int32))


def test_few_values_on_a_gpu_need_no_library():
    text = cuda_text(lambda values: top_k_small(values, 10, implementation="kernel"), jax.ShapeDtypeStruct((100,), jnp.float32))
    assert not any(name in text for name in (*LIBRARY, "custom_call"))


def test_names_the_offending_value():
    logits = jnp.zeros((2, 8))
    with pytest.raises(ValueError, match=r"logits are float32\[8\]; expected float32, float16 or bfloat16\[M, V\]"):
        log_softmax_top_k(logits[0], 1)
    with pytest.raises(ValueError, match=r"logits are int32\[2, 8\]"):
        log_softmax_top_k(logits.astype(jnp.int32), 1)
    for k in (0, 9):
        with pytest.raises(ValueError, match=f"k is {k}; expected 1 to 8"):
            log_softmax_top_k(logits, k)
        with pytest.raises(ValueError, match=f"k is {k}; expected 1 to 8"):
            top_k_small(logits[0], k)
    with pytest.raises(ValueError, match="block is 4; expected at least k, 5"):
        log_softmax_top_k(logits, 5, config=Config(block=4), implementation="interpret")
    with pytest.raises(ValueError, match="block is 3; expected a power of two"):
        Config(block=3)
    with pytest.raises(ValueError, match=r"values are float16\[8\]; expected float32\[C\]"):
        ranks(logits[0].astype(jnp.float16))
