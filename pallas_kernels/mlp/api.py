"""The gated activation between the two products of an MLP."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.partials import add_up


def silu_mul(gate_up: Float[Array, "S M 2I"], *, out_dtype: jnp.dtype) -> Float[Array, "M I"]:
    """silu(gate) * up of SwiGLU (arXiv:2002.05202), with gate in columns [0, I) and up in [I, 2I).

    There is no Pallas form: every operation is elementwise over slices of one array, which XLA already turns into a
    single launch that reads each partial sum once.

    Args:
      gate_up: [S, M, 2I] partial sums, added in f32 in order of S.
      out_dtype: of the result.

    Returns:
      out_dtype[M, I].

    Raises:
      ValueError: not three axes, no partial sum, or an odd last axis.
    """
    if gate_up.ndim != 3 or gate_up.shape[0] < 1 or gate_up.shape[2] % 2:
        raise ValueError(f"gate_up has shape {list(gate_up.shape)}; expected [S, M, 2 * intermediate]")
    inner = gate_up.shape[2] // 2
    gate, up = add_up(gate_up[:, :, :inner]), add_up(gate_up[:, :, inner:])
    return (jax.nn.silu(gate) * up).astype(out_dtype)
