"""Weight formats: what is packed is what is multiplied by; rounding is as good as its bit width allows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specmq_jax import UserError, formats
from specmq_jax.formats import GroupedInt4, dense

SHAPES = [(128, 64), (576, 96), (96, 48), (200, 33)]


def random_logical(rng, rows, columns, group_size):
    groups = 1 if group_size == -1 else -(-rows // group_size)
    scales = rng.normal(size=(groups, columns)).astype(np.float16)
    return GroupedInt4(rng.integers(0, 16, (rows, columns)).astype(np.uint8), scales, group_size)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["w4a16", "w4a16-g64", "w4a16-g32", "w4a16-channel"])
def test_a_toolkits_integers_survive_packing_exactly(name, shape):
    weight_format = formats.get(name)
    logical = random_logical(np.random.default_rng(0), *shape, weight_format.group_size)
    packed = weight_format.pack(logical)
    size = shape[0] if weight_format.group_size == -1 else weight_format.group_size
    expected = (logical.q.astype(np.float32) - 8) * np.repeat(logical.scales.astype(np.float32), size, 0)[:shape[0]]
    np.testing.assert_array_equal(weight_format.unpack(packed, shape), expected)
    x = np.random.default_rng(1).normal(size=(5, shape[0])).astype(np.float16)
    found = weight_format.matmul(jnp.asarray(x), packed).sum(0)
    np.testing.assert_allclose(found, x.astype(np.float64) @ expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["w4a16", "w4a16-g64", "w4a16-g32", "w4a16-channel"])
def test_round_to_nearest_errs_by_half_a_step_and_keeps_the_largest_entry(name, shape):
    weight_format = formats.get(name)
    values = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    values[:, 3] = 0
    kept = np.asarray(weight_format.unpack(weight_format.pack(values), shape))
    size = shape[0] if weight_format.group_size == -1 else weight_format.group_size
    for start in range(0, shape[0], size):
        block, found = values[start:start + size], kept[start:start + size]
        step = np.abs(block).max(0) / 8
        inside = np.abs(block) <= 7 * step
        assert np.all(np.abs(found - block)[inside] <= (0.502 * step + 1e-3 * np.abs(block).max(0)).repeat(len(block)).reshape(
            block.shape[1], -1).T[inside])
        top = np.abs(block).argmax(0)
        np.testing.assert_allclose(found[top, range(shape[1])], block[top, range(shape[1])], rtol=1e-3)


@pytest.mark.parametrize("name", formats.names())
def test_abstract_weights_have_the_shapes_of_packed_ones(name):
    weight_format = formats.get(name)
    for shape in SHAPES:
        packed = weight_format.pack(jnp.ones(shape))
        abstract = weight_format.abstract(shape)
        assert jax.tree.structure(packed) == jax.tree.structure(abstract)
        for a, b in zip(jax.tree.leaves(packed), jax.tree.leaves(abstract), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_names_are_found_and_unknown_ones_are_listed():
    assert formats.get("w4a16-g128") is formats.get("w4a16")
    assert formats.get("w4a16-g-1").group_size == -1
    with pytest.raises(UserError, match="precision 'w3a16' is not known; choose one of fp32, bf16"):
        formats.get("w3a16")


def test_a_model_gives_the_same_logits_packed_and_expanded():
    from fakes import tiny_config

    import specmq_jax as sm

    model = sm.random_model(tiny_config(), "fp32").with_precision("w4a16-g32")
    assert model.precision == "w4a16-g32" and model.module.format.name == "w4a16-g32"
    again = model.with_precision("fp32")
    ids = [1, 5, 9, 33, 60]
    a, b = sm.logits(model, ids), sm.logits(again, ids)
    assert float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) < 3e-3


def test_a_row_that_is_padded_before_a_large_weight_gives_the_same_product(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(dense, "_LARGE", 1)
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((1, 96), (96, 48)))
    fp32 = formats.get("fp32")
    for found in (fp32.matmul(x, dense.Dense(weight))[0], fp32.transposed_matmul(x, weight.T)):
        np.testing.assert_allclose(found, np.asarray(x) @ np.asarray(weight), rtol=1e-5, atol=1e-5)
    hlo = jax.jit(lambda x, w: fp32.matmul(x, dense.Dense(w))).lower(x, weight).as_text()
    assert "tensor<16x96xf32>" in hlo and "optimization_barrier" in hlo
