"""The gated activation between the two products of an MLP."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.norm.row_scale import RowScale
from pallas_kernels.partials import add_up


def silu_mul(gate_up: Float[Array, "S M 2I"], *, out_dtype: jnp.dtype, row_scale: RowScale | None = None
             ) -> Float[Array, "M I"]:
    """silu(gate) * up of SwiGLU (arXiv:2002.05202), with gate in columns [0, I) and up in [I, 2I).

    There is no Pallas form: every operation is elementwise over slices of one array, which XLA already turns into a
    single launch that reads each partial sum once.

    Args:
      gate_up: [S, M, 2I] partial sums, added in f32 in order of S.
      out_dtype: of the result.
      row_scale: a factor that gate_up's rows are still owed.

    Returns:
      out_dtype[M, I].

    Raises:
      ValueError: not three axes, no partial sum, or an odd last axis.
    """
    if gate_up.ndim != 3 or gate_up.shape[0] < 1 or gate_up.shape[2] % 2:
        raise ValueError(f"gate_up has shape {list(gate_up.shape)}; expected [S, M, 2 * intermediate]")
    inner = gate_up.shape[2] // 2
    gate, up = add_up(gate_up[:, :, :inner]), add_up(gate_up[:, :, inner:])
    if row_scale is not None:
        scale = row_scale.values[:, None]
        gate, up = gate * scale, up * scale
    return (jax.nn.silu(gate) * up).astype(out_dtype)
