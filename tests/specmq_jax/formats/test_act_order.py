"""GPTQ's act-order: a weight whose rows are sorted by group means what it meant before, and multiplies like that."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specmq_jax import formats
from specmq_jax.formats import GroupedInt4

NAMES = ["w4a16-act-order", "w4a16-g64-act-order", "w4a16-g32-act-order"]


def random_ordered(rows, columns, group_size, seed=0):
    rng = np.random.default_rng(seed)
    scales = rng.normal(size=(-(-rows // group_size), columns)).astype(np.float16)
    return GroupedInt4(rng.integers(0, 16, (rows, columns)).astype(np.uint8), scales, group_size,
                       rng.permutation(rows).astype(np.int32))


def values_of(logical):
    found = np.empty(logical.shape, np.float32)
    for i, row in enumerate(logical.order):
        found[row] = (logical.q[i].astype(np.float32) - 8) * logical.scales[i // logical.group_size].astype(np.float32)
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(256, 64), (200, 33)])
def test_a_packed_weight_multiplies_inputs_in_their_own_order(name, shape):
    weight_format = formats.get(name)
    logical = random_ordered(*shape, weight_format.group_size)
    expected = values_of(logical)
    np.testing.assert_array_equal(logical.dense(), expected)
    packed = weight_format.pack(logical)
    np.testing.assert_array_equal(weight_format.unpack(packed, shape), expected)
    x = np.random.default_rng(1).normal(size=(5, shape[0])).astype(np.float16)
    for reproducible in (False, True):
        found = weight_format.matmul(jnp.asarray(x), packed, reproducible=reproducible).sum(0)
        np.testing.assert_allclose(found, x.astype(np.float64) @ expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())


@pytest.mark.parametrize("name", NAMES)
def test_abstract_weights_have_the_shapes_of_packed_ones(name):
    weight_format = formats.get(name)
    for logical in (jnp.ones((200, 33)), random_ordered(200, 33, weight_format.group_size)):
        packed, abstract = weight_format.pack(logical), weight_format.abstract((200, 33))
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), packed) == jax.tree.map(
            lambda leaf: (leaf.shape, leaf.dtype), abstract)


def test_plain_values_keep_their_order():
    values = np.random.default_rng(0).normal(size=(256, 32)).astype(np.float32)
    plain, ordered = (formats.get(name) for name in ("w4a16", "w4a16-act-order"))
    np.testing.assert_array_equal(ordered.unpack(ordered.pack(values), values.shape),
                                  plain.unpack(plain.pack(values), values.shape))


def test_another_format_never_drops_the_order():
    logical = random_ordered(256, 32, 128)
    kept = formats.get("w4a16").unpack(formats.get("w4a16").pack(logical), logical.shape)
    assert np.linalg.norm(kept - values_of(logical)) < 0.15 * np.linalg.norm(values_of(logical))


def test_parts_side_by_side_share_their_order():
    one, two = (random_ordered(256, columns, 128) for columns in (32, 64))
    two = GroupedInt4(two.q, two.scales, 128, one.order)
    np.testing.assert_array_equal(GroupedInt4.beside([one, two]).dense(),
                                  np.concatenate([one.dense(), two.dense()], axis=1))
