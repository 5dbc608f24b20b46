"""Products of per-token 8-bit activations with 4-bit weights that are multiplied as 8-bit integers."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Int32, UInt8

from pallas_kernels import launch, transposed
from pallas_kernels.partials import stored, sums_dtype
from pallas_kernels.w4a8 import expansion, kernel, reference
from pallas_kernels.w4a8.layout import BLOCK, check_packed


def channel_partials(q: Int8[Array, "M K"], row_scales: Float[Array, "M"], sums: Int32[Array, "P M"] | None,
                     packed: UInt8[Array, "B N 64"], scales: Float[Array, "N"], offsets: Float[Array, "N"] | None, *,
                     halves: bool = False, config: kernel.Config | None = None,
                     implementation: str | None = None, reproducible: bool = False) -> Float[Array, "S M N"]:
    """q @ w^T times both scales with w = code * scale - offset, as split-K partial products.

    A partial product is exact in int32 and scaled in f32. S depends on the shapes and the device only; with `reproducible` it
    is the same for every number of rows up to 512, and so are the bits of a row. `config` is then left out.

    Args:
      q, row_scales, sums: from `w8a8.quantise_rows`; sums over P are of whole rows, where there are offsets.
      packed: uint8[ceil(K / 128), N, 64], from `pack`.
      scales: f32[N].
      offsets: f32[N], or None for 8 * scales.
      halves: gives the sums in f16, NaN beyond its range, which are half the bytes for a rounding like an activation's.
      config: how the kernel is cut; default the tuned table of this device, then a heuristic.
      implementation: "reference", "kernel", "interpret", or None for the backend's own. The kernel takes up to 512 rows; for
        more, another one makes integers of the codes, and XLA multiplies them.

    Returns:
      f32[S, M, N], f16 where `halves`.

    Raises:
      ValueError: shapes or dtypes that do not fit each other, or an unknown implementation.
    """
    _check_rows(q, row_scales, sums, None if offsets is None else "P")
    check_packed(packed, q.shape[1])
    for name, vector in (("scales", scales), ("offsets", offsets)):
        _check("float32", name, vector, jnp.float32, packed.shape[1:2])
    chosen = launch.choose(implementation)
    if chosen == "reference" or len(q) > transposed.MAX_ROWS:
        integers = _integers(packed, None, q.shape[1], offsets is not None, chosen)
        return stored(reference.channel_product(q, row_scales, sums, integers, scales, offsets), sums_dtype(halves))[None]
    config = config or _config(q, packed, "channel", offsets is not None, reproducible)
    return kernel.channel_partials(q, row_scales, sums if offsets is not None else None, packed, scales, offsets,
                                   halves=halves, config=config, interpret=chosen == "interpret")


def group_partials(q: Int8[Array, "M K"], row_scales: Float[Array, "M"], sums: Int32[Array, "G M"] | None,
                   packed: UInt8[Array, "B N 64"], groups: Int32[Array, "G N"], channel_scales: Float[Array, "N"],
                   saturates: Int32[Array, "1"] | None, *, halves: bool = False,
                   config: kernel.Config | None = None, implementation: str | None = None, reproducible: bool = False
                   ) -> Float[Array, "S M N"]:
    """The same with w = w8 * channel_scale, where groups of 128 codes stand for 8-bit integers w8.

    With scales alone, w8 = (code - 8) * scale, rounded half to even and held to [-128, 127] (QQQ, arXiv:2406.09904); with
    zeros, w8 = code * scale + zero, which must lie there (QoQ, arXiv:2405.04532).

    Args:
      q, row_scales, sums: from `w8a8.quantise_rows`; sums of 128 columns where there are zeros.
      packed: as in `channel_partials`.
      groups: i32[ceil(K / 128), N], from `pack_groups`.
      channel_scales: f32[N].
      saturates: i32[1] where there are scales alone: 0 says that no integer has to be held to 8 bits, which is cheaper (see
        `saturates`). None where there are zeros.
      halves, config, implementation, reproducible: as in `channel_partials`.

    Returns:
      f32[S, M, N], f16 where `halves`.

    Raises:
      ValueError: as `channel_partials`.
    """
    zeros = saturates is None
    _check_rows(q, row_scales, sums, -(-q.shape[-1] // BLOCK) if zeros else None)
    check_packed(packed, q.shape[1])
    _check("int32", "groups", groups, jnp.int32, (-(-q.shape[1] // BLOCK), packed.shape[1]))
    _check("float32", "channel_scales", channel_scales, jnp.float32, packed.shape[1:2])
    _check("int32", "saturates", saturates, jnp.int32, (1,))
    chosen = launch.choose(implementation)
    if chosen == "reference" or len(q) > transposed.MAX_ROWS:
        integers = _integers(packed, groups, q.shape[1], zeros, chosen)
        return stored(reference.group_product(q, row_scales, integers, channel_scales), sums_dtype(halves))[None]
    config = config or _config(q, packed, "groups", zeros, reproducible)
    return kernel.group_partials(q, row_scales, sums if zeros else None, packed, groups, channel_scales, saturates,
                                 halves=halves, config=config, interpret=chosen == "interpret")


def tuning_key(rows: int, inner: int, outputs: int, scales: str, zeros: bool) -> str:
    """What a tuned table calls [rows, inner] @ [inner, outputs]; rows up to the same power of two share a config.

    `scales` is "channel" or "groups"; `zeros` says whether there are zero points.
    """
    return f"{inner}x{outputs}/{scales}{'-zeros' * zeros}/m{transposed.tuned_rows(rows)}"


def _integers(packed: UInt8[Array, "B N 64"], groups: Int32[Array, "G N"] | None, rows: int, with_zeros: bool, chosen: str
              ) -> Int8[Array, "N K"]:
    if chosen != "reference":
        return expansion.integers(packed, groups, inner=rows, with_zeros=with_zeros, interpret=chosen == "interpret")
    if groups is None:
        return reference.channel_integers(packed, rows, with_zeros=with_zeros)
    return reference.group_integers(packed, rows, groups, with_zeros=with_zeros)


def _config(q: Array, packed: Array, scales: str, zeros: bool, reproducible: bool) -> kernel.Config:
    (rows, inner), outputs = q.shape, packed.shape[1]

    def of(rows: int) -> kernel.Config:
        fields = launch.tuned("w4a8", tuning_key(rows, inner, outputs, scales, zeros))
        return kernel.Config(**fields) if fields else kernel.heuristic(rows, inner, outputs)

    # shares of K are exact: where they are the same, so are the bits
    return dataclasses.replace(of(rows), split_k=of(transposed.BLOCK_ROWS).split_k) if reproducible else of(rows)


def _check_rows(q: Array, row_scales: Array, sums: Array | None, parts: int | str | None) -> None:
    """`parts` is how many sums there are of a row, "P" for any number, None where none are needed."""
    if q.ndim != 2 or q.dtype != jnp.int8:
        raise ValueError(f"q is {q.dtype}{list(q.shape)}; expected int8[M, K]")
    _check("float32", "row_scales", row_scales, jnp.float32, q.shape[:1])
    if parts is None:
        return
    expected = f"int32[{parts}, {q.shape[0]}]"
    if sums is None:
        raise ValueError(f"sums are missing, which zero points need; expected {expected} from quantise_rows")
    if sums.dtype != jnp.int32 or sums.ndim != 2 or sums.shape[1] != q.shape[0] or parts not in ("P", sums.shape[0]):
        raise ValueError(f"sums is {sums.dtype}{list(sums.shape)}; expected {expected}")


def _check(kind: str, name: str, array: Array | None, dtype: Any, shape: tuple[int, ...]) -> None:
    if array is not None and (array.dtype != dtype or array.shape != shape):
        raise ValueError(f"{name} is {array.dtype}{list(array.shape)}; expected {kind}{list(shape)}")
