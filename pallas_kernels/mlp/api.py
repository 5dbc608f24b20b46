"""The gated activation between the two products of an MLP."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import launch, transposed
from pallas_kernels.finite import narrowed
from pallas_kernels.mlp import kernel
from pallas_kernels.norm.row_scale import RowScale
from pallas_kernels.partials import add_up

MOST_PEAKED_ROWS = 64


def silu_mul(gate_up: Float[Array, "S M 2I"], *, out_dtype: jnp.dtype, row_scale: RowScale | None = None,
             with_peaks: bool = False, reproducible: bool = False, implementation: str | None = None
             ) -> tuple[Float[Array, "M I"], Float[Array, "M C"] | None]:
    """silu(gate) * up of SwiGLU (arXiv:2002.05202), with gate in columns [0, I) and up in [I, 2I).

    Alone it has no Pallas form: every operation is elementwise over slices of one array, which XLA already turns into a
    single launch that reads each partial sum once. With the peaks it is a kernel.

    Args:
      gate_up: [S, M, 2I] partial sums, added in f32 in order of S.
      out_dtype: of the result.
      row_scale: a factor that gate_up's rows are still owed.
      with_peaks: also finds what `w8a8.quantise_rows` asks for.
      reproducible: a row's bits are the same whatever other rows there are, for up to `transposed.MAX_ROWS`.
      implementation: "reference", "kernel", "interpret", or None for the backend's own.

    Returns:
      out_dtype[M, I], NaN beyond its range, and the largest magnitudes in C parts of each of its rows, f32[M, C], infinite for
      a NaN; None instead where they aren't wanted, in the reference, and for more than `MOST_PEAKED_ROWS`, whose rounding fills
      a GPU with a program a row, or than `transposed.MAX_ROWS` where that is asked for.

    Raises:
      ValueError: not three axes, no partial sum, an odd last axis, or an unknown implementation.
    """
    if gate_up.ndim != 3 or gate_up.shape[0] < 1 or gate_up.shape[2] % 2:
        raise ValueError(f"gate_up has shape {list(gate_up.shape)}; expected [S, M, 2 * intermediate]")
    chosen = launch.choose(implementation)
    most = transposed.MAX_ROWS if reproducible else MOST_PEAKED_ROWS
    if with_peaks and chosen != "reference" and gate_up.shape[1] <= most:
        return kernel.silu_mul(gate_up, row_scale, out_dtype=jnp.dtype(out_dtype), interpret=chosen == "interpret")
    inner = gate_up.shape[2] // 2
    gate, up = add_up(gate_up[:, :, :inner]), add_up(gate_up[:, :, inner:])
    if row_scale is not None:
        scale = row_scale.values[:, None]
        gate, up = gate * scale, up * scale
    return narrowed(jax.nn.silu(gate) * up, out_dtype), None
