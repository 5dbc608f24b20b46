"""Rows of several sequences in one launch: what each gives is what it gives alone, and no other slot is touched."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import IMPLEMENTATIONS, compiled, relative_error
from lowering import cuda_text, launches
from trees import random_tree

from pallas_kernels.attention import causal_attention, ordered_attention, pack_mask, tree_attention, tree_paths
from pallas_kernels.rope import rope_append
from pallas_kernels.sequences import by_rows
from pallas_kernels.top_k import log_softmax_top_k

SLOTS, LENGTHS = [3, 0, 4], [0, 100, 37]
SIZES = {"heads": 4, "kv_heads": 2, "head_dim": 16}
REAL = {"heads": 32, "kv_heads": 8, "head_dim": 128}


def caches(max_len, heads, kv_heads, head_dim, dtype=jnp.float32, slots=5):
    del heads
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(slots, max_len, kv_heads, head_dim)), dtype) for _ in "kv"]


def check_rope(rows, implementation, sizes, dtype=jnp.float32, slots=SLOTS, lengths=LENGTHS, max_len=128):
    rng = np.random.default_rng(rows)
    features = (sizes["heads"] + 2 * sizes["kv_heads"]) * sizes["head_dim"]
    qkv = jnp.asarray(rng.normal(size=(2, len(slots) * rows, features)), jnp.float32)
    cos, sin = (jnp.asarray(rng.normal(size=(len(slots) * rows, sizes["head_dim"] // 2)), jnp.float32) for _ in range(2))
    before = caches(max_len, **sizes, dtype=dtype, slots=max(slots) + 1)
    q, *after = compiled(rope_append, qkv, cos, sin, *before, jnp.asarray(lengths, jnp.int32),
                         slots=jnp.asarray(slots, jnp.int32), implementation=implementation, **sizes)
    expected = [np.array(cache) for cache in before]
    for i, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
        own = slice(i * rows, (i + 1) * rows)
        alone, *single = compiled(rope_append, qkv[:, own], cos[own], sin[own], *(cache[slot] for cache in before),
                                  jnp.int32(length), implementation=implementation, **sizes)
        np.testing.assert_array_equal(q[own], alone)
        for whole, one in zip(expected, single, strict=True):
            whole[slot] = one
    for whole, found in zip(expected, after, strict=True):
        np.testing.assert_array_equal(whole, found)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [1, 7])
def test_rope_append_writes_each_sequence_where_it_stands(rows, implementation):
    check_rope(rows, implementation, SIZES)


def check_attention(rows, implementation, sizes, dtype=jnp.float32, slots=SLOTS, lengths=LENGTHS, max_len=128):
    rng = np.random.default_rng(rows)
    q = jnp.asarray(rng.normal(size=(len(slots) * rows, sizes["heads"], sizes["head_dim"])), dtype)
    stored = caches(max_len, **sizes, dtype=dtype, slots=max(slots) + 1)
    masks = [random_tree(rows, rng) for _ in slots]
    depths = [jnp.asarray(mask.sum(1) - 1, jnp.int32) for mask in masks]
    words = [compiled(pack_mask, jnp.asarray(mask)) for mask in masks]
    paths = [compiled(tree_paths, jnp.asarray(mask), depth) for mask, depth in zip(masks, depths, strict=True)]
    forms = {tree_attention: [words], ordered_attention: [depths, paths], causal_attention: []}
    exact = 1e-3 if dtype == jnp.float16 else 1e-6
    for function, of_rows in forms.items():
        together = compiled(function, q, *stored, jnp.asarray(lengths, jnp.int32), *map(jnp.concatenate, of_rows),
                            slots=jnp.asarray(slots, jnp.int32), implementation=implementation)
        for i, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
            own = slice(i * rows, (i + 1) * rows)
            alone = compiled(function, q[own], *(cache[slot] for cache in stored), jnp.int32(length),
                             *(each[i] for each in of_rows), implementation=implementation)
            if function is ordered_attention:  # whatever else is decoded, to the bit
                np.testing.assert_array_equal(together[own], alone)
            assert relative_error(together[own], np.asarray(alone, np.float64)) < exact


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), 9])
def test_attention_of_each_sequence_is_its_own(rows, implementation):
    check_attention(rows, implementation, SIZES)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 5, 16, 60])
def test_real_sizes_on_gpu(rows):
    slots, lengths = [7, 2, 0, 5, 1], [0, 1500, 63, 700, 64]
    check_attention(rows, "kernel", REAL, jnp.float16, slots, lengths, 2048)
    check_rope(rows, "kernel", REAL, jnp.float16, slots, lengths, 2048)


@pytest.mark.parametrize("rows", [1, 16])
def test_several_sequences_are_as_many_launches_as_one(rows):
    def aval(*shape, dtype=jnp.float16):
        return jax.ShapeDtypeStruct(shape, dtype)

    index, cache = aval(8, dtype=jnp.int32), aval(32, 1024, 8, 128)
    q, words = aval(8 * rows, 32, 128), aval(8 * rows, 1, dtype=jnp.int32)
    attended = cuda_text(lambda q, k, v, length, words, slots: tree_attention(
        q, k, v, length, words, slots=slots, implementation="kernel"), q, cache, cache, index, words, index)
    assert launches(attended) == 2
    table = aval(8 * rows, 64, dtype=jnp.float32)
    appended = cuda_text(lambda qkv, cos, sin, k, v, length, slots: rope_append(
        qkv, cos, sin, k, v, length, slots=slots, implementation="kernel", **REAL),
        aval(2, 8 * rows, 48 * 128, dtype=jnp.float32), table, table, cache, cache, index, index)
    assert launches(appended) == 1


def test_rows_of_mapped_sequences_are_one_call():
    seen = []

    def doubled(rows):
        seen.append(rows.shape)
        return 2 * rows, rows[:, 0]

    x = jnp.arange(24.0).reshape(2, 3, 4)
    twice, first = jax.vmap(by_rows(doubled))(x)
    assert seen[-1] == (6, 4)
    np.testing.assert_array_equal(twice, 2 * x)
    np.testing.assert_array_equal(first, x[:, :, 0])
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 40)), jnp.float32)
    for implementation in ("reference", "interpret"):
        ranked = functools.partial(log_softmax_top_k, k=4, implementation=implementation)
        mapped, alone = jax.vmap(ranked)(logits), [ranked(each) for each in logits]
        for found, expected in zip(mapped, zip(*alone, strict=True), strict=True):
            np.testing.assert_allclose(found, jnp.stack(expected), rtol=1e-6)


def test_operands_that_do_not_fit_are_named():
    q, cache, index = jnp.zeros((6, 4, 16)), jnp.zeros((5, 32, 2, 16)), jnp.zeros(3, jnp.int32)
    with pytest.raises(ValueError, match=r"expected \[B, L, heads, head_dim\] with slots"):
        causal_attention(q, cache, cache, index)
    with pytest.raises(ValueError, match=r"length has shape \[3\]; expected \[2\], one a sequence"):
        causal_attention(q, cache, cache, index, slots=index[:2])
    with pytest.raises(ValueError, match="7 rows are not those of 3 sequences"):
        causal_attention(jnp.zeros((7, 4, 16)), cache, cache, index, slots=index)
