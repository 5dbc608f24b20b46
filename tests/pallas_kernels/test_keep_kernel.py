"""Rows of accepted paths moved in caches, against a loop over what moves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import IMPLEMENTATIONS, compiled
from lowering import cuda_text, launches
from trees import random_tree

from pallas_kernels.keep import Config, keep_path


def accepted(rng, nodes: int) -> np.ndarray:
    """The path from the root of a random tree to one of its nodes."""
    return np.flatnonzero(random_tree(nodes, rng)[rng.integers(nodes)])


def random_paths(rng, sequences: int, entries: int, nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Paths of random trees and their lengths, with any node behind a path's end."""
    paths, counts = rng.integers(0, nodes, (sequences, entries)).astype(np.int32), np.zeros(sequences, np.int32)
    for i in range(sequences):
        path = accepted(rng, nodes)[:entries]
        counts[i] = len(path)
        paths[i, :len(path)] = path
    return paths, counts


def check(implementation, shape, paths, counts, lengths, slots=None, *, caches=2, dtype=jnp.float16, config=None):
    """`shape` is that of a cache, with slots where there are any."""
    rng = np.random.default_rng(0)
    before = [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(caches)]
    expected = [np.array(cache) for cache in before]
    for i, (path, count, length) in enumerate(zip(np.atleast_2d(paths), np.atleast_1d(counts), np.atleast_1d(lengths),
                                                  strict=True)):
        for old, new in zip(before, expected, strict=True):
            old, new = (np.array(old), new) if slots is None else (np.array(old[slots[i]]), new[slots[i]])
            for j in range(count):
                if length + max(j, path[j]) < len(old):
                    new[length + j] = old[length + path[j]]
    named = None if slots is None else jnp.asarray(slots, jnp.int32)
    found = compiled(lambda caches, *places: keep_path(caches, *places, slots=named, config=config,
                                                       implementation=implementation),
                     before, *(jnp.asarray(part, jnp.int32) for part in (paths, counts, lengths)))
    for whole, each in zip(expected, found, strict=True):
        assert each.dtype == dtype
        np.testing.assert_array_equal(each, whole)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("heads", "head_dim"), [(2, 16), (3, 24)])
def test_each_sequence_keeps_its_own_path(implementation, dtype, heads, head_dim):
    rng = np.random.default_rng(heads)
    slots, lengths = [4, 0, 2, 3], [0, 7, 30, 48]
    check(implementation, (5, 64, heads, head_dim), *random_paths(rng, 4, 5, 12), lengths, slots, dtype=dtype, caches=3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_single_sequence_needs_no_slot(implementation):
    check(implementation, (32, 2, 16), np.int32([0, 2, 5, 0, 0]), 3, 9, caches=1)
    check(implementation, (3, 32, 2, 16), np.int32([[0, 2, 5, 1]]), [4], [9], [1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_all_rows_are_read_before_one_is_written(implementation):
    """On paths that no tree has, where a row is overwritten before it would be read."""
    paths = np.int32([[3, 2, 1, 0, 0, 4], [1, 2, 3, 4, 5, 0], [5, 5, 0, 0, 1, 2]])
    check(implementation, (3, 16, 2, 16), paths, [6, 6, 5], [0, 10, 3], [2, 0, 1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("count", [0, 1, 4])
def test_nothing_moves_past_the_end_or_behind_the_count(implementation, count):
    paths = np.int32([[0, 2, 3, 7]] * 3)
    check(implementation, (3, 16, 2, 16), paths, [count] * 3, [8, 13, 15], [0, 1, 2])
    for length in (8, 13, 15, 16):
        check(implementation, (16, 2, 16), paths[0], count, length)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_more_caches_than_a_launch_takes_and_rows_of_many_blocks(implementation):
    paths, counts = random_paths(np.random.default_rng(0), 2, 7, 20)
    check(implementation, (2, 40, 3, 24), paths, counts, [0, 19], [1, 0], caches=7,
          config=Config(block=16, caches=3, num_warps=1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("heads", "head_dim"), [(8, 128), (3, 64)])
@pytest.mark.parametrize("sequences", [1, 4, 64])
def test_real_sizes_on_gpu(sequences, heads, head_dim, dtype):
    rng = np.random.default_rng(sequences)
    slots, lengths = rng.permutation(64)[:sequences], rng.integers(0, 197, sequences)
    for entries in (2, 6, 8, 40):
        check("kernel", (64, 256, heads, head_dim), *random_paths(rng, sequences, entries, 60), lengths, slots, caches=5,
              dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("caches", [2, 64, 65, 160])
def test_caches_of_all_layers_on_gpu(caches):
    rng = np.random.default_rng(caches)
    check("kernel", (4, 128, 8, 128), *random_paths(rng, 4, 7, 60), [0, 31, 68, 67], [3, 1, 0, 2], caches=caches)
    check("kernel", (128, 8, 128), np.int32([0, 9, 17, 40, 0, 0]), 4, 60, caches=caches)


@pytest.mark.parametrize("sequences", [None, 1, 64])
@pytest.mark.parametrize("layers", [1, 32])
def test_all_layers_are_one_launch_that_writes_in_place(layers, sequences):
    def aval(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    leading = () if sequences is None else (sequences,)
    caches = [jax.ShapeDtypeStruct((*(leading and (64,)), 1024, 8, 128), jnp.float16)] * (2 * layers)

    def function(caches, paths, counts, lengths, slots):
        return keep_path(caches, paths, counts, lengths, slots=None if sequences is None else slots, implementation="kernel")

    text = cuda_text(function, caches, aval(*leading, 6), *[aval(*leading)] * 3)
    assert launches(text) == 1
    assert text.count("output_operand_alias<") == 2 * layers


def test_names_the_offending_array():
    cache, one, two = jnp.zeros((4, 8, 2, 16)), jnp.zeros(1, jnp.int32), jnp.zeros(2, jnp.int32)
    paths = jnp.zeros((2, 3), jnp.int32)
    with pytest.raises(ValueError, match=r"caches\[0\] has shape .4, 8, 2, 16.; expected .B, L, heads, head_dim. with slots"):
        keep_path([cache], paths, two, two)
    with pytest.raises(ValueError, match=r"caches\[1\] is float16.4, 8, 2, 16.; expected caches\[0\]'s float32.4, 8, 2, 16."):
        keep_path([cache, cache.astype(jnp.float16)], paths, two, two, slots=two)
    with pytest.raises(ValueError, match=r"counts has shape \[1\]; expected \[2\], one a sequence"):
        keep_path([cache], paths, one, two, slots=two)
    with pytest.raises(ValueError, match=r"lengths has shape \[1\]; expected \[2\], one a sequence"):
        keep_path([cache], paths, two, one, slots=two)
    with pytest.raises(ValueError, match=r"paths has shape \[3, 3\]; expected \[2, 1 to 8\]"):
        keep_path([cache], jnp.zeros((3, 3), jnp.int32), two, two, slots=two)
    with pytest.raises(ValueError, match=r"paths has shape \[9\]; expected \[1 to 8\]"):
        keep_path([cache[0]], jnp.zeros(9, jnp.int32), one[0], one[0])
    with pytest.raises(ValueError, match="block is 48; expected a power of two"):
        Config(block=48)
    with pytest.raises(ValueError, match="caches is 241; expected 1 to 240"):
        Config(caches=241)
