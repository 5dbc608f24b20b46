"""Products of 8-bit activations with 4-bit weights, against numpy's integers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import IMPLEMENTATIONS, compiled
from lowering import cuda_text, launches

from pallas_kernels import w8a8
from pallas_kernels.w4a8 import (
    Config,
    channel_partials,
    expand,
    expansion,
    group_partials,
    pack,
    pack_groups,
    packed_shape,
    reference,
    saturates,
    unpack,
    unpack_groups,
)

KINDS = ["channel", "channel-zeros", "groups", "groups-zeros"]


def problem(kind: str, rows: int, inner: int, outputs: int):
    """The function, its operands but for the rows', the rows', and the exact product, scaled in the definition's order."""
    rng = np.random.default_rng([KINDS.index(kind), rows, inner, outputs])
    codes = rng.integers(-127, 128, (rows, inner)).astype(np.int8)
    weights = rng.integers(0, 16, (outputs, inner)).astype(np.uint8)
    row_scales, scales = (rng.uniform(0.01, 0.1, size).astype(np.float32) for size in (rows, outputs))
    groups, wide = -(-inner // 128), codes.astype(np.float64)  # exact there, and multiplied faster than integers
    padded = np.pad(wide, ((0, 0), (0, groups * 128 - inner)))
    sums = padded.reshape(rows, *((groups, 128) if kind.startswith("groups") else (1, -1))).sum(2).T.astype(np.int32)

    def scaled(integers):
        return (wide @ integers.T.astype(np.float64)).astype(np.float32) * scales * row_scales[:, None]

    def spread(numbers):
        return np.repeat(numbers.astype(np.float64), 128, axis=0)[:inner].T

    function = channel_partials
    if kind == "channel":
        others, expected = (scales, None), scaled(weights.astype(np.int64) - 8)
    elif kind == "channel-zeros":
        offsets = rng.uniform(0, 1.5, outputs).astype(np.float32)
        total = wide.sum(1).astype(np.float32) * row_scales
        others, expected = (scales, offsets), scaled(weights) - total[:, None] * offsets
    elif kind == "groups":
        function = group_partials
        group_scales = rng.uniform(0, 20, (groups, outputs)).astype(np.float16)  # past 127 / 7 the integers saturate
        integers = np.clip(np.rint((weights.astype(np.float64) - 8) * spread(group_scales)), -128, 127)
        words, saturates = pack_groups(jnp.asarray(group_scales), None), jnp.ones(1, jnp.int32)
        others, expected = (words, scales, saturates), scaled(integers)
    else:
        function = group_partials
        group_scales = rng.integers(1, 9, (groups, outputs)).astype(np.uint8)
        group_zeros = -(rng.integers(0, 16, (groups, outputs)) * group_scales.astype(np.int16))
        others = pack_groups(jnp.asarray(group_scales), jnp.asarray(group_zeros)), scales, None
        expected = scaled(weights * spread(group_scales) + spread(group_zeros))
    packed = pack(jnp.asarray(weights))
    rows_given = tuple(map(jnp.asarray, (codes, row_scales, sums)))
    return function, rows_given, (packed, *(other if other is None else jnp.asarray(other) for other in others)), expected


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(1, 576, 40), (7, 130, 33), (60, 256, 64), (200, 128, 20), (520, 128, 20)])
@pytest.mark.parametrize("kind", KINDS)
def test_an_unsplit_product_is_exact(kind, shape, implementation):
    function, rows, weight, expected = problem(kind, *shape)
    found = compiled(function, *rows, *weight, config=Config(block_m=128, block_n=32), implementation=implementation)
    assert found.shape == (1, *expected.shape)
    # a subtraction that follows a product may be fused with it
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=3e-7 * np.abs(expected).max() * (kind == "channel-zeros"))


@pytest.mark.parametrize("config", [
    Config(block_n=16, split_k=3), Config(split_k=2, num_warps=1, pipelined_scales=False), None])
@pytest.mark.parametrize("kind", KINDS)
def test_shares_add_up_to_the_product(kind, config):
    function, rows, weight, expected = problem(kind, 5, 1000, 48)
    partials = function(*rows, *weight, config=config, implementation="interpret")
    np.testing.assert_allclose(partials.sum(0), expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_rows_sum_may_come_in_parts(implementation):
    function, (codes, row_scales, sums), weight, _ = problem("channel-zeros", 5, 1000, 48)
    whole = function(codes, row_scales, sums, *weight, implementation=implementation)
    parts = jnp.concatenate([sums - 1000, jnp.full((2, 5), 500, jnp.int32)])
    np.testing.assert_array_equal(function(codes, row_scales, parts, *weight, implementation=implementation), whole)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("columns", [130, 256, 1000])
def test_sums_are_those_of_the_codes(columns, implementation):
    x = jnp.asarray(np.random.default_rng(columns).normal(size=(3, columns)), jnp.float16)
    codes, scales, sums = w8a8.quantise_rows(x, sums=128, implementation=implementation)
    alone = w8a8.quantise_rows(x, implementation=implementation)
    np.testing.assert_array_equal(codes, alone[0])
    np.testing.assert_array_equal(scales, alone[1])
    expected = [np.asarray(codes[:, first:first + 128], np.int32).sum(1) for first in range(0, columns, 128)]
    np.testing.assert_array_equal(sums, expected)
    np.testing.assert_array_equal(w8a8.quantise_rows(x, sums=-1, implementation=implementation)[2], np.sum(expected, 0)[None])


@pytest.mark.parametrize("rows", [8, 64, 300])
@pytest.mark.parametrize(("inner", "outputs"), [(4096, 28672), (14336, 4096), (576, 960)])
@pytest.mark.parametrize("kind", KINDS)
def test_lowers_to_one_launch(kind, inner, outputs, rows):
    groups, zeros = -(-inner // 128), kind.endswith("zeros")

    def aval(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    scales, packed = aval(jnp.float32, outputs), aval(jnp.uint8, *packed_shape(outputs, inner))
    given = {"q": aval(jnp.int8, rows, inner), "row_scales": aval(jnp.float32, rows), "packed": packed}
    if zeros:
        given["sums"] = aval(jnp.int32, groups if kind.startswith("groups") else 1, rows)
    if kind.startswith("groups"):
        function, absent = group_partials, {"sums": None, "saturates": None}
        given |= {"groups": aval(jnp.int32, groups, outputs), "channel_scales": scales}
        given |= {} if zeros else {"saturates": aval(jnp.int32, 1)}
    else:
        function, absent = channel_partials, {"sums": None, "offsets": None}
        given |= {"scales": scales} | ({"offsets": scales} if zeros else {})

    def call(*arrays):
        return function(**(absent | dict(zip(given, arrays, strict=True))), implementation="kernel")

    assert launches(cuda_text(call, *given.values())) == 1


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "inner", "outputs"), [
    (1, 4096, 6144), (8, 4096, 4096), (16, 576, 960), (30, 14336, 4096), (60, 4096, 28672), (64, 1536, 576), (128, 4096, 28672),
    (500, 14336, 4096)])
@pytest.mark.parametrize("kind", KINDS)
def test_real_sizes_on_gpu(kind, rows, inner, outputs):
    function, operands, weight, expected = problem(kind, rows, inner, outputs)
    largest = np.abs(expected).max()
    alone = function(*operands, *weight, config=Config(), implementation="kernel")
    np.testing.assert_allclose(alone[0], expected, rtol=0, atol=3e-7 * largest * (kind == "channel-zeros"))
    partials = function(*operands, *weight, implementation="kernel")
    np.testing.assert_allclose(partials.sum(0), expected, rtol=1e-6, atol=1e-6 * largest)


@pytest.mark.parametrize("columns", [1, 127, 128, 300])
def test_unpacking_returns_the_codes(columns):
    codes = np.random.default_rng(columns).integers(0, 16, (5, columns)).astype(np.uint8)
    packed = pack(jnp.asarray(codes))
    assert packed.shape == packed_shape(5, columns)
    np.testing.assert_array_equal(unpack(packed, columns), codes)


def test_integers_are_rounded_half_to_even_and_held_to_8_bits():
    codes = np.arange(16, dtype=np.uint8)[None]
    halves = expand(jnp.asarray(codes), jnp.full((1, 1), 0.5, jnp.float16), None)
    np.testing.assert_array_equal(halves[0], [-4, -4, -3, -2, -2, -2, -1, 0, 0, 0, 1, 2, 2, 2, 3, 4])
    wide = expand(jnp.asarray(codes), jnp.full((1, 1), 20, jnp.float16), None)
    np.testing.assert_array_equal(wide[0, [0, 1, 2, 14, 15]], [-128, -128, -120, 120, 127])


@pytest.mark.parametrize("interpret", [True, pytest.param(False, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", KINDS)
def test_integers_of_a_prompt_are_those_of_the_definition(kind, interpret):
    """Halves among them, and some past 8 bits where there are scales alone."""
    *_, (packed, *others), _ = problem(kind, 1, 300, 70)
    zeros = kind.endswith("zeros")
    if kind.startswith("channel"):
        groups, expected = None, reference.channel_integers(packed, 300, with_zeros=zeros)
    else:
        steps = jnp.asarray(np.random.default_rng(2).integers(-60, 61, (3, 70)) / 2, jnp.float16)
        groups = others[0] if zeros else pack_groups(steps, None)
        expected = reference.group_integers(packed, 300, groups, with_zeros=zeros)
    found = expansion.integers(packed, groups, inner=300, with_zeros=zeros, interpret=interpret)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_integer_is_held_where_none_needs_it(implementation):
    function, rows, (packed, _, scales, _), _ = problem("groups", 5, 256, 40)
    group_scales = jnp.asarray(np.random.default_rng(1).uniform(1, 15.9, (2, 40)), jnp.float16)
    words = pack_groups(group_scales, None)
    flag = saturates(unpack(packed, 256), group_scales)
    assert flag[0] == 0 and saturates(unpack(packed, 256), group_scales * 2)[0] == 1
    found = [function(*rows, packed, words, scales, jnp.full(1, held, jnp.int32), config=Config(block_n=32),
                      implementation=implementation) for held in (0, 1)]
    np.testing.assert_array_equal(*found)


def test_groups_unpack_to_what_was_packed():
    rng = np.random.default_rng(0)
    scales, small = jnp.asarray(rng.normal(size=(3, 8)), jnp.float16), jnp.asarray(rng.integers(0, 256, (3, 8)), jnp.uint8)
    zeros = jnp.asarray(rng.integers(-255, 1, (3, 8)), jnp.int16)
    found, nothing = unpack_groups(pack_groups(scales, None), with_zeros=False)
    np.testing.assert_array_equal(found, scales)
    assert nothing is None
    for found, expected in zip(unpack_groups(pack_groups(small, zeros), with_zeros=True), (small, zeros), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_names_the_offending_array():
    _, (codes, row_scales, sums), (packed, scales, offsets), _ = problem("channel-zeros", 2, 256, 16)
    with pytest.raises(ValueError, match=r"packed is uint8\[1, 16, 64\]; expected uint8\[2, N, 64\] for K = 256"):
        channel_partials(codes, row_scales, sums, packed[:1], scales, offsets)
    with pytest.raises(ValueError, match=r"scales is float32\[15\]; expected float32\[16\]"):
        channel_partials(codes, row_scales, sums, packed, scales[:15], offsets)
    with pytest.raises(ValueError, match=r"sums are missing, which zero points need; expected int32\[P, 2\]"):
        channel_partials(codes, row_scales, None, packed, scales, offsets)
    with pytest.raises(ValueError, match=r"sums is int32\[1, 2\]; expected int32\[2, 2\]"):
        group_partials(codes, row_scales, sums, packed, jnp.ones((2, 16), jnp.int32), scales, None)
    with pytest.raises(ValueError, match=r"groups is float16\[2, 16\]; expected int32\[2, 16\]"):
        group_partials(codes, row_scales, jnp.zeros((2, 2), jnp.int32), packed, jnp.ones((2, 16), jnp.float16), scales, None)
    with pytest.raises(ValueError, match="scales are float16, zeros int16; expected float16 and None, or uint8 and int16"):
        pack_groups(jnp.ones((2, 16), jnp.float16), jnp.zeros((2, 16), jnp.int16))
    with pytest.raises(ValueError, match=r"q is float32\[2, 256\]; expected int8\[M, K\]"):
        channel_partials(codes.astype(jnp.float32), row_scales, sums, packed, scales, offsets)


@pytest.mark.parametrize("fields", [{"block_m": 48}, {"block_n": 24}, {"split_k": 0}])
def test_config_names_the_offending_field(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))} is {next(iter(fields.values()))}; expected"):
        Config(**fields)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_reproducible_rows_have_the_same_bits_in_every_block_of_rows(kind, implementation):
    function, (q, row_scales, *sums), weight, _ = problem(kind, 512, 600, 70)
    product = functools.partial(function, implementation=implementation, reproducible=True)
    whole = product(q, row_scales, *sums, *weight)
    for rows in (slice(0, 1), slice(60, 124), slice(200, 460)):
        some = [each if each is None else each[:, rows] for each in sums]
        np.testing.assert_array_equal(product(q[rows], row_scales[rows], *some, *weight), whole[:, rows])
