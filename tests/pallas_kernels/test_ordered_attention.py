"""Attention in order of positions, against a dense softmax in f64 and against itself in other trees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import IMPLEMENTATIONS, relative_error
from lowering import cuda_text, launches
from trees import dense, random_tree

from pallas_kernels.attention import ordered_attention, tree_paths
from pallas_kernels.attention.ordered import MOST_DEPTH, Config

EXACT = ["interpret", pytest.param("kernel", marks=pytest.mark.gpu)]
paths_of, attended = jax.jit(tree_paths), jax.jit(ordered_attention, static_argnames=("config", "implementation"))


def attend(q, k, v, length: int, mask: np.ndarray, **options):
    depth = jnp.asarray(mask.sum(1) - 1, jnp.int32)
    return attended(q, k, v, jnp.int32(length), depth, paths_of(jnp.asarray(mask), depth), **options)


@pytest.mark.parametrize("rows", [1, 2, 33, 60])
def test_a_path_lists_a_nodes_ancestors_from_the_root(rows):
    mask = random_tree(rows, np.random.default_rng(rows))
    depth = mask.sum(1).astype(np.int32) - 1
    paths = np.asarray(paths_of(jnp.asarray(mask), jnp.asarray(depth)))
    for node in range(rows):
        assert paths[node, :depth[node] + 1].tolist() == np.flatnonzero(mask[node]).tolist()


def check(shape: tuple, dtype, config: Config | None, implementation: str, tolerance: float) -> None:
    """Compares with `dense`; cache rows past the live ones hold NaN."""
    rows, heads, kv_heads, head_dim, length, max_len = shape
    rng = np.random.default_rng(shape)
    q = jnp.asarray(rng.normal(size=(rows, heads, head_dim)), dtype)
    k, v = (jnp.asarray(rng.normal(size=(max_len, kv_heads, head_dim)), dtype) for _ in "kv")
    mask = random_tree(rows, rng)
    live = length + rows
    expected = dense(*(np.asarray(array.astype(jnp.float32)) for array in (q, k[:live], v[:live])), length, mask,
                     head_dim ** -0.5)
    k, v = (cache.at[live:].set(jnp.nan) for cache in (k, v))
    out = attend(q, k, v, length, mask, config=config, implementation=implementation)
    assert out.dtype == dtype
    assert relative_error(out.astype(jnp.float32), expected) < tolerance


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("shape", "config"), [
    ((1, 4, 4, 64, 37, 300), None), ((7, 9, 3, 16, 130, 200), Config(slabs=3, splits=2)),
    ((60, 8, 2, 16, 200, 300), None), ((2, 40, 2, 16, 0, 64), Config(slabs=2, splits=1)),
    ((5, 8, 1, 128, 59, 64), None), ((3, 4, 2, 16, 700, 800), Config(splits=3))])
def test_equals_dense_softmax(shape, config, implementation):
    check(shape, jnp.float32, config, implementation, 5e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float16, 2e-3), (jnp.bfloat16, 1.5e-2)])
def test_half_precision(dtype, tolerance, implementation):
    check((7, 6, 2, 32, 150, 200), dtype, None, implementation, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 8, 128), (64, 8, 128), (9, 3, 64), (32, 1, 64)])
@pytest.mark.parametrize("rows", [1, 8, 30, 60, 64])
def test_real_sizes_on_gpu(rows, heads, kv_heads, head_dim):
    for length in (0, 512, 3000):
        check((rows, heads, kv_heads, head_dim, length, 4096), jnp.float16, None, "kernel", 2e-3)


class Sequence:
    """Queries, keys and values of the positions of one sequence, and attention over it from any tree that holds it."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int, dtype, implementation: str):
        self.rng, self.dtype, self.implementation = np.random.default_rng(heads), dtype, implementation
        self.q, self.k, self.v = (self.noise(640, count, head_dim) for count in (heads, kv_heads, kv_heads))

    def noise(self, *shape: int) -> np.ndarray:
        return np.array(jnp.asarray(self.rng.normal(size=shape), self.dtype))

    def outputs(self, length: int, mask: np.ndarray, nodes: list[int]) -> np.ndarray:
        """Of the nodes of one path, which hold the positions from `length` on; all other nodes hold noise."""
        rows, positions = len(mask), slice(length, length + len(nodes))
        q, k, v = (self.noise(rows, *array.shape[1:]) for array in (self.q, self.k, self.v))
        q[nodes], k[nodes], v[nodes] = self.q[positions], self.k[positions], self.v[positions]
        caches = [np.full_like(whole, np.nan) for whole in (self.k, self.v)]
        for cache, committed, tail in zip(caches, (self.k, self.v), (k, v), strict=True):
            cache[:length], cache[length:length + rows] = committed[:length], tail
        out = attend(*map(jnp.asarray, (q, *caches)), length, mask, implementation=self.implementation)
        return np.asarray(out.astype(jnp.float32))[nodes]

    def check(self, length: int, count: int) -> None:
        """Plain decoding of `count` positions, a chain of them, a chain that began earlier, and trees around them."""
        expected = np.concatenate([self.outputs(p, np.eye(1, dtype=bool), [0]) for p in range(length, length + count)])
        chain = np.tri(count, dtype=bool)
        np.testing.assert_array_equal(self.outputs(length, chain, list(range(count))), expected)
        before = min(length, MOST_DEPTH + 1 - count)
        longer = np.tri(before + count, dtype=bool)
        found = self.outputs(length - before, longer, list(range(before + count)))
        np.testing.assert_array_equal(found[before:], expected)
        for _ in range(2):
            mask, nodes = self.tree(60, count)
            np.testing.assert_array_equal(self.outputs(length, mask, nodes), expected)

    def tree(self, size: int, count: int) -> tuple[np.ndarray, list[int]]:
        """A random tree and a path of `count` nodes in it, the root first."""
        nodes = [0, *sorted(self.rng.choice(np.arange(1, size), count - 1, replace=False).tolist())]
        mask = np.eye(size, dtype=bool)
        for node in range(1, size):
            above = nodes[nodes.index(node) - 1] if node in nodes else self.rng.integers(max(0, node - 4), node)
            mask[node] |= mask[above]
        return mask, nodes


@pytest.mark.parametrize("implementation", EXACT)
@pytest.mark.parametrize(("dtype", "length"), [
    (jnp.float16, 61), (jnp.bfloat16, 126),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in ((jnp.float16, 0), (jnp.float32, 200)))])
def test_a_row_has_the_same_bits_in_any_tree(dtype, length, implementation):
    Sequence(6, 2, 16, dtype, implementation).check(length, 5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 8, 128), (64, 8, 128), (9, 3, 64), (32, 1, 64)])
def test_a_row_has_the_same_bits_in_any_tree_on_gpu(heads, kv_heads, head_dim, dtype):
    sequence = Sequence(heads, kv_heads, head_dim, dtype, "kernel")
    for length in (0, 1, 30, *range(62, 67), *range(126, 131), 255, 500, 570):
        sequence.check(length, 7)


@pytest.mark.parametrize(("rows", "heads", "kv_heads", "head_dim"), [
    (1, 32, 8, 128), (60, 32, 8, 128), (64, 64, 8, 128), (1, 9, 3, 64), (60, 9, 3, 64), (2, 32, 1, 64)])
def test_lowers_to_two_launches(rows, heads, kv_heads, head_dim):
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
        cache = jax.ShapeDtypeStruct((2048, kv_heads, head_dim), dtype)
        depth = jax.ShapeDtypeStruct((rows,), jnp.int32)
        avals = (jax.ShapeDtypeStruct((rows, heads, head_dim), dtype), cache, cache, jax.ShapeDtypeStruct((), jnp.int32),
                 depth, jax.ShapeDtypeStruct((rows, rows), jnp.int32))
        assert launches(cuda_text(lambda *operands: ordered_attention(*operands, implementation="kernel"), *avals)) == 2


def test_names_the_offending_array():
    q, cache, length = jnp.zeros((3, 4, 16)), jnp.zeros((8, 2, 16)), jnp.int32(0)
    depth, mask = jnp.arange(3, dtype=jnp.int32), jnp.tri(3, dtype=bool)
    paths = tree_paths(mask, depth)
    with pytest.raises(ValueError, match=r"depth is float32\[3\]; expected int32\[3\]"):
        ordered_attention(q, cache, cache, length, depth.astype(jnp.float32), paths)
    with pytest.raises(ValueError, match=r"paths are int32\[2, 3\]; expected int32\[3, D\]"):
        ordered_attention(q, cache, cache, length, depth, paths[:2])
    with pytest.raises(ValueError, match=r"mask is bool\[3, 2\], depth int32\[3\]; expected bool\[T, T\] and int32\[T\]"):
        tree_paths(mask[:, :2], depth)
    for implementation in ("reference", "interpret"):
        with pytest.raises(ValueError, match=r"v_cache has shape \[7, 2, 16\]; expected k_cache's \[8, 2, 16\]"):
            ordered_attention(q, cache, cache[:7], length, depth, paths, implementation=implementation)
    with pytest.raises(ValueError, match="head_dim is 24; the kernel expects a power of two"):
        ordered_attention(jnp.zeros((3, 4, 24)), jnp.zeros((8, 2, 24)), jnp.zeros((8, 2, 24)), length, depth, paths,
                          implementation="interpret")


@pytest.mark.parametrize("name", ["slabs", "splits"])
def test_config_names_the_offending_field(name):
    with pytest.raises(ValueError, match=f"{name} is 0; expected at least 1"):
        Config(**{name: 0})
