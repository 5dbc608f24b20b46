"""Products of half-precision activations with symmetric 4-bit weights."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped, UInt8

from pallas_kernels import launch, transposed
from pallas_kernels.dense import api as dense
from pallas_kernels.partials import add_up, sums_dtype
from pallas_kernels.w4a16 import expansion, kernel, layout, reference

GROUP_SIZES = (32, 64, 128, -1)
_ACTIVATIONS = (jnp.float16, jnp.bfloat16, jnp.float32)


def pack(q: UInt8[Array, "K N"]) -> Int32[Array, "B N 16"]:
    """Packs codes 0..15 eight to a word, in the order of `layout`.

    Returns int32[ceil(K / 128), N, 16]; rows that pad K to a multiple of 128 have code 8, weight zero.
    Raises ValueError for anything but uint8[K, N]. Codes above 15 lose their upper bits.
    """
    if q.ndim != 2 or q.dtype != jnp.uint8:
        raise ValueError(f"q is {q.dtype}{list(q.shape)}; expected uint8[K, N]")
    return layout.pack(q)


def packed_shape(rows: int, columns: int) -> tuple[int, int, int]:
    """The shape of what `pack` makes of [rows, columns]."""
    return layout.packed_blocks(rows), columns, layout.WORDS


def unpack(packed: Int32[Array, "B N 16"], rows: int) -> UInt8[Array, "K N"]:
    """The codes uint8[rows, N] that `pack` was given. Raises ValueError when `packed` does not hold `rows` rows."""
    _check_packed(packed, rows)
    return layout.unpack(packed, rows)


def pack_scales(scales: Float[Array, "G N"]) -> Int32[Array, "H N"]:
    """Rounds the scales of groups to f16 and packs those of two groups into a word, in the order of `layout`.

    Returns int32[ceil(G / 2), N]. Raises ValueError for anything but f16 or f32 [G, N].
    """
    if scales.ndim != 2 or scales.dtype not in (jnp.float16, jnp.float32):
        raise ValueError(f"scales are {scales.dtype}{list(scales.shape)}; expected float16 or float32 [G, N]")
    return layout.pack_scales(scales)


def unpack_scales(words: Int32[Array, "H N"], groups: int) -> Float[Array, "G N"]:
    """The scales f32[groups, N] that `pack_scales` was given. Raises ValueError when the words hold another number."""
    if words.ndim != 2 or words.dtype != jnp.int32 or words.shape[0] != layout.scale_words(groups):
        raise ValueError(f"words are {words.dtype}{list(words.shape)}; expected int32[{layout.scale_words(groups)}, N] for "
                         f"{groups} groups")
    return layout.unpack_scales(words, groups)


def scales_shape(rows: int, columns: int, group_size: int) -> jax.ShapeDtypeStruct:
    """What a product takes as the scales of [rows, columns]: words for groups, plain f32 for one scale a column."""
    if group_size == -1:
        return jax.ShapeDtypeStruct((1, columns), jnp.float32)
    return jax.ShapeDtypeStruct((layout.scale_words(-(-rows // group_size)), columns), jnp.int32)


def matmul(x: Float[Array, "M K"], packed: Int32[Array, "B N 16"], scales: Shaped[Array, "H N"], *, group_size: int,
           out_dtype: jnp.dtype | None = None, config: kernel.Config | None = None,
           implementation: str | None = None) -> Float[Array, "M N"]:
    """x @ w with w[k, n] = (q[k, n] - 8) * scales[k // group_size, n].

    Args:
      x: f16, bf16 or f32 [M, K].
      packed: int32[ceil(K / 128), N, 16], from `pack`.
      scales: int32[ceil(groups / 2), N], from `pack_scales`; f32[1, N] when group_size is -1. Of either sign.
      group_size: 32, 64 or 128 rows of K, or -1 for one group a column.
      out_dtype: default x's.
      config: how the kernel is cut; default the tuned table of this device, then a heuristic.
      implementation: "reference", "kernel", "interpret", or None for the backend's own. The kernel takes up to 512
        rows of f16 and groups of 128, 128 rows of others; more rows, or f32, are multiplied by weights expanded into x's dtype.

    Returns:
      out_dtype[M, N]; products are accumulated in f32.

    Raises:
      ValueError: shapes or dtypes that do not fit each other, or an unknown group size or implementation.
    """
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    partials = _partials(x, packed, scales, group_size, jnp.dtype(jnp.float32), out_dtype, config, implementation)
    return (partials[0] if partials.shape[0] == 1 else add_up(partials)).astype(out_dtype)


def matmul_partials(x: Float[Array, "M K"], packed: Int32[Array, "B N 16"], scales: Shaped[Array, "H N"], *,
                    group_size: int, halves: bool = False, config: kernel.Config | None = None,
                    implementation: str | None = None, reproducible: bool = False) -> Float[Array, "S M N"]:
    """`matmul` with its split-K partial sums left to the consumer: f32[S, M, N] whose sum over S is the product.

    S >= 1 depends on the shapes and the device only, and each share is summed in a fixed order. With `reproducible` S and
    the bits of a row are the same for every number of rows up to `transposed.MAX_ROWS`; more rows give other bits, which
    depend on the shapes alone. `config` is then left out. The reference promises no bits. With `halves` the sums of f16
    products of more than 64 rows are in f16, NaN beyond its range, for a rounding like that of every activation.
    """
    sums = sums_dtype(halves and len(x) > transposed.BLOCK_ROWS and x.dtype == jnp.float16 and not reproducible)
    return _partials(x, packed, scales, group_size, sums, sums, config, implementation, reproducible=reproducible)


def tuning_key(rows: int, inner: int, columns: int, group_size: int) -> str:
    """What a tuned table calls [rows, inner] @ [inner, columns]; `rows` in one block of the accumulator share a config."""
    return f"{inner}x{columns}/g{group_size}/m{transposed.tuned_rows(rows)}"


def _partials(x: Float[Array, "M K"], packed: Int32[Array, "B N 16"], scales: Shaped[Array, "H N"], group_size: int,
              split_dtype: jnp.dtype, unsplit_dtype: jnp.dtype, config: kernel.Config | None, implementation: str | None, *,
              reproducible: bool = False) -> Float[Array, "S M N"]:
    """Partial sums of the kernel in the one dtype or the other; those of the reference and of many rows in f32."""
    _check(x, packed, scales, group_size)
    chosen = launch.choose(implementation)
    if chosen == "reference":
        return reference.matmul(x, packed, scales, group_size=group_size)[None]
    rows, inner = x.shape
    # programs of more rows take one product a block, of weights that are scaled as they are unpacked, and were compared with
    # the reference on a GPU for these alone
    grows = group_size == layout.BLOCK and x.dtype == jnp.float16
    most = transposed.MAX_ROWS if grows or reproducible else 2 * transposed.BLOCK_ROWS
    if rows > most or x.dtype == jnp.float32:
        weights = expansion.dequantise(packed, scales, inner=inner, group_size=group_size, dtype=x.dtype,
                                       interpret=chosen == "interpret")
        if reproducible:
            return dense.matmul_partials(x, weights, transposed=True, implementation=implementation)
        return jax.lax.dot_general(x, weights, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32,
                                   precision="highest" if x.dtype == jnp.float32 else None)[None]
    if reproducible:
        config = kernel.in_one_order(_config(transposed.BLOCK_ROWS, inner, packed.shape[1], group_size), rows)
    config = config or _config(rows if grows else min(rows, transposed.BLOCK_ROWS), inner, packed.shape[1], group_size)
    dtype = unsplit_dtype if kernel.shares(inner, config) == 1 else split_dtype
    return kernel.matmul_partials(x, packed, scales, group_size=group_size, out_dtype=dtype, config=config,
                                  interpret=chosen == "interpret")


def _config(rows: int, inner: int, columns: int, group_size: int) -> kernel.Config:
    fields = launch.tuned("w4a16", tuning_key(rows, inner, columns, group_size))
    return kernel.Config(**fields) if fields else kernel.heuristic(rows, inner, columns)


def _check(x: Array, packed: Array, scales: Array, group_size: int) -> None:
    if x.ndim != 2 or x.shape[0] < 1 or x.dtype not in _ACTIVATIONS:
        raise ValueError(f"x is {x.dtype}{list(x.shape)}; expected float16, bfloat16 or float32 [M, K] with M >= 1")
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size is {group_size}; expected one of {GROUP_SIZES}")
    inner = x.shape[1]
    _check_packed(packed, inner)
    expected = scales_shape(inner, packed.shape[1], group_size)
    if scales.shape != expected.shape or scales.dtype != expected.dtype:
        raise ValueError(f"scales are {scales.dtype}{list(scales.shape)}; expected {expected.dtype}{list(expected.shape)} "
                         f"for K = {inner} and group_size {group_size}")


def _check_packed(packed: Array, rows: int) -> None:
    blocks = layout.packed_blocks(rows)
    if packed.ndim != 3 or packed.dtype != jnp.int32 or (packed.shape[0], packed.shape[2]) != (blocks, layout.WORDS):
        raise ValueError(f"packed is {packed.dtype}{list(packed.shape)}; expected int32[{blocks}, N, {layout.WORDS}] for "
                         f"K = {rows}")
