"""What magnitudes a format holds, and the largest one of a weight."""

import dataclasses
import math
from typing import Self

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float

from specmq_jax.errors import UserError

_BLOCK_BYTES = 64 << 20
"""Of a host's array that are looked through at a time."""
_COARSE = 2.0 ** -17
"""Below it f16 is off by 2^-8 of a number and more; a matrix with nothing larger in it would not be the same matrix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """The magnitudes of weights that numbers of a dtype can stand for.

    Attributes:
      dtype: its name.
      least: of a weight's largest magnitude, unless that is zero.
      most: of any value.
    """

    dtype: str
    least: float
    most: float

    @classmethod
    def of(cls, dtype: jnp.dtype, *, codes: int = 1) -> Self:
        """The range of products of a code, of magnitude `codes` at the most, and a number of that dtype."""
        info = ml_dtypes.finfo(dtype)
        half_step = float(info.max) * float(info.eps) / 4  # what lies closer to the largest number is rounded to it
        return cls(dtype=str(jnp.dtype(dtype)), least=_COARSE * codes if info.bits == 16 and info.nmant == 10 else 0.0,
                   most=float(info.max) + half_step)

    def check(self, largest: float, name: str) -> None:
        """Refuses the weight called `name` whose largest magnitude is `largest`, NaN where a value is.

        Raises:
          UserError: it is not finite, or outside the range.
        """
        wider = "fp32" if self.dtype == "bfloat16" else "bf16 or fp32"
        if not math.isfinite(largest):
            raise UserError(f"{name} holds values that are not finite: the checkpoint is damaged")
        if largest > self.most and self.dtype == "float32":
            raise UserError(f"{name} holds values beyond the range of float32: the checkpoint is damaged")
        if largest > self.most:
            raise UserError(f"{name} holds values beyond the range of {self.dtype}; choose --precision={wider}")
        if 0 < largest < self.least:
            raise UserError(f"{name} holds values of at most {largest:.1e}, below the range of {self.dtype}; choose "
                            f"--precision={wider}")


def peak(values: Float[np.ndarray, "..."] | Float[Array, "..."]) -> float:
    """The largest magnitude; 0 where there is no value, NaN where one is not a number."""
    if not values.size:
        return 0.0
    return float(largest(values)) if isinstance(values, jax.Array) else _host_peak(values)


def largest(values: Float[Array, "..."]) -> Float[Array, ""]:
    """`peak` on the device, f32, NaN also for infinity; it can be traced. A maximum alone may pass over NaN there."""
    found = jnp.max(jnp.abs(values)).astype(jnp.float32)
    return jnp.where(jnp.isfinite(values).all(), found, jnp.nan)


def is_traced(tree: object) -> bool:
    """Whether any array of a tree has no values yet."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def _host_peak(values: Float[np.ndarray, "..."]) -> float:
    """By the bits: without its sign a float of larger magnitude is a larger integer, infinity and NaN the largest."""
    if values.dtype.itemsize not in (2, 4, 8) or not jnp.issubdtype(values.dtype, jnp.floating):
        return float(np.abs(values.astype(np.float64)).max())
    flat = (values.T if values.flags.f_contiguous else np.ascontiguousarray(values)).reshape(-1)
    bits = flat.view(f"u{flat.dtype.itemsize}")
    sign = bits.dtype.type(1) << bits.dtype.type(8 * flat.dtype.itemsize - 1)
    rows = _BLOCK_BYTES // flat.dtype.itemsize
    found = max((bits[start:start + rows] & ~sign).max() for start in range(0, bits.size, rows))
    return float(np.asarray([found], bits.dtype).view(flat.dtype)[0])
