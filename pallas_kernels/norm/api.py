"""Residual addition and RMSNorm."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import launch, transposed
from pallas_kernels.norm import kernel, reference
from pallas_kernels.norm.row_scale import RowScale

MOST_DEFERRED_ROWS = 64
_CHUNK = 512  # columns a program; the readers of the factor add up a row's chunks


def add_rms_norm(residual: Float[Array, "M D"], partials: Float[Array, "S M D"] | None, weight: Float[Array, "D"], *,
                 eps: float, out_dtype: jnp.dtype, reproducible: bool = False, config: kernel.Config | None = None,
                 implementation: str | None = None) -> tuple[Float[Array, "M D"], Float[Array, "M D"]]:
    """Adds a sub-block's output to the residual stream and normalises the sum, in one launch.

    RMSNorm is Zhang & Sennrich's (arXiv:1910.07467): x / sqrt(mean(x^2) + eps) * weight, without centring.

    Args:
      residual: f32[M, D].
      partials: [S, M, D] summands, added in order of S; None adds nothing.
      weight: f32[D].
      eps: added to the mean square.
      out_dtype: of the normalised rows; statistics are f32 throughout.
      reproducible: a row's bits are the same whatever other rows there are, as the kernel's are anyway.
      config: launch parameters; default the tuned table of this device, then a heuristic.
      implementation: "reference", "kernel", "interpret", or None for the backend's own.

    Returns:
      The summed residual, f32[M, D], and its normalised form, out_dtype[M, D].

    Raises:
      ValueError: shapes that do not fit each other, or a residual or weight that is not f32.
    """
    _check(residual, partials, weight)
    chosen = launch.choose(implementation)
    if chosen == "reference":
        return reference.add_rms_norm(residual, partials, weight, eps=eps, out_dtype=out_dtype, reproducible=reproducible)
    if config is None:
        fields = launch.tuned("norm", tuning_key(residual.shape[1]))
        config = kernel.Config(**fields) if fields else kernel.heuristic(residual.shape[1])
    return kernel.add_rms_norm(residual, partials, weight, eps=eps, out_dtype=out_dtype, config=config,
                               interpret=chosen == "interpret")


def add_rms_norm_deferred(residual: Float[Array, "M D"], partials: Float[Array, "S M D"] | None,
                          weight: Float[Array, "D"], *, eps: float, out_dtype: jnp.dtype, with_peaks: bool = False,
                          reproducible: bool = False, implementation: str | None = None
                          ) -> tuple[Float[Array, "M D"], Float[Array, "M D"], RowScale | None, Float[Array, "M C"] | None]:
    """`add_rms_norm` that leaves each row's factor to the readers of a linear function of it.

    A row's statistic needs the whole row, which one program would read alone while the GPU waits. Without it every
    chunk of a row has a program of its own; the readers of (x * weight) @ w multiply by the factor.

    Args:
      with_peaks: also finds what `w8a8.quantise_rows` asks for.
      reproducible: a row's bits are the same whatever other rows there are, for up to `transposed.MAX_ROWS`.
      residual, partials, weight, eps, out_dtype, implementation: as in `add_rms_norm`.

    Returns:
      The summed residual, f32[M, D]; out_dtype[M, D] and the factor that makes it the normalised rows, None where they
      are normalised already: in the reference, and for more than `MOST_DEFERRED_ROWS`, which fill a GPU as they are, or than
      `transposed.MAX_ROWS` where that is asked for.
      Values beyond out_dtype's range, which a factor of a later launch can't bring back, are NaN. Last the largest
      magnitudes of each chunk of these values, f32[M, C], infinite where one is NaN; None where there is no factor, or they
      aren't wanted.

    Raises:
      ValueError: as in `add_rms_norm`.
    """
    _check(residual, partials, weight)
    chosen = launch.choose(implementation)
    rows, columns = residual.shape
    if chosen == "reference" or rows > (transposed.MAX_ROWS if reproducible else MOST_DEFERRED_ROWS):
        return *add_rms_norm(residual, partials, weight, eps=eps, out_dtype=out_dtype, reproducible=reproducible,
                             implementation=chosen), None, None
    total, scaled, squares, *peaks = kernel.add_scale(
        residual, partials, weight, out_dtype=jnp.dtype(out_dtype), chunk=min(_CHUNK, launch.power_of_two(columns)),
        with_peaks=with_peaks, interpret=chosen == "interpret")
    return total, scaled, RowScale(squares, columns, eps), peaks[0] if with_peaks else None


def _check(residual: Array, partials: Array | None, weight: Array) -> None:
    if residual.ndim != 2 or residual.dtype != jnp.float32:
        raise ValueError(f"residual is {residual.dtype}{list(residual.shape)}; expected float32[M, D]")
    if partials is not None and (partials.ndim != 3 or partials.shape[0] < 1 or partials.shape[1:] != residual.shape):
        raise ValueError(f"partials have shape {list(partials.shape)}; expected [S, {residual.shape[0]}, "
                         f"{residual.shape[1]}]")
    if weight.shape != residual.shape[1:] or weight.dtype != jnp.float32:
        raise ValueError(f"weight is {weight.dtype}{list(weight.shape)}; expected float32[{residual.shape[1]}]")


def tuning_key(columns: int) -> str:
    """What a tuned table calls rows of `columns`."""
    return str(columns)
