"""Products of half-precision activations with per-channel 8-bit weights."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from pallas_kernels import dense, launch, transposed
from pallas_kernels.w8a16 import kernel, reference


def matmul_partials(x: Float[Array, "M K"], values: Int8[Array, "N K"], scales: Float[Array, "N"], *,
                    config: kernel.Config | None = None, implementation: str | None = None, reproducible: bool = False
                    ) -> Float[Array, "S M N"]:
    """x @ (values * scales)^T as split-K partial products whose sum over S is the product.

    S depends on the shapes and the device only. With `reproducible` it is the same for every number of rows up to
    `transposed.MAX_ROWS`, and so are the bits of a row; more rows give other bits, which depend on the shapes alone. `config`
    is then left out. The reference promises no bits.

    Args:
      x: f16 [M, K].
      values: int8[N, K], a row for each output.
      scales: f32[N].
      config: how the kernel is cut; default the tuned table of this device, then a heuristic.
      implementation: "reference", "kernel", "interpret", or None for the backend's own. The kernel takes up to 512 rows;
        more are multiplied by weights expanded to f16.

    Returns:
      f32[S, M, N]; products are accumulated in f32, and weights are exact in f16.

    Raises:
      ValueError: shapes or dtypes that do not fit each other, or an unknown implementation.
    """
    if x.ndim != 2 or x.shape[0] < 1 or x.dtype != jnp.float16:
        raise ValueError(f"x is {x.dtype}{list(x.shape)}; expected float16 [M, K] with M >= 1")
    if values.ndim != 2 or values.dtype != jnp.int8 or values.shape[1] != x.shape[1]:
        raise ValueError(f"values are {values.dtype}{list(values.shape)}; expected int8[N, {x.shape[1]}]")
    if scales.shape != values.shape[:1] or scales.dtype != jnp.float32:
        raise ValueError(f"scales are {scales.dtype}{list(scales.shape)}; expected float32[{values.shape[0]}]")
    chosen, (rows, inner), outputs = launch.choose(implementation), x.shape, values.shape[0]
    if chosen == "reference":
        return reference.matmul(x, values, scales)[None]
    if rows > transposed.MAX_ROWS:
        if reproducible:
            partials = dense.matmul_partials(x, values.astype(x.dtype), transposed=True, reproducible=True,
                                             implementation=implementation)
            return partials * scales
        return reference.matmul(x, values, scales)[None]
    if reproducible:
        config = transposed.in_one_order(_config(transposed.BLOCK_ROWS, inner, outputs), rows)
        config = dataclasses.replace(config, least_rows=16)
    return kernel.matmul_partials(x, values, scales, config=config or _config(rows, inner, outputs),
                                  interpret=chosen == "interpret")


def _config(rows: int, inner: int, outputs: int) -> kernel.Config:
    fields = launch.tuned("w8a16", tuning_key(rows, inner, outputs))
    return kernel.Config(**fields) if fields else kernel.heuristic(rows, inner, outputs)


def tuning_key(rows: int, inner: int, outputs: int) -> str:
    """What a tuned table calls [rows, inner] @ [inner, outputs]; rows up to the same power of two share a config."""
    return f"{inner}x{outputs}/m{transposed.tuned_rows(rows)}"
