"""Caches of several sequences in slots."""

import jax
import jax.numpy as jnp
import numpy as np
from fakes import tiny_config

from specmq_jax.network import side_by_side
from specmq_jax.network.cache import KVCache


def filled(slots=None):
    cache = KVCache.create(tiny_config(), 32, jnp.float32, slots=slots)
    rng = np.random.default_rng(0)
    return cache.replace(layers=jax.tree.map(lambda rows: jnp.asarray(rng.normal(size=rows.shape), rows.dtype), cache.layers))


def test_mapped_sequences_keep_what_each_alone_does():
    paths, counts = jnp.int32([[0, 2, 5], [0, 0, 0], [0, 1, 4]]), jnp.int32([3, 1, 2])
    every = filled(slots=4)
    state = side_by_side.take(every.replace(length=jnp.int32([9, 0, 3, 20])), jnp.int32([3, 0, 2]))
    axes = side_by_side.axes(state)
    found = jax.jit(jax.vmap(lambda cache, path, count: cache.keep(path, count, in_place=False), in_axes=(axes, 0, 0),
                             out_axes=axes))(state, paths, counts)
    np.testing.assert_array_equal(found.length, [23, 10, 5])
    for rows, before in zip(jax.tree.leaves(found.layers), jax.tree.leaves(every.layers), strict=True):
        expected = np.array(before)
        for slot, length, path, count in zip([3, 0, 2], [20, 9, 3], paths, counts, strict=True):
            alone = KVCache(layers=filled().layers, length=jnp.int32(length), limit=32)
            alone = alone.replace(layers=jax.tree.map(lambda _, one=before[slot]: one, alone.layers))
            expected[slot] = jax.tree.leaves(alone.keep(path, count, in_place=False).layers)[0]
        np.testing.assert_array_equal(rows, expected)


def test_a_chain_stays_where_it_is():
    cache = filled()
    kept = cache.keep(jnp.arange(3, dtype=jnp.int32), jnp.int32(2), in_place=True)
    assert kept.layers is cache.layers
    assert int(kept.length) == 2
