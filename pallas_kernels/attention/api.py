"""Attention of new rows over a key-value cache that already holds their own keys and values."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels import launch
from pallas_kernels.attention import kernel, mask, ordered, reference
from pallas_kernels.sequences import as_slots


def pack_mask(tree_mask: Bool[Array, "T C"]) -> Int32[Array, "T W"]:
    """Packs a tree's mask for `tree_attention`: bit j % 32 of word j // 32 in row i is tree_mask[i, j].

    Returns int32[T, ceil(C / 32)]. Raises ValueError for anything but bool[T, C].
    """
    if tree_mask.ndim != 2 or tree_mask.dtype != jnp.bool_:
        raise ValueError(f"mask is {tree_mask.dtype}{list(tree_mask.shape)}; expected bool[T, C]")
    return mask.pack(tree_mask)


def tree_attention(q: Float[Array, "T Hq d"], k_cache: Float[Array, "*B L Hkv d"], v_cache: Float[Array, "*B L Hkv d"],
                   length: Int32[Array, "*N"], mask_words: Int32[Array, "T W"], *, tail: int | None = None,
                   slots: Int32[Array, "*N"] | None = None, scale: float | None = None, window: int | None = None,
                   cap: float | None = None, config: kernel.Config | None = None, implementation: str | None = None
                   ) -> Float[Array, "T Hq d"]:
    """Attention of T rows of a draft tree whose keys and values stand at cache rows [length, length + tail).

    Row t sees every key below `length`, and key length + i when bit i of its mask is set. The rows may be the whole
    tree, or one level of a growing tree behind the levels before it. Query head h uses kv head
    h // (Hq / Hkv). The softmax is f32, and time follows length + tail, not L.

    With `slots` the rows are those of N sequences, T / N of each, one sequence behind the other; each has a length of its own,
    and its rows' masks speak of the keys behind it.

    Args:
      q: [T, Hq, d] in the caches' dtype.
      k_cache, v_cache: f16, bf16 or f32 [L, Hkv, d]; rows past length + tail may hold anything, NaN included. With slots
        [B, L, Hkv, d].
      length: i32 scalar, or i32[N] of N sequences; length + tail must not exceed L (a traced value cannot be checked).
      mask_words: int32[T, ceil(tail / 32)], from `pack_mask`.
      tail: columns of the mask; default T, or T / N.
      slots: i32 scalar or i32[N], where in the caches each sequence stands.
      scale: of the scores, positive; default 1 / sqrt(d).
      window: a row sees so many of its newest keys, itself included; None for all of them. The keys of its mask are then those
        of a path, itself last, and the row stands as far behind `length` as there are others.
      cap: scores s become cap * tanh(s / cap); None leaves them.
      config: how the kernel is cut; default the tuned table of this device, then a heuristic.
      implementation: "reference", "kernel", "interpret", or None for the backend's own. The kernel needs d to be a
        power of two of at least 16; for another one None is the reference.

    Returns:
      [T, Hq, d] in q's dtype; zeros for a row that sees no key.

    Raises:
      ValueError: shapes or dtypes that do not fit each other, or a head_dim that the kernel cannot take.
    """
    tail = q.shape[0] // _sequences(length) if tail is None else tail
    expected = (q.shape[0], -(-tail // mask.WORD))
    if mask_words.shape != expected or mask_words.dtype != jnp.int32:
        raise ValueError(f"mask_words are {mask_words.dtype}{list(mask_words.shape)}; expected int32{list(expected)}")
    return _attention(q, k_cache, v_cache, length, slots, mask_words, tail, scale, window, cap, config, implementation)


def causal_attention(q: Float[Array, "M Hq d"], k_cache: Float[Array, "*B L Hkv d"], v_cache: Float[Array, "*B L Hkv d"],
                     length: Int32[Array, "*N"], *, slots: Int32[Array, "*N"] | None = None, scale: float | None = None,
                     window: int | None = None, cap: float | None = None, config: kernel.Config | None = None,
                     implementation: str | None = None) -> Float[Array, "M Hq d"]:
    """Attention of M consecutive rows, or M / N of each sequence, whose keys and values stand at cache rows from `length` on.

    Row r of a sequence sees the keys j <= length + r. Everything else is as in `tree_attention`.
    """
    return _attention(q, k_cache, v_cache, length, slots, None, q.shape[0] // _sequences(length), scale, window, cap, config,
                      implementation)


def _sequences(length: Int32[Array, "*N"]) -> int:
    return 1 if jnp.ndim(length) == 0 else len(length)


def tuning_key(rows: int, heads: int, kv_heads: int, head_dim: int, dtype: jnp.dtype) -> str:
    """What a tuned table calls attention of these sizes; rows up to the same power of two share a config."""
    return f"{heads}x{kv_heads}x{head_dim}/{jnp.dtype(dtype)}/m{launch.power_of_two(rows)}"


def tree_paths(tree_mask: Bool[Array, "T T"], depth: Int32[Array, "T"]) -> Int32[Array, "T T"]:
    """A tree's paths for `ordered_attention`: entry [t, j] is the ancestor of node t at depth j, t itself at its own
    depth, and 0 below it.

    Raises ValueError for anything but bool[T, T] and int32[T].
    """
    rows = depth.shape[0] if depth.ndim == 1 else None
    if tree_mask.shape != (rows, rows) or tree_mask.dtype != jnp.bool_ or depth.dtype != jnp.int32:
        raise ValueError(f"mask is {tree_mask.dtype}{list(tree_mask.shape)}, depth {depth.dtype}{list(depth.shape)}; "
                         "expected bool[T, T] and int32[T]")
    return mask.paths(tree_mask, depth)


def ordered_attention(q: Float[Array, "T Hq d"], k_cache: Float[Array, "*B L Hkv d"], v_cache: Float[Array, "*B L Hkv d"],
                      length: Int32[Array, "*N"], depth: Int32[Array, "T"], paths: Int32[Array, "T D"], *,
                      slots: Int32[Array, "*N"] | None = None, scale: float | None = None, window: int | None = None,
                      cap: float | None = None, config: ordered.Config | None = None, implementation: str | None = None
                      ) -> Float[Array, "T Hq d"]:
    """Attention of a draft tree's T rows, in bits that depend on a row's own path alone.

    `tree_attention` with another order of summation: row t stands at position length + depth[t] and sees, in order of
    position, the keys below `length` and key length + paths[t, j] for each j <= depth[t]. On a GPU the result is the same
    for any T, any length and any order of nodes, as long as queries, keys and values of the positions are the same.

    Args:
      q, k_cache, v_cache, length, slots: as for `tree_attention`, with a tail of T or T / N.
      depth: int32[T], 0 for the root, at most `ordered.MOST_DEPTH` (a traced value cannot be checked).
      paths: int32[T, D], from `tree_paths`; D is more than the largest depth.
      scale, window, cap: as for `tree_attention`; the kernel has neither window nor cap, and the reference stands in for it.
      config: how the kernel is cut; default a heuristic.
      implementation: as for `tree_attention`.

    Returns:
      [T, Hq, d] in q's dtype.

    Raises:
      ValueError: shapes or dtypes that do not fit each other, or a head_dim that the kernel cannot take.
    """
    rows, heads, head_dim = q.shape if q.ndim == 3 else (None,) * 3
    if depth.shape != (rows,) or depth.dtype != jnp.int32:
        raise ValueError(f"depth is {depth.dtype}{list(depth.shape)}; expected int32[{rows}]")
    if paths.ndim != 2 or paths.shape[0] != rows or paths.dtype != jnp.int32:
        raise ValueError(f"paths are {paths.dtype}{list(paths.shape)}; expected int32[{rows}, D]")
    _check(q, k_cache, v_cache)
    _check_view(window, cap)
    chosen = _chosen(implementation, head_dim)
    scale = head_dim ** -0.5 if scale is None else scale
    *caches, lengths, slots = as_slots(k_cache, v_cache, length, slots, rows)
    if chosen == "reference" or window is not None or cap is not None:
        def one(slot: Array | int, length: Array, q: Array, depth: Array, paths: Array) -> Array:
            return reference.ordered_attention(q, *caches, slot, length, depth, paths, scale=scale, window=window, cap=cap)

        return reference.each_sequence(one, q, lengths, slots, depth, paths)
    _check_head_dim(head_dim)
    config = config or ordered.heuristic(rows // len(lengths), heads, k_cache.shape[-2], q.dtype)
    return ordered.attention(q, *caches, lengths, slots, depth, paths, scale=scale, config=config,
                             interpret=chosen == "interpret")


def _attention(q: Float[Array, "T Hq d"], k_cache: Float[Array, "*B L Hkv d"], v_cache: Float[Array, "*B L Hkv d"],
               length: Int32[Array, "*N"], slots: Int32[Array, "*N"] | None, mask_words: Int32[Array, "T W"] | None,
               tail: int, scale: float | None, window: int | None, cap: float | None, config: kernel.Config | None,
               implementation: str | None) -> Float[Array, "T Hq d"]:
    _check(q, k_cache, v_cache)
    rows, heads, head_dim = q.shape
    scale = head_dim ** -0.5 if scale is None else scale
    if scale <= 0:
        raise ValueError(f"scale is {scale}; expected a positive number")
    *caches, lengths, slots = as_slots(k_cache, v_cache, length, slots, rows)
    _check_view(window, cap)
    chosen = _chosen(implementation, head_dim)
    if chosen == "reference":
        def one(slot: Array | int, length: Array, q: Array, words: Array | None) -> Array:
            return reference.attention(q, *caches, slot, length, words, tail=tail, scale=scale, window=window, cap=cap)

        return reference.each_sequence(one, q, lengths, slots, mask_words)
    _check_head_dim(head_dim)
    if config is None:
        config = _config(rows, len(lengths), heads, k_cache, q.dtype, None if window is None else window + tail)
    return kernel.attention(q, *caches, lengths, slots, mask_words, tail=tail, scale=scale, window=window, cap=cap,
                            config=config, interpret=chosen == "interpret")


def _check_view(window: int | None, cap: float | None) -> None:
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; expected at least 1 key")
    if cap is not None and cap <= 0:
        raise ValueError(f"cap is {cap}; expected a positive number")


def _config(rows: int, sequences: int, heads: int, k_cache: Array, dtype: jnp.dtype, most: int | None) -> kernel.Config:
    """`most` keys are read of a sequence, or all that there are."""
    max_len, kv_heads, head_dim = k_cache.shape[-3:]
    max_len, fields = min(max_len, most or max_len), None
    if sequences == 1 and most is None:  # tables are of a single sequence, whose shares would be too many for several
        fields = launch.tuned("attention", tuning_key(rows, heads, kv_heads, head_dim, dtype))
    return kernel.Config(**fields) if fields else kernel.heuristic(rows // sequences, heads, kv_heads, max_len, dtype,
                                                                   sequences)


def _chosen(implementation: str | None, head_dim: int) -> str:
    """The implementation; where none is asked for, the reference for a head that the kernel can't take."""
    chosen = launch.choose(implementation)
    return chosen if implementation is not None or _suits_kernel(head_dim) else "reference"


def _suits_kernel(head_dim: int) -> bool:
    return head_dim >= 16 and launch.is_power_of_two(head_dim)


def _check_head_dim(head_dim: int) -> None:
    if not _suits_kernel(head_dim):
        raise ValueError(f"head_dim is {head_dim}; the kernel expects a power of two of at least 16")


def _check(q: Array, k_cache: Array, v_cache: Array) -> None:
    if q.ndim != 3 or q.shape[0] < 1:
        raise ValueError(f"q has shape {list(q.shape)}; expected [rows, heads, head_dim]")
    rows, heads, head_dim = q.shape
    rows = 1 if k_cache.ndim == 4 else rows  # of how many sequences they are is not known here
    if (k_cache.ndim not in (3, 4) or k_cache.shape[-1] != head_dim or heads % k_cache.shape[-2]
            or k_cache.shape[-3] < rows):
        raise ValueError(f"k_cache has shape {list(k_cache.shape)}; expected [at least {rows}, a divisor of {heads} "
                         f"heads, {head_dim}]")
    if v_cache.shape != k_cache.shape:
        raise ValueError(f"v_cache has shape {list(v_cache.shape)}; expected k_cache's {list(k_cache.shape)}")
    if k_cache.dtype not in (jnp.float16, jnp.bfloat16, jnp.float32):
        raise ValueError(f"k_cache is {k_cache.dtype}; expected float16, bfloat16 or float32")
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(f"q, k_cache and v_cache are {q.dtype}, {k_cache.dtype} and {v_cache.dtype}; "
                         "expected one dtype")
