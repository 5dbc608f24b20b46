"""Products with dense weights, of rows too few to fill a GPU, or in bits that do not depend on how many rows there are."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import launch
from pallas_kernels.dense import kernel, reference


def matmul_partials(x: Float[Array, "M K"], weights: Float[Array, "A B"], *, transposed: bool = False,
                    reproducible: bool = False, config: kernel.Config | None = None, implementation: str | None = None
                    ) -> Float[Array, "S M N"]:
    """x @ weights as split-K partial sums, which the consumer adds up: f32[S, M, N] whose sum over S is the product.

    With `reproducible` the kernel cuts K in one way for every M and multiplies slabs of 16 rows by one tensor-core
    instruction, so that a row's result has the same bits whatever other rows there are. XLA's own products choose another
    algorithm for other row counts, and may choose another in another program. The reference promises no bits.

    Args:
      x: f16, bf16 or f32 [M, K].
      weights: of x's dtype, [K, N], or [N, K] where `transposed`.
      transposed: the product is x @ weights^T.
      reproducible: see above; `config` is then left out.
      config: how the kernel is cut; default the tuned table of this device, then a heuristic.
      implementation: "reference", "kernel", "interpret", or None for the backend's own.

    Returns:
      f32[S, M, N]; S depends on the shapes, the dtype and the device only.

    Raises:
      ValueError: shapes or dtypes that do not fit each other, or an unknown implementation.
    """
    if x.ndim != 2 or x.shape[0] < 1 or x.dtype not in (jnp.float16, jnp.bfloat16, jnp.float32):
        raise ValueError(f"x is {x.dtype}{list(x.shape)}; expected float16, bfloat16 or float32 [M, K] with M >= 1")
    inner = x.shape[1]
    if weights.ndim != 2 or weights.shape[1 if transposed else 0] != inner or weights.dtype != x.dtype:
        raise ValueError(f"weights are {weights.dtype}{list(weights.shape)}; expected {x.dtype}"
                         f"{f'[N, {inner}]' if transposed else f'[{inner}, N]'}")
    chosen = launch.choose(implementation)
    if chosen == "reference":
        return reference.matmul(x, weights, transposed=transposed)[None]
    columns = weights.shape[0 if transposed else 1]
    if config is None:
        # one config for all rows, which no table has: another split would be other bits
        fields = None if reproducible else launch.tuned("dense", tuning_key(x.shape[0], inner, columns))
        config = kernel.Config(**fields) if fields else kernel.heuristic(inner, columns, x.dtype)
    return kernel.matmul_partials(x, weights, transposed=transposed, config=config, interpret=chosen == "interpret")


def tuning_key(rows: int, inner: int, columns: int) -> str:
    """What a tuned table calls [rows, inner] @ [inner, columns], in either half precision; rows up to the same power of two
    share a config."""
    return f"{inner}x{columns}/m{max(kernel.SLAB, launch.power_of_two(min(rows, kernel.MOST_ROWS)))}"
