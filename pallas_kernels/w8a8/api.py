"""Products of per-token 8-bit activations with per-channel 8-bit weights."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from pallas_kernels import launch, transposed
from pallas_kernels.partials import stored, sums_dtype
from pallas_kernels.w8a8 import kernel, reference, rounding


def quantise_rows(x: Float[Array, "M K"], *, peaks: Float[Array, "M C"] | None = None, sums: int | None = None,
                  implementation: str | None = None) -> tuple[Array, ...]:
    """Symmetric 8-bit codes of each row and its scale, its largest magnitude / 127 (Xiao et al., arXiv:2211.10438).

    A row times a positive factor has the same codes and that factor in its scale, up to the factor's own rounding.

    Args:
      x: f16, bf16 or f32 [M, K]; finite.
      peaks: f32[M, C], the largest magnitude in each of C parts that make up a row, from whatever wrote x; None looks for it
        here, which takes a program that reads the whole row.
      sums: to be added, which weights with zero points need: 128 for the codes of every 128 columns, -1 for those of a row.
      implementation: "reference", "kernel", "interpret", or None for the backend's own.

    Returns:
      Codes int8[M, K], rounded half to even, and scales f32[M]; a row of zeros has codes and scale zero. With
      `sums`, a third array: i32[ceil(K / 128), M], or i32[P, M] whose sum over P is a row's.

    Raises:
      ValueError: x or peaks of another shape or dtype, other sums, or an unknown implementation.
    """
    if x.ndim != 2 or 0 in x.shape or x.dtype not in (jnp.float16, jnp.bfloat16, jnp.float32):
        raise ValueError(f"x is {x.dtype}{list(x.shape)}; expected float16, bfloat16 or float32 [M, K]")
    if sums not in (None, -1, reference.GROUP):
        raise ValueError(f"sums is {sums}; expected None, -1 or {reference.GROUP}")
    if peaks is not None and (peaks.ndim != 2 or peaks.shape[0] != x.shape[0] or peaks.dtype != jnp.float32):
        raise ValueError(f"peaks are {peaks.dtype}{list(peaks.shape)}; expected float32[{x.shape[0]}, C]")
    chosen = launch.choose(implementation)
    if chosen != "reference":
        return rounding.quantise_rows(x, peaks, sums=sums, interpret=chosen == "interpret")
    codes, scales = reference.quantise_rows(x)
    return (codes, scales) if sums is None else (codes, scales, reference.sums(codes, sums))


def matmul_partials(q: Int8[Array, "M K"], row_scales: Float[Array, "M"], values: Int8[Array, "N K"],
                    scales: Float[Array, "N"], *, halves: bool = False, config: kernel.Config | None = None,
                    implementation: str | None = None, reproducible: bool = False) -> Float[Array, "S M N"]:
    """q @ values^T times both scales, as split-K partial products whose sum over S is the product.

    A partial product is exact in int32 and scaled in f32. S depends on the shapes and the device only; with `reproducible` it
    is the same for every number of rows up to 512, and so are the bits of a row. `config` is then left out.

    Args:
      q, row_scales: from `quantise_rows`.
      values: int8[N, K], a row for each output.
      scales: f32[N].
      halves: gives the sums in f16, NaN beyond its range, which are half the bytes for a rounding like an activation's.
      config: how the kernel is cut; default the tuned table of this device, then a heuristic.
      implementation: as in `quantise_rows`. The kernel takes up to 512 rows; the reference multiplies more.

    Returns:
      f32[S, M, N], f16 where `halves`.

    Raises:
      ValueError: shapes or dtypes that do not fit each other, or an unknown implementation.
    """
    if q.ndim != 2 or q.dtype != jnp.int8 or row_scales.shape != q.shape[:1] or row_scales.dtype != jnp.float32:
        raise ValueError(f"q is {q.dtype}{list(q.shape)} with scales {row_scales.dtype}{list(row_scales.shape)}; expected "
                         "int8[M, K] and float32[M]")
    if values.ndim != 2 or values.dtype != jnp.int8 or values.shape[1] != q.shape[1]:
        raise ValueError(f"values are {values.dtype}{list(values.shape)}; expected int8[N, {q.shape[1]}]")
    if scales.shape != values.shape[:1] or scales.dtype != jnp.float32:
        raise ValueError(f"scales are {scales.dtype}{list(scales.shape)}; expected float32[{values.shape[0]}]")
    chosen, (rows, inner), outputs = launch.choose(implementation), q.shape, values.shape[0]
    if chosen == "reference" or rows > transposed.MAX_ROWS:
        product = reference.product(q, values).astype(jnp.float32) * scales * row_scales[:, None]
        return stored(product, sums_dtype(halves))[None]
    if config is None:
        config = _config(rows, inner, outputs)
        if reproducible:  # shares of K are exact: where they are the same, so are the bits
            one = _config(transposed.BLOCK_ROWS, inner, outputs)
            config = dataclasses.replace(config, block_k=one.block_k, split_k=one.split_k)
    return kernel.matmul_partials(q, row_scales, values, scales, halves=halves, config=config,
                                  interpret=chosen == "interpret")


def _config(rows: int, inner: int, outputs: int) -> kernel.Config:
    fields = launch.tuned("w8a8", tuning_key(rows, inner, outputs))
    return kernel.Config(**fields) if fields else kernel.heuristic(rows, inner, outputs)


def tuning_key(rows: int, inner: int, outputs: int) -> str:
    """What a tuned table calls [rows, inner] @ [inner, outputs]; rows up to the same power of two share a config."""
    return f"{inner}x{outputs}/m{transposed.tuned_rows(rows)}"
