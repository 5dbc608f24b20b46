"""What top-k and top-p keep of a row, against a stable sort and sums in f64."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import IMPLEMENTATIONS
from lowering import cuda_text, launches

from pallas_kernels.nucleus import Config, least_kept

SMALL = Config(block=64, num_warps=1, launches=2, ways=4, last_block=128, last_warps=1)
SETTINGS = [(0, 1.0), (0, 0.9), (0, 0.5), (0, 1e-6), (0, 1e-40), (0, 0.99999), (1, 1.0), (1, 0.3), (5, 1.0), (20, 0.95),
            (20, 0.01), (50, 0.8), (10**9, 0.7), (299, 1.0), (299, 0.999)]


def problem(rows: int, columns: int, *, spread: float = 3.0, masked: float = 0.0, ties: bool = False) -> np.ndarray:
    """Scores whose best is 0, some of them -inf."""
    rng = np.random.default_rng(rows * columns)
    scores = rng.normal(size=(rows, columns)) * spread
    if ties:
        scores = np.round(scores * 2) / 2
    scores[rng.random(scores.shape) < masked] = -np.inf
    scores[:, columns // 3] = 0.0
    scores = scores.astype(np.float32)
    return scores - scores.max(1, keepdims=True)


def kept(scores: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Which of a row stay; a `top_p` below all leaves the best."""
    columns = len(scores)
    best = -np.sort(-scores.astype(np.float64))[:top_k if 0 < top_k < columns else columns]
    if top_p >= 1:
        return scores >= best[-1]
    shares = np.exp(best) / np.exp(best).sum()
    inside = np.cumsum(shares) - shares < top_p
    inside[0] = True
    return scores >= best[inside].min()


@functools.cache
def finder(config: Config | None, implementation: str) -> Callable:
    """Compiled once for all tests of a shape."""
    return jax.jit(functools.partial(least_kept, config=config, implementation=implementation))


def check(scores: np.ndarray, settings: list[tuple[int, float]], implementation: str, config: Config | None = None,
          rounding: float = 1e-6) -> None:
    """Each row with a setting of its own, all in one call; what a rounding of the sum decides may stay or not."""
    settings = [settings[i % len(settings)] for i in range(len(scores))]
    top_k, top_p = (jnp.asarray(values, dtype) for values, dtype in zip(zip(*settings, strict=True), "if", strict=True))
    least = np.asarray(finder(config, implementation)(jnp.asarray(scores), top_k, top_p))
    assert (least.dtype, least.shape) == (np.float32, (len(scores),))
    for row, (k, p), bound in zip(scores, settings, least, strict=True):
        found, margin = row >= bound, rounding if p < 1 else 0
        message = f"top_k={k}, top_p={p}: {found.sum()} stay"
        assert not (kept(row, k, p - margin) & ~found).any(), message
        assert not (found & ~kept(row, k, p + margin)).any(), message


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("columns", "config"), [(1, SMALL), (2, SMALL), (300, SMALL), (1030, SMALL), (4096, None)])
def test_keeps_what_the_definition_keeps(columns, config, implementation):
    check(problem(len(SETTINGS), columns), SETTINGS, implementation, config)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("spread", [
    1e-30, 30.0, *(pytest.param(spread, marks=pytest.mark.slow) for spread in (1e-9, 1e-3, 1e4, 1e30))])
def test_at_any_temperature(spread, implementation):
    check(problem(len(SETTINGS), 300, spread=spread), SETTINGS, implementation, SMALL)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", [{"ties": True}, {"masked": 0.5}, {"masked": 0.99}, {"ties": True, "masked": 0.9},
                                     {"spread": 0}], ids=str)
def test_equals_and_impossible_entries(options, implementation):
    check(problem(len(SETTINGS), 300, **options), SETTINGS, implementation, SMALL)


@pytest.mark.parametrize("launches", [0, 1, 3])
def test_no_number_of_launches_changes_what_stays(launches):
    config = Config(block=256, num_warps=1, launches=launches, ways=8, last_block=128, last_warps=1)
    check(problem(len(SETTINGS), 1030), SETTINGS, "interpret", config)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_gives_what_it_gives_alone(implementation):
    scores = jnp.asarray(problem(6, 1030))
    top_k, top_p = jnp.asarray([0, 40, 0, 40, 0, 9], jnp.int32), jnp.asarray([0.9, 0.9, 1, 1, 0.3, 0.99], jnp.float32)
    find = finder(SMALL, implementation)
    together = find(scores, top_k, top_p)
    alone = [find(scores[i:i + 1], top_k[i:i + 1], top_p[i:i + 1])[0] for i in range(6)]
    np.testing.assert_array_equal(together, jnp.stack(alone))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_settings_of_several_sequences(implementation):
    scores, top_k, top_p = jnp.asarray(problem(6, 515)), jnp.asarray([0, 7], jnp.int32), jnp.asarray([0.8, 0.9], jnp.float32)

    def one(scores, top_k, top_p):
        return least_kept(scores, *(jnp.broadcast_to(value, 3) for value in (top_k, top_p)), config=SMALL,
                          implementation=implementation)

    together = jax.jit(jax.vmap(one))(scores.reshape(2, 3, -1), top_k, top_p)
    every = least_kept(scores, jnp.repeat(top_k, 3), jnp.repeat(top_p, 3), config=SMALL, implementation=implementation)
    np.testing.assert_array_equal(together.ravel(), every)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ends_where_nothing_is_a_number(implementation):
    scores = jnp.asarray(problem(4, 300)).at[0].set(jnp.nan).at[1, 7].set(jnp.nan).at[2].set(-jnp.inf)
    top_k, top_p = jnp.asarray([5, 5, 5, 0], jnp.int32), jnp.full(4, 0.5)
    least = least_kept(scores, top_k, top_p, config=SMALL, implementation=implementation)
    assert least.shape == (4,)


def test_the_reference_needs_no_whole_sort_of_a_bounded_top_k():
    scores, top_k = jnp.asarray(problem(4, 300)), jnp.full(4, 20, jnp.int32)
    top_p = jnp.asarray([1, 0.9, 0.5, 0.1], jnp.float32)
    whole, few = (least_kept(scores, top_k, top_p, most=most, implementation="reference") for most in (0, 20))
    np.testing.assert_array_equal(whole, few)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (60, 128256), (512, 32000)])
def test_is_a_few_launches_and_no_sort(rows, columns):
    operands = [jax.ShapeDtypeStruct((rows, columns), jnp.float32), jax.ShapeDtypeStruct((rows,), jnp.int32),
                jax.ShapeDtypeStruct((rows,), jnp.float32)]
    each = [jax.ShapeDtypeStruct((4, *operand.shape), operand.dtype) for operand in operands]
    find = functools.partial(least_kept, implementation="kernel")
    for text in (cuda_text(find, *operands), cuda_text(jax.vmap(find), *each)):
        assert launches(text) == 3 and text.count("call @_narrow") == Config().launches  # equal ones are written once
        assert not any(name in text for name in ("chlo.top_k", "stablehlo.sort", "stablehlo.case", "stablehlo.while"))


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [8192, 32000, 49152, 128256])
@pytest.mark.parametrize("rows", [1, 8, 60])
def test_real_sizes_on_gpu(rows, columns):
    for options in ({}, {"spread": 0.7}, {"masked": 0.9}):
        for first in range(0, len(SETTINGS), rows):
            check(problem(rows, columns, **options), SETTINGS[first:] + SETTINGS[:first], "kernel", rounding=1e-5)


def test_names_the_offending_value():
    scores, top_k, top_p = jnp.zeros((2, 8)), jnp.zeros(2, jnp.int32), jnp.ones(2)
    with pytest.raises(ValueError, match=r"scores are float32\[8\]; expected float32\[M, V\]"):
        least_kept(scores[0], top_k, top_p)
    with pytest.raises(ValueError, match=r"scores are float16\[2, 8\]"):
        least_kept(scores.astype(jnp.float16), top_k, top_p)
    with pytest.raises(ValueError, match=r"top_k is int32\[1\]; expected int32\[2\]"):
        least_kept(scores, top_k[:1], top_p)
    with pytest.raises(ValueError, match=r"top_p is int32\[2\]; expected float32\[2\]"):
        least_kept(scores, top_k, top_k)
    with pytest.raises(ValueError, match="ways is 3; expected a power of two of at least 2"):
        Config(ways=3)
    with pytest.raises(ValueError, match="launches is -1; expected 0 or more"):
        Config(launches=-1)
