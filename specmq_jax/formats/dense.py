"""Weights stored as floats."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dense, launch
from pallas_kernels.partials import add_up
from specmq_jax.formats.base import WeightFormat, abstract_array
from specmq_jax.formats.logical import Logical
from specmq_jax.formats.ranges import Range

_WIDE_COLUMNS = 16384
"""From here on XLA's own product reads a weight as fast as the memory allows."""
_LARGE, _PADDED_ROWS = 125_000_000, 16
"""Weights whose f32 copy takes half a GB, and the rows that a single one becomes before them."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
    """values: float[K, N]."""

    values: Float[Array, "K N"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseFormat(WeightFormat):
    """fp32, bf16 or fp16 weights and activations; products accumulate in f32."""

    kind: str

    @property
    def name(self) -> str:
        return self.kind

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype({"fp32": jnp.float32, "bf16": jnp.bfloat16, "fp16": jnp.float16}[self.kind])

    def abstract(self, shape: tuple[int, int]) -> Dense:
        return Dense(abstract_array(shape, self.dtype))

    @property
    def range(self) -> Range:
        return Range.of(self.dtype)

    def _pack(self, logical: Logical) -> Dense:
        return Dense(jnp.asarray(logical).astype(self.dtype))

    def unpack(self, weight: Dense, shape: tuple[int, int]) -> Float[Array, "K N"]:
        return weight.values.astype(jnp.float32)

    def matmul(self, x: Float[Array, "M K"], weight: Dense, *, peaks: Float[Array, "M C"] | None = None,
               halves: bool = False, reproducible: bool = False, implementation: str | None = None) -> Float[Array, "S M N"]:
        inner, columns = weight.values.shape
        if reproducible or self._fills_no_gpu(len(x), inner, columns, implementation):
            return dense.matmul_partials(x.astype(self.dtype), weight.values.astype(self.dtype), reproducible=reproducible,
                                         implementation=implementation)
        return self._product(x, weight.values, contract=0)[None]

    def transposed_matmul(self, x: Float[Array, "M K"], table: Float[Array, "N K"], *, reproducible: bool = False,
                          implementation: str | None = None) -> Float[Array, "M N"]:
        """x @ table^T in f32: an embedding table that serves as the output projection; options as in `matmul`."""
        if reproducible:
            return add_up(dense.matmul_partials(x.astype(self.dtype), table.astype(self.dtype), transposed=True,
                                                reproducible=True, implementation=implementation))
        if jax.default_backend() == "cpu":
            # a CPU is faster with the long side on the left: 5.0 ms instead of 7.2 for 4 rows and 49152 x 576 in f32
            return self._product(table, x, contract=1).T
        return self._product(x, table, contract=1)

    def _fills_no_gpu(self, rows: int, inner: int, columns: int, implementation: str | None) -> bool:
        """Whether XLA's product of a step's rows would need the split of K that the kernel does without a launch of its own."""
        return (launch.choose(implementation) != "reference" and self.kind != "fp32" and rows <= dense.MOST_ROWS
                and columns < _WIDE_COLUMNS and inner % 16 == 0)

    def _product(self, left: Float[Array, "M K"], right: Float[Array, "A B"], *, contract: int) -> Float[Array, "M N"]:
        precision = jax.lax.Precision.HIGHEST if self.kind == "fp32" else None
        # For a single row XLA also times a product by multiplication and reduction in f32, and makes an f32 copy of the weights
        # for it: 1.7 GB beside an lm_head of 0.5, and 0.6 with more rows. The barrier keeps XLA from seeing that one counts.
        alone = len(left) == 1 and right.size >= _LARGE and jax.default_backend() == "gpu"
        if alone:
            left = jnp.pad(left, ((0, _PADDED_ROWS - 1), (0, 0)))
        product = jax.lax.dot_general(left.astype(self.dtype), right.astype(self.dtype), (((1,), (contract,)), ((), ())),
                                      precision=precision, preferred_element_type=jnp.float32)
        return jax.lax.optimization_barrier(product)[:1] if alone else product
