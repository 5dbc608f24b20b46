"""8-bit activations times 8-bit and 4-bit weights, against the papers' formulas in numpy's integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specmq_jax import formats
from specmq_jax.formats import ChannelInt4, ChannelInt8, TwoLevelInt4

SHAPES = [(128, 48), (192, 33), (256, 64)]
NAMES = ["w8a8", "w4a8-qqq", "w4a8-qqq-g128", "w4a8-qoq", "w4a8-qoq-g128"]


def logical(name: str, rows: int, columns: int):
    """A weight as a toolkit would store it, with every code and scales of both kinds."""
    rng = np.random.default_rng([rows, columns, NAMES.index(name)])
    scales = rng.uniform(0.01, 0.1, columns).astype(np.float32)
    q, groups = rng.integers(0, 16, (rows, columns)).astype(np.uint8), -(-rows // 128)
    if name == "w8a8":
        return ChannelInt8(rng.integers(-127, 128, (rows, columns)).astype(np.int8), scales)
    if name == "w4a8-qqq":
        return ChannelInt4(np.maximum(q, 1), scales, 8 * scales)
    if name == "w4a8-qoq":
        return ChannelInt4(q, scales, rng.integers(0, 16, columns).astype(np.float32) * scales)
    if name == "w4a8-qqq-g128":
        return TwoLevelInt4(q, rng.uniform(1, 17, (groups, columns)).astype(np.float16), None, scales, 128)
    steps = rng.integers(1, 16, (groups, columns)).astype(np.uint8)
    zeros = (-rng.integers(0, 9, (groups, columns)) * steps).astype(np.int16)
    return TwoLevelInt4(np.minimum(q, 8), steps, zeros, scales, 128)


def integers(weight) -> np.ndarray:
    """The integers that meet the activations, and for TwoLevelInt4 the rounding half to even."""
    if isinstance(weight, ChannelInt8):
        return weight.q.astype(np.int64)
    if isinstance(weight, ChannelInt4):
        return weight.q.astype(np.int64)
    scales = np.repeat(weight.group_scales.astype(np.float64), 128, axis=0)[:len(weight.q)]
    if weight.group_zeros is None:
        return np.clip(np.rint((weight.q.astype(np.float64) - 8) * scales), -128, 127).astype(np.int64)
    return (weight.q * scales).astype(np.int64) + np.repeat(weight.group_zeros, 128, axis=0)[:len(weight.q)]


def codes(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    largest = np.abs(x.astype(np.float32)).max(1, keepdims=True)
    steps = np.divide(np.float32(127), largest, where=largest != 0, out=np.zeros_like(largest))
    return np.rint(x.astype(np.float32) * steps).astype(np.int64), largest / np.float32(127)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_products_are_the_papers_formulas(name, shape):
    weight_format, weight = formats.get(name), logical(name, *shape)
    x = np.random.default_rng(3).normal(size=(5, shape[0])).astype(np.float16)
    x[2] = 0
    qa, row_scales = codes(x)
    sums = (qa @ integers(weight)).astype(np.float64)
    if isinstance(weight, TwoLevelInt4):
        expected = sums * weight.channel_scales * row_scales
    elif name == "w4a8-qqq":
        expected = (sums - 8 * qa.sum(1, keepdims=True)) * weight.scales * row_scales
    else:
        expected = sums * weight.scales * row_scales
        if name == "w4a8-qoq":
            expected -= qa.sum(1, keepdims=True) * row_scales * weight.offsets
    found = weight_format.matmul(jnp.asarray(x), weight_format.pack(weight)).sum(0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(found[2], 0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_toolkits_integers_survive_packing_exactly(name, shape):
    weight_format, weight = formats.get(name), logical(name, *shape)
    packed = weight_format.pack(weight)
    scale = weight.channel_scales if isinstance(weight, TwoLevelInt4) else weight.scales
    offset = weight.offsets if isinstance(weight, ChannelInt4) else 0
    expected = integers(weight).astype(np.float32) * scale - offset
    np.testing.assert_allclose(weight_format.unpack(packed, shape), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(weight.dense(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "bits", "group"), [
    ("w8a8", 8, None), ("w8a16", 8, None), ("w4a8-qqq", 4, None), ("w4a8-qqq-g128", 4, 128), ("w4a8-qoq", 4, None),
    ("w4a8-qoq-g128", 4, 128)])
def test_round_to_nearest_errs_by_about_half_a_step(name, bits, group, shape):
    weight_format = formats.get(name)
    values = np.random.default_rng(4).normal(size=shape).astype(np.float32)
    values[:, 3] = 0
    kept = np.asarray(weight_format.unpack(jax.jit(weight_format.pack)(values), shape))
    np.testing.assert_array_equal(kept[:, 3], 0)
    for start in range(0, shape[0], group or shape[0]):
        block = values[start:start + (group or shape[0])]
        # the second level adds half a step of its 8 bits
        step = np.abs(block).max(0) / (2 ** (bits - 1) - 1) + np.abs(values).max(0) / 119
        # the ends may be cut: +8 steps have no code, where -8 have one, and QoQ's steps are whole numbers
        at_an_end = (block > 0.8 * block.max(0)) | (block < 0.8 * block.min(0))
        allowed = np.where(at_an_end, 1.02, 0.51) * step + 1e-6
        assert np.all(np.abs(kept[start:start + len(block)] - block) <= allowed)


def test_a_factor_of_a_row_is_a_factor_of_its_product():
    """What lets a norm leave its factor to the reader of the product."""
    x = np.random.default_rng(5).normal(size=(3, 128)).astype(np.float32)
    for name in NAMES:
        weight_format = formats.get(name)
        packed = weight_format.pack(logical(name, 128, 48))
        once = weight_format.matmul(jnp.asarray(x), packed).sum(0)
        twice = weight_format.matmul(jnp.asarray(x * 4), packed).sum(0)
        np.testing.assert_allclose(twice, 4 * once, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_in_f32_keeps_the_numerics_of_its_integers(name):
    weight_format, shape = formats.get(name), (192, 33)
    packed = weight_format.pack(logical(name, *shape))
    in_f32, weight = formats.expanded(weight_format), formats.expand(weight_format, packed, shape)
    x = np.random.default_rng(6).normal(size=(4, 192)).astype(np.float16)
    found, expected = in_f32.matmul(jnp.asarray(x), weight), weight_format.matmul(jnp.asarray(x), packed)
    np.testing.assert_allclose(found.sum(0), expected.sum(0), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(in_f32.unpack(weight, shape), weight_format.unpack(packed, shape), rtol=1e-6, atol=1e-6)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), weight) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), in_f32.abstract(shape))


@pytest.mark.parametrize("name", ["fp16", "w4a16", "w8a16"])
def test_weights_of_half_precision_activations_are_expanded_to_values(name):
    assert formats.expanded(formats.get(name)) == formats.get("fp32")


@pytest.mark.parametrize("name", ["w8a16", "w8a8", "w4a8-qoq-g128", *(
    pytest.param(name, marks=pytest.mark.slow) for name in ("w4a8-qqq", "w4a8-qqq-g128", "w4a8-qoq"))])
def test_a_model_gives_the_same_logits_packed_and_expanded(name, tmp_path):
    """On a CPU a loaded model is expanded; the packed one is what a GPU runs."""
    from fakes import DATA

    import specmq_jax as sm
    from checkpoints_tools.conversion import convert

    directory = convert(DATA / "checkpoints" / "fp16", tmp_path / name, name)
    ids = [1, 5, 9, 33, 60]
    packed, in_f32 = (sm.logits(sm.load(directory, expand=expand), ids) for expand in (False, True))
    plain = sm.logits(sm.load(DATA / "checkpoints" / "fp16", expand=True), ids)
    # activations rounded to half precision first now and then get the neighbouring 8-bit code
    assert float(jnp.linalg.norm(packed - in_f32) / jnp.linalg.norm(in_f32)) < 0.03
    assert float(jnp.linalg.norm(in_f32 - plain) / jnp.linalg.norm(plain)) < (0.03 if name.startswith("w8") else 0.3)
    again = sm.load(DATA / "checkpoints" / "fp16", expand=True).with_precision(name)
    np.testing.assert_allclose(sm.logits(again, ids), in_f32, rtol=1e-3, atol=1e-3)
