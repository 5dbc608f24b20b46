"""Products of 8-bit integers on the tensor cores.

Weights lie with K innermost, which is how the tensor core wants 8-bit operands.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Int32

from pallas_kernels import launch, transposed
from pallas_kernels.partials import sums_dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(transposed.Config):
    """How the product is cut. A share is exact; the shares' scaled sums are f32.

    Attributes:
      block_k: columns of K in a loop iteration, a power of two of at least 32.
    """

    block_k: int = 128

    def __post_init__(self):
        super().__post_init__()
        launch.check_powers_of_two(self, block_k=32)


def heuristic(rows: int, inner: int, outputs: int) -> Config:
    """A config that starts about three programs for each of about 132 SMs."""
    return transposed.three_an_sm(Config(), rows, inner, outputs)


def candidates(rows: int, inner: int, outputs: int) -> list[Config]:
    """Configs worth timing."""
    return transposed.byte_candidates(Config, rows, inner, outputs, block_k=(128, 256))


def _body(q_ref, row_scales_ref, values_ref, scales_ref, out_ref, *, config: Config, shares: int):
    rows, inner = q_ref.shape
    parts = transposed.cut(rows, inner, values_ref.shape[0], config, block_k=config.block_k, shares=shares)
    mine = parts[0]

    def step(block: Array, totals: list[Array]) -> list[Array]:
        column = mine.column(block)
        weights = transposed.load(values_ref, mine.output[:, None], column[None, :],
                                  transposed.both(mine.output_mask, mine.inside(column)))
        return transposed.accumulated(totals, weights, q_ref, column, parts)

    totals = jax.lax.fori_loop(mine.first, mine.last, step, transposed.zeros(parts, jnp.int32))
    scales = mine.per_output(scales_ref)
    for part, total in zip(parts, totals, strict=True):
        part.store(out_ref, scaled(total, scales, part.per_row(row_scales_ref)), rows)


def scaled(total: Int32[Array, "n m"], scales: Float[Array, "n"], row_scales: Float[Array, "m"]) -> Float[Array, "n m"]:
    """The product that a sum of codes' products stands for."""
    return total.astype(jnp.float32) * scales[:, None] * row_scales[None, :]


@functools.partial(jax.jit, static_argnames=("halves", "config", "interpret"))
def matmul_partials(q: Int8[Array, "M K"], row_scales: Float[Array, "M"], values: Int8[Array, "N K"],
                    scales: Float[Array, "N"], *, halves: bool, config: Config, interpret: bool
                    ) -> Float[Array, "S M N"]:
    """Scaled partial products over the shares of K; M at most `transposed.MAX_ROWS`."""
    shares = transposed.share_count(q.shape[1], config.block_k, config.split_k)
    return transposed.launch_product(
        functools.partial(_body, config=config, shares=shares), (q, row_scales, values, scales),
        outputs=values.shape[0], shares=shares, config=config, interpret=interpret, name="w8a8",
        out_dtype=sums_dtype(halves))
