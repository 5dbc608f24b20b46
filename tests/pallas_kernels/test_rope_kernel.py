"""Rotary embedding and cache append against complex multiplication in f64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import IMPLEMENTATIONS, compiled, relative_error
from lowering import cuda_text, launches

from pallas_kernels.norm import RowScale
from pallas_kernels.rope import Config, rope_append


def problem(splits: int, rows: int, heads: int, kv_heads: int, head_dim: int, length: int, dtype=np.float32):
    """Operands of `rope_append` and the expected q, k and v rows; cos and sin vary from row to row."""
    rng = np.random.default_rng(rows + heads + length)
    qkv = rng.normal(size=(splits, rows, (heads + 2 * kv_heads) * head_dim)).astype(dtype)
    angle = (length + np.arange(rows))[:, None] * 10000.0 ** (-np.arange(0, head_dim, 2) / head_dim)
    total = qkv.astype(np.float64).sum(0).reshape(rows, heads + 2 * kv_heads, head_dim)
    half = head_dim // 2
    turned = (total[..., :half] + 1j * total[..., half:]) * np.exp(1j * angle)[:, None]
    turned = np.concatenate([turned.real, turned.imag], axis=-1)
    tables = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    return (qkv, *tables), (turned[:, :heads], turned[:, heads:-kv_heads], total[:, -kv_heads:])


def check(implementation: str, cache_dtype, max_len: int, shape: tuple, qkv_dtype=np.float32, config=None) -> None:
    _, rows, heads, kv_heads, head_dim, length = shape
    operands, (q, k, v) = problem(*shape, dtype=qkv_dtype)
    rng = np.random.default_rng(0)
    before = [jnp.asarray(rng.normal(size=(max_len, kv_heads, head_dim)), cache_dtype) for _ in "kv"]
    out_q, *after = compiled(rope_append, *map(jnp.asarray, operands), *before, jnp.int32(length), heads=heads,
                             kv_heads=kv_heads, head_dim=head_dim, config=config, implementation=implementation)
    tolerance = 2e-3 if cache_dtype == jnp.float16 else 2e-6
    assert out_q.dtype == cache_dtype
    assert relative_error(out_q, q) < tolerance
    for old, new, expected in zip(before, after, (k, v), strict=True):
        assert relative_error(new[length:length + rows], expected) < tolerance
        np.testing.assert_array_equal(new[:length], old[:length])
        np.testing.assert_array_equal(new[length + rows:], old[length + rows:])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("shape", "max_len"), [
    ((1, 1, 4, 4, 64, 0), 3), ((3, 7, 9, 3, 64, 20), 27), ((2, 60, 4, 1, 16, 5), 70), ((1, 5, 8, 1, 48, 1), 9)])
def test_rotates_and_writes_only_its_rows(shape, max_len, implementation):
    check(implementation, jnp.float32, max_len, shape)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_blocks_of_rows_and_half_precision(implementation):
    check(implementation, jnp.float16, 40, (2, 21, 4, 2, 32, 11), qkv_dtype=np.float16, config=Config(rows=8))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("rows", "chunks"), [(1, 1), (5, 3), (17, 8)])
def test_applies_the_factor_that_a_deferred_norm_owes(rows, chunks, implementation):
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 32}
    (qkv, cos, sin), _ = problem(2, rows, 4, 2, 32, 3)
    scale = RowScale(jnp.asarray(np.random.default_rng(0).uniform(1, 9, (rows, chunks)), jnp.float32), 64, 1e-5)
    factor = 1 / np.sqrt(np.asarray(scale.squares, np.float64).sum(1) / 64 + 1e-5)
    cache = jnp.zeros((32, 2, 32))
    owed = compiled(rope_append, jnp.asarray(qkv), cos, sin, cache, cache, jnp.int32(3), row_scale=scale,
                    implementation=implementation, **sizes)
    paid = compiled(rope_append, jnp.asarray(qkv * factor[:, None], jnp.float32), cos, sin, cache, cache, jnp.int32(3),
                    implementation="reference", **sizes)
    for out, expected in zip(owed, paid, strict=True):
        assert relative_error(out, expected) < 1e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 7e4])
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_numbers_beyond_the_range_are_none_and_values_stay_finite(part, value, implementation):
    """Head 1 of row 2 of each part: q and k become NaN, and for a value its key does, where attention hides it."""
    check_beyond(part, value, implementation)


def check_beyond(part: str, value: float, implementation: str, rows: int = 5) -> None:
    heads, kv_heads, head_dim = 4, 2, 32
    (qkv, cos, sin), _ = problem(1, rows, heads, kv_heads, head_dim, 3)
    first = {"q": 0, "k": heads, "v": heads + kv_heads}[part]
    qkv[0, 2, (first + 1) * head_dim + 7] = value
    cache = jnp.zeros((rows + 8, kv_heads, head_dim), jnp.float16)
    q, k, v = map(np.asarray, compiled(rope_append, jnp.asarray(qkv), cos, sin, cache, cache, jnp.int32(3), heads=heads,
                                       kv_heads=kv_heads, head_dim=head_dim, implementation=implementation))
    assert np.isfinite(v).all()
    wrong = {name: {tuple(place[:2]) for place in np.argwhere(~np.isfinite(array))} for name, array in (("q", q), ("k", k))}
    assert wrong == ({"q": {(2, 1)}, "k": set()} if part == "q" else {"q": set(), "k": {(3 + 2, 1)}})
    assert not np.isinf(q).any() and not np.isinf(k).any()  # whose exponential could be 0


@pytest.mark.gpu
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 7e4])
def test_numbers_beyond_the_range_on_gpu(value):
    for rows in (5, 200):
        for part in "qkv":
            check_beyond(part, value, "kernel", rows)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 8, 128), (64, 8, 128), (9, 3, 64)])
@pytest.mark.parametrize("rows", [1, 8, 16, 30, 60, 64, 128, 600])
def test_real_sizes_on_gpu(rows, heads, kv_heads, head_dim):
    for length in (0, 513):
        check("kernel", jnp.float16, 1200, (4, rows, heads, kv_heads, head_dim, length))


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 8, 128), (9, 3, 64)])
@pytest.mark.parametrize("rows", [1, 60, 512])
def test_is_one_launch_that_writes_the_caches_in_place(rows, heads, kv_heads, head_dim):
    def aval(shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    def function(*operands):
        return rope_append(*operands, heads=heads, kv_heads=kv_heads, head_dim=head_dim, implementation="kernel")

    cache = aval((1024, kv_heads, head_dim), jnp.float16)
    table = aval((rows, head_dim // 2))
    text = cuda_text(function, aval((4, rows, (heads + 2 * kv_heads) * head_dim)), table, table, cache, cache,
                     aval((), jnp.int32))
    assert launches(text) == 1
    assert text.count("output_operand_alias<") == 2


def test_names_the_offending_array():
    operands, _ = problem(1, 2, 4, 2, 8, 0)
    qkv, cos, sin = map(jnp.asarray, operands)
    cache = jnp.zeros((5, 2, 8))
    sizes = dict(heads=4, kv_heads=2, head_dim=8)
    with pytest.raises(ValueError, match=r"qkv has shape \[1, 2, 63\]; expected \[S, M, 64\] for 4 and 2 heads of 8"):
        rope_append(qkv[..., :63], cos, sin, cache, cache, jnp.int32(0), **sizes)
    with pytest.raises(ValueError, match=r"sin is float32\[2, 3\]; expected float32\[2, 4\]"):
        rope_append(qkv, cos, sin[:, :3], cache, cache, jnp.int32(0), **sizes)
    with pytest.raises(ValueError, match=r"k_cache has shape \[1, 2, 8\]; expected \[at least 2, 2, 8\]"):
        rope_append(qkv, cos, sin, cache[:1], cache[:1], jnp.int32(0), **sizes)
    with pytest.raises(ValueError, match=r"v_cache is float16\[5, 2, 8\]; expected k_cache's float32\[5, 2, 8\]"):
        rope_append(qkv, cos, sin, cache, cache.astype(jnp.float16), jnp.int32(0), **sizes)
    with pytest.raises(ValueError, match="rows is 3; expected a power of two"):
        Config(rows=3)
