"""A weight that its format can't hold is refused in one line, whoever packs it; what it can hold is kept."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from fakes import tiny_config

import specmq_jax as sm
from specmq_jax import UserError, formats
from specmq_jax.formats import ChannelInt4, ChannelInt8, GroupedInt4, TwoLevelInt4, peak

ROWS, COLUMNS = 256, 32
HALF = [name for name in formats.names() if name == "fp16" or name.startswith("w4a16")]
NOT_FINITE = [np.nan, np.inf, -np.inf]


def values() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(ROWS, COLUMNS)).astype(np.float32)


def quantised(name: str):
    """Integers and scales that a format stores as they are."""
    rng = np.random.default_rng(1)
    q, scales = rng.integers(0, 16, (ROWS, COLUMNS)).astype(np.uint8), rng.random(COLUMNS).astype(np.float32)
    groups = rng.random((2, COLUMNS)).astype(np.float32)
    made = {"w4a16": GroupedInt4(q, groups, 128), "w4a16-channel": GroupedInt4(q, groups[:1], -1),
            "w4a16-act-order": GroupedInt4(q, groups, 128, rng.permutation(ROWS).astype(np.int32)),
            "w8a8": ChannelInt8(q.astype(np.int8), scales), "w8a16": ChannelInt8(q.astype(np.int8), scales),
            "w4a8-qqq": ChannelInt4(q, scales, 8 * scales), "w4a8-qoq": ChannelInt4(q, scales, 3 * scales),
            "w4a8-qqq-g128": TwoLevelInt4(q, groups.astype(np.float16), None, scales, 128),
            "w4a8-qoq-g128": TwoLevelInt4(q, np.full((2, COLUMNS), 9, np.uint8), np.full((2, COLUMNS), -9, np.int16), scales,
                                          128)}
    return made[name]


PARTS = [(name, part) for name, parts in {
    "w4a16": ["scales"], "w4a16-channel": ["scales"], "w4a16-act-order": ["scales"], "w8a8": ["scales"], "w8a16": ["scales"],
    "w4a8-qqq": ["scales", "offsets"], "w4a8-qoq": ["scales", "offsets"], "w4a8-qqq-g128": ["group_scales", "channel_scales"],
    "w4a8-qoq-g128": ["channel_scales"]}.items() for part in parts]


def refused(weight_format, weight, text):
    with pytest.raises(UserError) as caught:
        weight_format.pack(weight)
    assert text in str(caught.value) and str(caught.value).startswith("the weight ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", formats.names())
def test_plain_values_that_are_not_finite_are_refused(name):
    for wrong in NOT_FINITE:
        weight = values()
        weight[200, 7] = wrong
        for held in (weight, jnp.asarray(weight)):
            refused(formats.get(name), held, "holds values that are not finite")


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_a_scale_or_offset_that_is_not_finite_is_refused(name, part):
    for wrong in NOT_FINITE:
        weight = quantised(name)
        spoilt = getattr(weight, part).copy()
        spoilt[..., 5] = wrong
        for target in (name, "fp32", "w8a8"):
            refused(formats.get(target), dataclasses.replace(weight, **{part: spoilt}), f"has {part} that are not finite")


@pytest.mark.parametrize("name", HALF)
def test_values_beyond_half_precision_are_refused_where_they_would_be_held_in_it(name):
    weight_format, weight = formats.get(name), values()
    weight[3, 4] = 65519  # rounds to the largest number
    assert np.isfinite(np.asarray(weight_format.unpack(weight_format.pack(weight), weight.shape), np.float16)).all()
    weight[3, 4] = -65536
    refused(weight_format, weight, "beyond the range of float16; choose --precision=bf16 or fp32")
    refused(weight_format, 1e-7 * values(), "below the range of float16; choose --precision=bf16 or fp32")
    np.testing.assert_array_equal(weight_format.unpack(weight_format.pack(0 * values()), weight.shape), 0)


@pytest.mark.parametrize("name", ["fp32", "bf16", "w8a8", "w8a16", "w4a8-qqq", "w4a8-qoq", "w4a8-qqq-g128", "w4a8-qoq-g128"])
@pytest.mark.parametrize("factor", [1e-9, 1e9])
def test_other_formats_hold_such_values(name, factor):
    weight_format = formats.get(name)
    found = weight_format.unpack(weight_format.pack(np.float32(factor) * values()), (ROWS, COLUMNS))
    expected = weight_format.unpack(weight_format.pack(values()), (ROWS, COLUMNS))
    np.testing.assert_allclose(found, factor * expected, rtol=1e-2, atol=0.02 * factor)


@pytest.mark.parametrize("name", ["w4a16", "w4a16-channel", "w4a16-act-order"])
@pytest.mark.parametrize(("factor", "text"), [(1e5, "beyond"), (1e-9, "below")])
def test_scales_of_integers_outside_half_precision_are_refused(name, factor, text):
    weight = quantised(name)
    scaled = dataclasses.replace(weight, scales=np.float32(factor) * weight.scales)
    refused(formats.get(name), scaled, f"{text} the range of float16")
    np.testing.assert_allclose(formats.get("fp32").pack(scaled).values, factor * weight.dense(), rtol=1e-5)


@pytest.mark.parametrize(("name", "part"), [(name, part) for name, part in PARTS if part == "channel_scales"
                                            or name in ("w8a8", "w8a16", "w4a8-qqq") or (name, part) == ("w4a8-qoq", "scales")])
def test_products_of_codes_and_scales_that_leave_single_precision_are_refused(name, part):
    weight = quantised(name)
    changed = {part: np.full_like(getattr(weight, part), 3e38)}
    if name == "w4a8-qqq":
        changed = {"scales": np.full(COLUMNS, 3e37, np.float32), "offsets": np.full(COLUMNS, 2.4e38, np.float32)}
    refused(formats.get(name), dataclasses.replace(weight, **changed), "beyond the range of float32")


@pytest.mark.parametrize(("name", "changes", "text"), [
    ("w4a16", {"q": np.full((ROWS, COLUMNS), 16, np.uint8)}, "a code 16; 4 bits hold 0 to 15"),
    ("w4a16", {"q": np.zeros((ROWS, COLUMNS), np.int32)}, "codes int32[256, 32]; expected uint8[K, N]"),
    ("w4a16", {"scales": np.ones((1, COLUMNS), np.float16)}, "scales of shape [1, 32]; its codes ask for [2, 32]"),
    ("w4a16-act-order", {"order": np.zeros(ROWS, np.int32)}, "does not hold each of its 256 inputs once"),
    ("w8a8", {"q": np.zeros((ROWS, COLUMNS), np.uint8)}, "codes uint8[256, 32]; expected int8[K, N]"),
    ("w8a8", {"scales": np.ones(3, np.float32)}, "scales of shape [3]"),
    ("w4a8-qoq", {"q": np.full((ROWS, COLUMNS), 200, np.uint8)}, "a code 200"),
    ("w4a8-qoq", {"offsets": np.ones((1, COLUMNS), np.float32)}, "offsets of shape [1, 32]"),
    ("w4a8-qqq-g128", {"group_scales": np.ones((3, COLUMNS), np.float16)}, "group_scales of shape [3, 32]"),
    ("w4a8-qqq-g128", {"group_scales": np.ones((2, COLUMNS), np.float32)}, "group_scales of float32; expected float16"),
    ("w4a8-qoq-g128", {"group_scales": np.full((2, COLUMNS), 99, np.uint8)}, "beyond 8 bits"),
])
def test_parts_that_do_not_fit_each_other_are_refused(name, changes, text):
    refused(formats.get(name), dataclasses.replace(quantised(name), **changes), text)


def test_a_group_of_zeros_beside_small_values_stays_zero():
    """Its scale is in units of the output's, which is small."""
    weight = 1e-4 * values()
    weight[:128] = 0
    qqq = formats.get("w4a8-qqq-g128")
    packed = qqq.pack(weight)
    np.testing.assert_array_equal(qqq.unpack(packed, weight.shape)[:128], 0)
    x = values().T
    found, expected = qqq.matmul(jnp.asarray(x), packed).sum(0), x @ np.asarray(qqq.unpack(packed, weight.shape))
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_the_peak_is_the_largest_magnitude(dtype):
    weight = values().astype(dtype)
    expected = float(np.abs(weight.astype(np.float64)).max())
    assert peak(weight) == peak(weight.T) == peak(weight[::2, ::3][:0]) + expected
    for wrong in NOT_FINITE:
        weight[0, 0] = wrong
        np.testing.assert_equal(peak(weight), np.nan if np.isnan(wrong) else np.inf)


@pytest.mark.parametrize("name", formats.names())
def test_packing_can_be_traced(name):
    weight_format = formats.get(name)
    one, other = jax.jit(weight_format.pack)(values()), weight_format.pack(values())
    assert jax.tree.map(jnp.shape, one) == jax.tree.map(jnp.shape, other)


def with_value(model, value):
    """The model with one entry of a layer's weight changed."""
    params = jax.tree.map(lambda leaf: leaf, model.params)
    weight = params["params"]["layers_1"]["mlp"]["down"]
    weight["w"] = formats.Dense(weight["w"].values.at[3, 5].set(value))
    return dataclasses.replace(model, params=params)


@pytest.mark.parametrize(("precision", "value", "text"), [
    *((name, np.nan, "not finite") for name in formats.names() if name != "fp32"),
    *((name, 1e6, "beyond the range of float16") for name in ("fp16", "w4a16-g32", "w4a16-channel"))])
def test_another_precision_of_a_loaded_model_is_refused(precision, value, text):
    model = with_value(sm.random_model(tiny_config(), "fp32"), value)
    with pytest.raises(UserError, match=f"^tensor layers_1/mlp/down/w holds values.* {text}"):
        model.with_precision(precision)


