"""What a weight format is, and the logical weights that readers hand to it."""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

Weight = Any
"""A registered frozen dataclass of arrays, made by a `WeightFormat`."""


@dataclasses.dataclass(frozen=True)
class GroupedInt4:
    """A 4-bit weight as a toolkit stored it: w[k, n] = (q[k, n] - 8) * scales[k // group_size, n].

    Attributes:
      q: uint8[K, N], 0..15.
      scales: f16 or f32 [ceil(K / group_size), N]; [1, N] when group_size is -1. May be negative.
      group_size: rows of K that share a scale, -1 for all.
    """

    q: UInt8[np.ndarray, "K N"]
    scales: Float[np.ndarray, "G N"]
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.q.shape

    def dense(self) -> Float[Array, "K N"]:
        """The weight's values, f32[K, N]."""
        rows = self.q.shape[0]
        group = rows if self.group_size == -1 else self.group_size
        scales = jnp.repeat(jnp.asarray(self.scales, jnp.float32), group, axis=0)[:rows]
        return (jnp.asarray(self.q, jnp.float32) - 8) * scales


Logical = Float[np.ndarray, "K N"] | Float[Array, "K N"] | GroupedInt4
"""A weight before packing, [in, out]: plain values or a toolkit's integers with their scales."""


def dense_values(logical: Logical) -> Float[Array, "K N"]:
    """The values of a logical weight, in the dtype they were stored in (f32 for integers)."""
    return logical.dense() if isinstance(logical, GroupedInt4) else jnp.asarray(logical)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightFormat(abc.ABC):
    """How the weight of one linear layer is stored and multiplied; hashable, a static attribute of `Linear`."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The registered name, as users write it after `--precision=`."""

    @property
    @abc.abstractmethod
    def dtype(self) -> jnp.dtype:
        """Dtype of the activations that a model of this format passes between its layers."""

    @abc.abstractmethod
    def abstract(self, shape: tuple[int, int]) -> Weight:
        """The weight of a [K, N] layer with `jax.ShapeDtypeStruct` leaves."""

    @abc.abstractmethod
    def pack(self, logical: Logical) -> Weight:
        """Stores a logical [K, N] weight, quantising by round-to-nearest where it holds plain values."""

    @abc.abstractmethod
    def unpack(self, weight: Weight, shape: tuple[int, int]) -> Float[Array, "K N"]:
        """The values f32[K, N] that `matmul` multiplies by."""

    @abc.abstractmethod
    def matmul(self, x: Float[Array, "M K"], weight: Weight) -> Float[Array, "S M N"]:
        """x @ w in f32 as S partial sums, which the reader adds up (S = 1 where the product is whole)."""

    def init(self, key: jax.Array, shape: tuple[int, int]) -> Weight:
        """A random weight of the format for a [K, N] layer, normal with variance 1 / K."""
        values = jax.random.normal(key, shape, jnp.float32) * shape[0] ** -0.5
        return self.pack(values)
