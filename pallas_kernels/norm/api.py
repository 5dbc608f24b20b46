"""Residual addition and RMSNorm."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import launch
from pallas_kernels.norm import kernel, reference


def add_rms_norm(residual: Float[Array, "M D"], partials: Float[Array, "S M D"] | None, weight: Float[Array, "D"], *,
                 eps: float, out_dtype: jnp.dtype, config: kernel.Config | None = None,
                 implementation: str | None = None) -> tuple[Float[Array, "M D"], Float[Array, "M D"]]:
    """Adds a sub-block's output to the residual stream and normalises the sum, in one launch.

    RMSNorm is Zhang & Sennrich's (arXiv:1910.07467): x / sqrt(mean(x^2) + eps) * weight, without centring.

    Args:
      residual: f32[M, D].
      partials: [S, M, D] summands, added in order of S; None adds nothing.
      weight: f32[D].
      eps: added to the mean square.
      out_dtype: of the normalised rows; statistics are f32 throughout.
      config: launch parameters; default the tuned table of this device, then a heuristic.
      implementation: "reference", "kernel", "interpret", or None for the backend's own.

    Returns:
      The summed residual, f32[M, D], and its normalised form, out_dtype[M, D].

    Raises:
      ValueError: shapes that do not fit each other, or a residual or weight that is not f32.
    """
    if residual.ndim != 2 or residual.dtype != jnp.float32:
        raise ValueError(f"residual is {residual.dtype}{list(residual.shape)}; expected float32[M, D]")
    if partials is not None and (partials.ndim != 3 or partials.shape[0] < 1 or partials.shape[1:] != residual.shape):
        raise ValueError(f"partials have shape {list(partials.shape)}; expected [S, {residual.shape[0]}, "
                         f"{residual.shape[1]}]")
    if weight.shape != residual.shape[1:] or weight.dtype != jnp.float32:
        raise ValueError(f"weight is {weight.dtype}{list(weight.shape)}; expected float32[{residual.shape[1]}]")
    chosen = launch.choose(implementation)
    if chosen == "reference":
        return reference.add_rms_norm(residual, partials, weight, eps=eps, out_dtype=out_dtype)
    if config is None:
        fields = launch.tuned("norm", str(residual.shape[1]))
        config = kernel.Config(**fields) if fields else kernel.heuristic(residual.shape[1])
    return kernel.add_rms_norm(residual, partials, weight, eps=eps, out_dtype=out_dtype, config=config,
                               interpret=chosen == "interpret")
