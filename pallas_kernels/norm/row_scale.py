"""What an RMSNorm still owes its rows: a factor that whatever reads their linear image multiplies by."""

import dataclasses

import jax
from jaxtyping import Array, Float


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
    """1 / sqrt(mean + eps) of `columns` squares that add up to `square_sum`."""
    return jax.lax.rsqrt(square_sum / columns + eps)
