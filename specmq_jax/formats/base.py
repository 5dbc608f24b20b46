"""What a weight format is."""

import abc
import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import transposed
from specmq_jax.formats.logical import Logical, Quantised, dense_values
from specmq_jax.formats.ranges import Range, is_traced, peak

MOST_REPRODUCIBLE_ROWS = transposed.MAX_ROWS
"""More rows are a prompt, which every format may multiply in another way."""

Weight = Any
"""A registered frozen dataclass of arrays, made by a `WeightFormat`."""


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

    @property
    def activation_bits(self) -> int:
        """Bits of an activation in the product: 8 where each token's are rounded, else 16 or more."""
        return 16

    @property
    def wants_peaks(self) -> bool:
        """Whether `matmul` has use for the largest magnitudes of its rows."""
        return self.activation_bits == 8

    @property
    def rounds_activations(self) -> bool:
        """Whether a last bit of an activation may become a whole step of the product where that is cheap to avoid: a decoder
        then attends so that no row's bits depend on other rows."""
        return False

    @abc.abstractmethod
    def abstract(self, shape: tuple[int, int]) -> Weight:
        """The weight of a [K, N] layer with `jax.ShapeDtypeStruct` leaves."""

    @property
    def range(self) -> Range:
        """The magnitudes that it can stand for."""
        return Range.of(jnp.float32)

    def pack(self, logical: Logical, *, name: str = "the weight") -> Weight:
        """Stores a logical [K, N] weight called `name`, quantising by round-to-nearest where it holds plain values, or integers
        that were made for another format.

        Raises:
          UserError: values that are not finite or outside `range`, parts that do not fit each other. Nothing can be raised
            over traced arrays; whoever traces this checks `ranges.largest` of the values.
        """
        concrete = not is_traced(_arrays(logical))
        if isinstance(logical, Quantised):
            if concrete:
                logical.check(name)
            if self._holds(logical):
                if concrete:
                    self.range.check(logical.peak(), name)
                return self._pack(logical)
            logical = dense_values(logical)
        if concrete:
            self.range.check(peak(logical), name)
        return self._pack(logical)

    def _holds(self, logical: Quantised) -> bool:
        """Whether the integers are stored as they are."""
        return False

    @abc.abstractmethod
    def _pack(self, logical: Logical) -> Weight:
        """`pack` of plain values, or of integers that the format holds."""

    @abc.abstractmethod
    def unpack(self, weight: Weight, shape: tuple[int, int]) -> Float[Array, "K N"]:
        """The values f32[K, N] that `matmul` multiplies by."""

    @abc.abstractmethod
    def matmul(self, x: Float[Array, "M K"], weight: Weight, *, peaks: Float[Array, "M C"] | None = None,
               halves: bool = False, reproducible: bool = False, implementation: str | None = None) -> Float[Array, "S M N"]:
        """x @ w as S partial sums, which the reader adds up in f32 (S = 1 where the product is whole).

        `peaks` are the largest magnitudes in C parts of each row of x, where they are known; 8-bit activations ask for them.
        The sums are f32, but f16 where `halves` allows them and they save time.
        With `reproducible`, a row's bits on a GPU are the same whatever other rows there are, for up to
        `MOST_REPRODUCIBLE_ROWS` of them. The kernels' `implementation` is the backend's own where it is None; the reference of
        dense weights can be differentiated.
        """

    def outputs(self, weight: Weight, kept: Int32[Array, "n"]) -> Weight:
        """The weight of some of the outputs alone; where each array has the outputs on its last axis."""
        return jax.tree.map(lambda leaf: leaf[..., kept], weight)

    def init(self, key: jax.Array, shape: tuple[int, int]) -> Weight:
        """A random weight of the format for a [K, N] layer, normal with variance 1 / K."""
        values = jax.random.normal(key, shape, jnp.float32) * shape[0] ** -0.5
        return self.pack(values)


def abstract_array(shape: tuple[int, ...], dtype: Any) -> Array:
    """What stands for an array in `WeightFormat.abstract`: a `jax.ShapeDtypeStruct`."""
    return cast(Array, jax.ShapeDtypeStruct(shape, dtype))


def _arrays(logical: Logical) -> list[Any]:
    fields = dataclasses.fields(logical) if isinstance(logical, Quantised) else ()
    return [getattr(logical, field.name) for field in fields] or [logical]
