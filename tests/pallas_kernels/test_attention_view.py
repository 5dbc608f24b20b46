"""Windows and caps of attention, against a softmax over all positions of each row's path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import IMPLEMENTATIONS
from lowering import cuda_text, launches

from pallas_kernels.attention import api, kernel

HEADS, KV_HEADS, DIM, ROOM = 4, 2, 16, 400
PARENTS = (0, 0, 1, 1, 2, 3)


def draw(rows, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (rows, HEADS, DIM), (ROOM, KV_HEADS, DIM), (ROOM, KV_HEADS, DIM)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def expected(q, keys, values, paths, *, window, cap):
    """`paths` has for each row the cache rows that it would see without a window, oldest first, itself last."""
    out = []
    for query, path in zip(q, paths, strict=True):
        seen = path if window is None else path[-window:]
        k, v = (np.repeat(part[seen].astype(np.float64), HEADS // KV_HEADS, axis=1) for part in (keys, values))
        scores = np.einsum("hd,jhd->hj", query, k) * DIM**-0.5
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out.append(np.einsum("hj,jhd->hd", weights / weights.sum(-1, keepdims=True), v))
    return np.stack(out)


def tree():
    mask = np.zeros((len(PARENTS), len(PARENTS)), bool)
    for node, parent in enumerate(PARENTS):
        mask[node] = mask[parent] if node else False
        mask[node, node] = True
    return mask


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("window", "cap"), [(None, 0.5), (1, None), (3, 0.5), (130, None), (1000, 0.5)])
@pytest.mark.parametrize("length", [0, pytest.param(5, marks=pytest.mark.slow), 300])
def test_causal_rows(length, window, cap, implementation):
    q, keys, values = draw(9)
    keys[length + 9:] = values[length + 9:] = np.nan
    found = api.causal_attention(q, keys, values, jnp.int32(length), window=window, cap=cap, implementation=implementation)
    paths = [np.arange(length + row + 1) for row in range(9)]
    np.testing.assert_allclose(found, expected(q, keys, values, paths, window=window, cap=cap), atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("window", [None, 1, 2, 4, 130])
@pytest.mark.parametrize("first", [0, 4])
def test_rows_of_a_tree_and_of_its_last_levels(first, window, implementation):
    mask, length = tree(), 200
    q, keys, values = draw(len(mask) - first)
    found = api.tree_attention(q, keys, values, jnp.int32(length), api.pack_mask(jnp.asarray(mask[first:])), tail=len(mask),
                               window=window, cap=2.0, implementation=implementation)
    paths = [np.concatenate([np.arange(length), length + np.flatnonzero(row)]) for row in mask[first:]]
    np.testing.assert_allclose(found, expected(q, keys, values, paths, window=window, cap=2.0), atol=2e-6)


@pytest.mark.parametrize("window", [None, 2, 130])
def test_ordered_rows(window):
    mask, length = tree(), 200
    q, keys, values = map(jnp.asarray, draw(len(mask)))
    depth = jnp.asarray(mask.sum(1) - 1, jnp.int32)
    found = api.ordered_attention(q, keys, values, jnp.int32(length), depth, api.tree_paths(jnp.asarray(mask), depth),
                                  window=window, cap=2.0)
    paths = [np.concatenate([np.arange(length), length + np.flatnonzero(row)]) for row in mask]
    np.testing.assert_allclose(found, expected(*map(np.asarray, (q, keys, values)), paths, window=window, cap=2.0), atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_each_sequence_has_its_window(implementation):
    q, keys, values = draw(6)
    caches = [np.stack([part, part[::-1]]) for part in (keys, values)]
    lengths, slots = jnp.array([7, 290], jnp.int32), jnp.array([1, 0], jnp.int32)
    found = api.causal_attention(q, *caches, lengths, slots=slots, window=4, implementation=implementation)
    for i, (slot, length) in enumerate(((1, 7), (0, 290))):
        rows = q[3 * i:3 * i + 3]
        paths = [np.arange(length + row + 1) for row in range(3)]
        np.testing.assert_allclose(found[3 * i:3 * i + 3], expected(rows, caches[0][slot], caches[1][slot], paths, window=4,
                                                                    cap=None), atol=2e-6)


def test_what_lies_before_the_window_leaves_no_mark():
    q, keys, values = draw(1)
    keys[:386] = np.nan
    found = jax.jit(lambda *caches: api.causal_attention(q, *caches, jnp.int32(390), window=4))(keys, values)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("splits", [1, 8])
@pytest.mark.parametrize("length", [0, 300])
def test_shares_of_a_window_add_up(splits, length):
    """However many programs share the window's keys, empty shares included."""
    q, keys, values = draw(40)
    config = kernel.Config(block_m=16, block_k=16, splits=splits)
    found = api.causal_attention(q, keys, values, jnp.int32(length), window=50, config=config, implementation="interpret")
    paths = [np.arange(length + row + 1) for row in range(40)]
    np.testing.assert_allclose(found, expected(q, keys, values, paths, window=50, cap=None), atol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
@pytest.mark.parametrize(("window", "cap"), [(100, None), (100, 30.0)])
def test_the_kernel_lowers_for_a_gpu(dtype, window, cap):
    shapes = (6, HEADS, DIM), (ROOM, KV_HEADS, DIM), (ROOM, KV_HEADS, DIM)
    operands = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes] + [jax.ShapeDtypeStruct((), jnp.int32)]
    words = jax.ShapeDtypeStruct((6, 1), jnp.int32)
    config = kernel.Config(splits=2)
    text = cuda_text(lambda *given: api.tree_attention(*given, window=window, cap=cap, config=config, implementation="kernel"),
                     *operands, words)
    assert launches(text) == 2


def test_a_gpu_takes_the_reference_for_a_head_that_the_kernel_can_not(monkeypatch):
    monkeypatch.setattr(api.launch, "choose", lambda implementation: implementation or "kernel")
    q, keys, values = (part[..., :12] for part in draw(3))
    expected = api.causal_attention(q, keys, values, jnp.int32(5), implementation="reference")
    np.testing.assert_array_equal(api.causal_attention(q, keys, values, jnp.int32(5)), expected)
    with pytest.raises(ValueError, match="head_dim is 12"):
        api.causal_attention(q, keys, values, jnp.int32(5), implementation="kernel")


@pytest.mark.parametrize(("options", "part"), [({"window": 0}, "window"), ({"cap": 0.0}, "cap")])
def test_a_senseless_view_is_refused(options, part):
    with pytest.raises(ValueError, match=part):
        api.causal_attention(*draw(2), jnp.int32(3), **options)
