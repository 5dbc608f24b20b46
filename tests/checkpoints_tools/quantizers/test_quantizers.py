"""GPTQ and SmoothQuant as their papers define them, and codes that mean in a format what the quantiser took them for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints_tools.quantizers.gptq import Gptq, inverse_factor
from checkpoints_tools.quantizers.grids import grid_of
from specmq_jax import formats
from specmq_jax.errors import UserError
from specmq_jax.formats import DenseFormat

QUANTISED = [name for name in formats.names() if not isinstance(formats.get(name), DenseFormat)]
TWO_LEVELS = ["w4a8-qqq-g128", "w4a8-qoq-g128"]


def layer(rows: int, columns: int, *, samples: int = 2000, seed: int = 0):
    """Correlated inputs of uneven size, f64[samples, K], and a weight f32[K, N] with some outliers."""
    rng = np.random.default_rng(seed)
    mixing = np.eye(rows) + rng.standard_normal((rows, rows)) * rows**-0.5
    x = rng.standard_normal((samples, rows)) @ mixing * np.exp(0.7 * rng.standard_normal(rows))
    weight = rng.standard_normal((rows, columns)) * 0.05
    weight[rng.integers(0, rows, columns), np.arange(columns)] *= 6
    return x, weight.astype(np.float32)


def hessian_of(x):
    return jnp.asarray(x.T @ x / len(x), jnp.float32)


def output_error(x, weight, found) -> float:
    return np.linalg.norm(x @ (np.asarray(found, np.float64) - weight)) / np.linalg.norm(x @ weight)


def stored(weight_format, logical, shape) -> np.ndarray:
    return np.asarray(weight_format.unpack(weight_format.pack(logical), shape))


@pytest.mark.parametrize(("name", "act_order"), [(name, True) for name in QUANTISED] +
                         [pytest.param(name, False, marks=pytest.mark.slow if name != "w4a16" else ())
                          for name in ("w4a16", "w4a16-g32", "w8a8", *TWO_LEVELS)])
def test_gptq_errs_less_than_rounding_to_nearest_and_the_format_multiplies_by_what_it_chose(name, act_order):
    (x, weight), weight_format = layer(192, 48), formats.get(name)
    logical = Gptq(act_order=act_order).quantise(jnp.asarray(weight), hessian_of(x), grid_of(weight_format))
    found = stored(weight_format, logical, weight.shape)
    np.testing.assert_allclose(found, logical.dense(), rtol=2e-6, atol=1e-7)
    assert output_error(x, weight, found) < 0.85 * output_error(x, weight, stored(weight_format, weight, weight.shape))
    assert getattr(logical, "order", None) is None
    if name in TWO_LEVELS:
        integers = np.asarray(logical.integers())
        assert integers.min() >= -128 and integers.max() <= 127 and np.array_equal(integers, np.round(integers))


@pytest.mark.parametrize("name", QUANTISED)
def test_a_grids_values_are_those_that_its_format_unpacks(name):
    """The error that GPTQ passes on is computed from `value`, so it has to be the stored value to the last bits."""
    weight_format, (_, weight) = formats.get(name), layer(256, 40)
    grid, rng = grid_of(weight_format), np.random.default_rng(1)
    size = 256 if grid.group_size == -1 else grid.group_size
    grouped = jnp.asarray(weight).reshape(-1, size, 40)
    channel = grid.channel(grouped)
    levels = grid.level(grouped, channel, jnp.float32(0.9))
    rows = jax.tree.map(lambda part: jnp.repeat(part, size, axis=0), levels)
    values = jnp.asarray(weight + 0.02 * rng.standard_normal(weight.shape), jnp.float32)
    codes = grid.codes(values, rows, channel)
    expected = grid.value(codes, rows, channel)
    found = stored(weight_format, grid.logical(np.asarray(codes), levels, np.asarray(channel)), weight.shape)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-7)


def algorithm_1(weight, hessian, group_size, damping, order):
    """The paper's Algorithm 1 for W4A16 in numpy's f64, without lazy batches, with levels of each group's whole range."""
    rows, columns = weight.shape
    damped = hessian + damping * np.mean(np.diag(hessian)) * np.eye(rows)
    upper = np.linalg.cholesky(np.linalg.inv(damped[order][:, order])).T
    left, codes = weight[order].astype(np.float64), np.zeros((rows, columns))
    size = rows if group_size == -1 else group_size
    steps = np.zeros((-(-rows // size), columns))

    def step(values):
        largest = np.take_along_axis(values, np.abs(values).argmax(0)[None], 0)[0]
        return (largest / -8).astype(np.float16).astype(np.float64)

    natural = np.array_equal(order, np.arange(rows))
    for group in range(len(steps)):
        steps[group] = step(weight[group * size:(group + 1) * size])
    for i in range(rows):
        group = order[i] // size
        if natural and group_size != -1 and i % size == 0:
            steps[group] = step(left[i:i + size])
        codes[i] = np.clip(np.round(left[i] / steps[group]) + 8, 0, 15)
        error = (left[i] - (codes[i] - 8) * steps[group]) / upper[i, i]
        left[i:] -= np.outer(upper[i, i:], error)
    found = np.zeros_like(codes)
    found[order] = codes
    return found, steps


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("name", "rows"), [("w4a16-g64", 160), ("w4a16", 320), ("w4a16-channel", 192)])
def test_gptq_is_the_papers_algorithm(name, rows, act_order):
    x, weight = layer(rows, 24)
    weight_format, hessian = formats.get(name), hessian_of(x)
    exact = np.asarray(hessian, np.float64)
    order = np.argsort(-np.diag(exact), kind="stable") if act_order else np.arange(rows)
    codes, steps = algorithm_1(weight, exact, weight_format.group_size, 0.01, order)
    found = Gptq(act_order=act_order, search=False).quantise(jnp.asarray(weight), hessian, grid_of(weight_format))
    # f32 against f64: a value halfway between two codes may fall either way, and what follows it in its column with it
    same = (found.q == codes).all(axis=0)
    assert same.mean() > 0.9
    np.testing.assert_allclose(np.asarray(found.scales, np.float64)[:, same], steps[:, same], rtol=1e-3)
    meant = (codes - 8) * np.repeat(steps, rows if weight_format.group_size == -1 else weight_format.group_size, 0)[:rows]
    assert output_error(x, weight, found.dense()) == pytest.approx(output_error(x, weight, meant), rel=0.02)


def test_act_order_rounds_the_heaviest_inputs_first_and_stores_rows_in_place():
    """Static groups: each row has the scale of the group it stands in, whatever the order it was rounded in."""
    x, weight = layer(128, 16)
    heaviest = int(np.argmax((x**2).sum(axis=0)))
    grid = grid_of(formats.get("w4a16-g32"))
    found = Gptq(search=False).quantise(jnp.asarray(weight), hessian_of(x), grid)
    levels = grid.level(jnp.asarray(weight).reshape(4, 32, 16), jnp.ones(16), jnp.float32(1))
    np.testing.assert_array_equal(found.scales, levels.step)
    # no error has reached the first row, so its codes are those of rounding to nearest
    expected = np.clip(np.round(weight[heaviest] / found.scales[heaviest // 32].astype(np.float32)) + 8, 0, 15)
    np.testing.assert_array_equal(found.q[heaviest], expected)


def test_the_factor_is_the_cholesky_factor_of_the_inverse():
    x, _ = layer(200, 1)
    hessian = hessian_of(x)
    order = np.random.default_rng(0).permutation(200)
    with jax.enable_x64(True):
        found = inverse_factor(hessian, jnp.asarray(order, jnp.int32), np.float64(0.01))
    exact = np.asarray(hessian, np.float64)[order][:, order]
    exact += 0.01 * np.mean(np.diag(exact)) * np.eye(200)
    np.testing.assert_allclose(found, np.linalg.cholesky(np.linalg.inv(exact)).T, rtol=1e-5, atol=1e-5)


def test_inputs_that_are_always_zero_are_rounded_to_nearest():
    x, weight = layer(96, 20)
    x[:, [3, 40, 95]] = 0
    grid = grid_of(formats.get("w4a16-g32"))
    found = Gptq(search=False).quantise(jnp.asarray(weight), hessian_of(x), grid)
    for row in (3, 40, 95):
        step = found.scales[row // 32].astype(np.float32)
        np.testing.assert_array_equal(found.q[row], np.clip(np.round(weight[row] / step) + 8, 0, 15))
    assert output_error(x, weight, found.dense()) < output_error(x, weight, stored(formats.get("w4a16-g32"), weight, (96, 20)))


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_fewer_samples_than_inputs_take_more_damping(damping):
    x, weight = layer(128, 16, samples=20)
    found = Gptq(damping=damping).quantise(jnp.asarray(weight), hessian_of(x), grid_of(formats.get("w4a16")))
    assert output_error(x, weight, found.dense()) < output_error(x, weight, stored(formats.get("w4a16"), weight, (128, 16)))


def test_inputs_that_are_not_finite_are_one_line():
    _, weight = layer(64, 8)
    with pytest.raises(UserError, match="inputs of a layer are not finite"):
        Gptq().quantise(jnp.asarray(weight), jnp.full((64, 64), jnp.nan), grid_of(formats.get("w8a8")))


@pytest.mark.parametrize("name", ["w4a16-g32", "w8a8", "w4a8-qqq", "w4a8-qoq", *TWO_LEVELS])
def test_searched_levels_err_less_than_those_of_the_whole_range(name):
    x, weight = layer(128, 32)
    grid, importance = grid_of(formats.get(name)), jnp.asarray((x**2).mean(axis=0), jnp.float32)
    values = jnp.asarray(weight)
    if grid.group_size not in (-1, 128):
        values, importance = values[:grid.group_size], importance[:grid.group_size]
    channel = grid.channel(values[None])

    def errors(level):
        off = grid.value(grid.codes(values, level, channel), level, channel) - values
        return np.asarray((importance[:, None] * off**2).sum(0))

    whole, best = errors(grid.level(values, channel, jnp.float32(1))), errors(grid.search(values, importance, channel))
    assert (best <= whole).all() and best.sum() < 0.97 * whole.sum()


def test_qoq_keeps_eight_bits_where_later_rows_leave_their_groups_range():
    """Errors passed on may push a row outside what its group's step was made for; w8 must not wrap (arXiv:2405.04532)."""
    grid = grid_of(formats.get("w4a8-qoq-g128"))
    values = np.zeros((1, 128, 2), np.float32)
    values[0, :2] = [[119, 1], [-119, -119]]
    channel = grid.channel(jnp.asarray(values))
    level = grid.level(jnp.asarray(values[0]), channel, jnp.float32(1))
    for far in (-1000.0, 1000.0):
        codes = grid.codes(jnp.full((1, 2), far), level, channel)
        integers = (codes - level.zero) * level.step
        assert integers.min() >= -128 and integers.max() <= 127
        assert (np.abs(np.asarray(integers[0, 0])) > 100).all()


def test_recipes_hash_by_value():
    """They are static arguments of jitted functions."""
    assert hash(Gptq()) == hash(dataclasses.replace(Gptq(), damping=0.01))
    assert grid_of(formats.get("w4a16")) == grid_of(formats.get("w4a16-g128"))
