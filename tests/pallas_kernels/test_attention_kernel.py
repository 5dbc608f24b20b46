"""Tree and causal attention against a dense softmax in f64."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import IMPLEMENTATIONS, compiled, relative_error
from lowering import cuda_text, launches
from trees import dense, random_tree

from pallas_kernels.attention import Config, causal_attention, ordered_attention, pack_mask, tree_attention, tree_paths

# rows, query heads, kv heads, head_dim, committed length, cache rows
SHAPES = [
    ((1, 4, 4, 64, 37, 300), Config(splits=3)),
    ((7, 9, 3, 64, 93, 100), Config(splits=1, block_k=32)),
    ((60, 8, 2, 16, 200, 300), Config(splits=4, block_m=64, block_k=32)),
    ((100, 4, 1, 16, 0, 300), Config(splits=2, block_m=32)),
    ((5, 8, 1, 128, 59, 64), None),
]


def check(shape: tuple, dtype, kind: str, config: Config | None, implementation: str, *, scale: float | None = None,
          tolerance: float) -> None:
    """Compares with `dense`; cache rows past the live ones hold NaN."""
    rows, heads, kv_heads, head_dim, length, max_len = shape
    rng = np.random.default_rng(shape)
    q = jnp.asarray(rng.normal(size=(rows, heads, head_dim)), dtype)
    k, v = (jnp.asarray(rng.normal(size=(max_len, kv_heads, head_dim)), dtype) for _ in "kv")
    mask = np.tri(rows, dtype=bool) if kind == "causal" else random_tree(rows, rng)
    live = length + rows
    expected = dense(*(np.asarray(array.astype(jnp.float32)) for array in (q, k[:live], v[:live])), length, mask,
                     head_dim ** -0.5 if scale is None else scale)
    k, v = (cache.at[live:].set(jnp.nan) for cache in (k, v))
    options = dict(scale=scale, config=config, implementation=implementation)
    if kind == "causal":
        out = compiled(causal_attention, q, k, v, jnp.int32(length), **options)
    else:
        out = compiled(tree_attention, q, k, v, jnp.int32(length), pack_mask(jnp.asarray(mask)), **options)
    assert out.dtype == dtype
    assert relative_error(out.astype(jnp.float32), expected) < tolerance


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("rows", "tail", "length"), [(4, 16, 50), (10, 50, 3), (3, 7, 0)])
def test_one_level_of_a_growing_tree_equals_those_rows_of_the_whole_tree(rows, tail, length, implementation):
    rng = np.random.default_rng(tail)
    q = jnp.asarray(rng.normal(size=(rows, 4, 16)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(128, 2, 16)), jnp.float32) for _ in "kv")
    mask = random_tree(tail, rng)[-rows:]
    expected = dense(*(np.asarray(a) for a in (q, k[:length + tail], v[:length + tail])), length, mask, 0.25)
    k, v = (cache.at[length + tail:].set(jnp.nan) for cache in (k, v))
    out = compiled(tree_attention, q, k, v, jnp.int32(length), pack_mask(jnp.asarray(mask)), tail=tail,
                   config=Config(splits=2, block_k=16), implementation=implementation)
    assert relative_error(out, expected) < 5e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("length", [0, 70])
def test_a_key_that_is_no_number_reaches_the_rows_that_see_it_alone(length, ordered, implementation):
    """Of a node's key; committed keys are seen by all."""
    rng, rows, node = np.random.default_rng(length), 12, 4
    mask = random_tree(rows, rng)
    q = jnp.asarray(rng.normal(size=(rows, 4, 16)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(128, 2, 16)), jnp.float32) for _ in "kv")

    def attend(keys):
        if ordered:
            depth = jnp.asarray(mask.sum(1) - 1, jnp.int32)
            return compiled(ordered_attention, q, keys, v, jnp.int32(length), depth, tree_paths(jnp.asarray(mask), depth),
                            implementation=implementation)
        return compiled(tree_attention, q, keys, v, jnp.int32(length), pack_mask(jnp.asarray(mask)),
                        implementation=implementation)

    plain, hurt = np.asarray(attend(k)), np.asarray(attend(k.at[length + node, :, 3].set(jnp.nan)))
    sees = mask[:, node]
    assert 0 < sees.sum() < rows
    assert np.isnan(hurt[sees]).all()
    np.testing.assert_array_equal(hurt[~sees], plain[~sees])


@pytest.mark.parametrize("kind", ["tree", "causal"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("shape", "config"), SHAPES)
def test_equals_dense_softmax(shape, config, implementation, kind):
    check(shape, jnp.float32, kind, config, implementation, tolerance=5e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float16, 2e-3), (jnp.bfloat16, 1e-2)])
def test_half_precision_and_a_given_scale(dtype, tolerance, implementation):
    check((7, 6, 2, 32, 50, 100), dtype, "tree", Config(splits=2), implementation, scale=0.5, tolerance=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["tree", "causal"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 8, 128), (64, 8, 128), (9, 3, 64)])
@pytest.mark.parametrize("rows", [1, 8, 16, 30, 60, 64, 128])
def test_real_sizes_on_gpu(rows, heads, kv_heads, head_dim, kind):
    for length in (0, 512, 3000):
        check((rows, heads, kv_heads, head_dim, length, 4096), jnp.float16, kind, None, "kernel", tolerance=2e-3)


@pytest.mark.gpu
def test_a_prompt_on_gpu():
    check((700, 32, 8, 128, 100, 1024), jnp.float16, "causal", None, "kernel", tolerance=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [1, 7, 32])
@pytest.mark.parametrize(("block_m", "block_k", "num_warps"), [(16, 32, 1), (32, 128, 4), (64, 64, 8)])
def test_every_cut_on_gpu(block_m, block_k, num_warps, splits):
    config = Config(block_m=block_m, block_k=block_k, num_warps=num_warps, splits=splits)
    for kind in ("tree", "causal"):
        check((45, 9, 3, 64, 333, 400), jnp.float16, kind, config, "kernel", tolerance=2e-3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_that_sees_nothing_is_zero(implementation):
    ones = jnp.ones((2, 2, 16))
    words = pack_mask(jnp.array([[True, False], [False, False]]))
    out = tree_attention(ones, ones, ones, jnp.int32(0), words, config=Config(splits=2), implementation=implementation)
    np.testing.assert_allclose(out, np.stack([np.ones((2, 16)), np.zeros((2, 16))]), rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 100])
def test_pack_mask_puts_key_j_in_bit_j_of_its_word(rows):
    mask = np.random.default_rng(rows).random((rows, rows)) < 0.5
    words = np.asarray(jax.jit(pack_mask)(jnp.asarray(mask)))
    assert words.shape == (rows, -(-rows // 32))
    for i, j in np.ndindex(rows, rows):
        assert (int(words[i, j // 32]) >> (j % 32)) & 1 == mask[i, j]


def test_cpu_time_follows_the_live_length():
    q, cache = jnp.ones((4, 4, 64)), jnp.ones((65536, 2, 64))
    function = jax.jit(lambda length: causal_attention(q, cache, cache, length, implementation="reference"))

    def seconds(length: int) -> float:
        times = []
        for _ in range(20):  # the least of them, for other processes have a share of the machine
            start = time.perf_counter()
            function(jnp.int32(length)).block_until_ready()
            times.append(time.perf_counter() - start)
        return min(times)

    assert seconds(100) * 5 < seconds(65000)


@pytest.mark.parametrize(("rows", "heads", "kv_heads", "head_dim"), [
    (1, 32, 8, 128), (60, 32, 8, 128), (10, 64, 8, 128), (48, 64, 8, 128), (1, 9, 3, 64), (60, 9, 3, 64),
    (100, 9, 3, 64), (512, 32, 8, 128)])
def test_lowers_to_at_most_two_launches(rows, heads, kv_heads, head_dim):
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
        cache = jax.ShapeDtypeStruct((2048, kv_heads, head_dim), dtype)
        q = jax.ShapeDtypeStruct((rows, heads, head_dim), dtype)
        avals = (q, cache, cache, jax.ShapeDtypeStruct((), jnp.int32))
        words = jax.ShapeDtypeStruct((rows, -(-rows // 32)), jnp.int32)
        tree = cuda_text(lambda *operands: tree_attention(*operands, implementation="kernel"), *avals, words)
        causal = cuda_text(lambda *operands: causal_attention(*operands, implementation="kernel"), *avals)
        assert 1 <= launches(tree) <= 2 and 1 <= launches(causal) <= 2


def test_names_the_offending_array():
    q, cache, length = jnp.zeros((3, 4, 16)), jnp.zeros((8, 2, 16)), jnp.int32(0)
    words = pack_mask(jnp.eye(3, dtype=bool))
    with pytest.raises(ValueError, match=r"mask_words are int32\[2, 1\]; expected int32\[3, 1\]"):
        tree_attention(q, cache, cache, length, words[:2])
    with pytest.raises(ValueError, match=r"mask is int32\[3, 3\]; expected bool\[T, C\]"):
        pack_mask(jnp.eye(3, dtype=jnp.int32))
    with pytest.raises(ValueError, match=r"k_cache has shape \[8, 3, 16\]; expected \[at least 3, a divisor of 4"):
        causal_attention(q, jnp.zeros((8, 3, 16)), jnp.zeros((8, 3, 16)), length)
    with pytest.raises(ValueError, match=r"v_cache has shape \[7, 2, 16\]; expected k_cache's \[8, 2, 16\]"):
        causal_attention(q, cache, cache[:7], length)
    with pytest.raises(ValueError, match="float32, float16 and float16; expected one dtype"):
        causal_attention(q, cache.astype(jnp.float16), cache.astype(jnp.float16), length)
    with pytest.raises(ValueError, match="scale is -0.5; expected a positive number"):
        causal_attention(q, cache, cache, length, scale=-0.5)
    with pytest.raises(ValueError, match="head_dim is 24; the kernel expects a power of two"):
        causal_attention(jnp.zeros((3, 4, 24)), jnp.zeros((8, 2, 24)), jnp.zeros((8, 2, 24)), length,
                         implementation="interpret")


@pytest.mark.parametrize("fields", [{"block_m": 8}, {"block_k": 48}, {"splits": 0}])
def test_config_names_the_offending_field(fields):
    [(name, value)] = fields.items()
    with pytest.raises(ValueError, match=f"{name} is {value}; expected"):
        Config(**fields)
