"""What an RMSNorm still owes its rows: a factor that whatever reads their linear image multiplies by."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.finite import fits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowScale:
    """1 / sqrt(mean of a row's squares + eps), as the sums it is made of.

    Attributes:
      squares: f32[M, C], sums of squares of the C chunks of each row, added in order of C.
      columns: static, how many squares a row has.
      eps: static, added to their mean.
    """

    squares: Float[Array, "M C"]
    columns: int = dataclasses.field(metadata={"static": True})
    eps: float = dataclasses.field(metadata={"static": True})

    @property
    def values(self) -> Float[Array, "M"]:
        """The factors f32[M], spelled as additions that XLA fuses into whatever reads them."""
        total = self.squares[:, 0]
        for chunk in range(1, self.squares.shape[1]):
            total = total + self.squares[:, chunk]
        return inverse_rms(total, self.columns, self.eps)


def inverse_rms(square_sum: Float[Array, "..."], columns: int, eps: float) -> Float[Array, "..."]:
    """1 / sqrt(mean + eps) of `columns` squares that add up to `square_sum`; NaN where the sum is not finite."""
    # of an infinite sum the root's reciprocal would be 0, and the row would look like one of zeros
    return jax.lax.rsqrt(jnp.where(fits(square_sum, square_sum.dtype), square_sum, jnp.nan) / columns + eps)
