"""The W8A16 product on the tensor cores: 8-bit weights become half-precision numbers in registers, on their way to it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int8

from pallas_kernels import launch, transposed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(transposed.Config):
    """How the product is cut.

    Attributes:
      block_k: columns of K in a loop iteration, a power of two of at least 32.
      least_rows: of x in a product, 8 or 16. A warpgroup's product has no fewer than 16, so that 8 are multiplied by another
        instruction, which may round in another order.
      inline_asm: converts in PTX, two weights an instruction; never in interpret mode.
    """

    block_k: int = 128
    num_stages: int = 3
    least_rows: int = 8
    inline_asm: bool = True

    def __post_init__(self):
        super().__post_init__()
        launch.check_powers_of_two(self, block_k=32)
        if self.least_rows not in (8, 16):
            raise ValueError(f"least_rows is {self.least_rows}; expected 8 or 16")


def heuristic(rows: int, inner: int, outputs: int) -> Config:
    """A config that starts about three programs for each of about 132 SMs."""
    # of 16 rows, two warps' products beat a warpgroup's, by 7 to 16 % on an H100
    return transposed.three_an_sm(Config(num_warps=2 if transposed.tuned_rows(rows) == 16 else 4), rows, inner, outputs)


def candidates(rows: int, inner: int, outputs: int) -> list[Config]:
    """Configs worth timing."""
    return transposed.byte_candidates(Config, rows, inner, outputs, block_k=(64, 128))


def _body(x_ref, values_ref, scales_ref, out_ref, *, config: Config, shares: int, interpret: bool):
    rows, inner = x_ref.shape
    parts = transposed.cut(rows, inner, values_ref.shape[0], config, block_k=config.block_k, shares=shares,
                           least_rows=config.least_rows)
    mine = parts[0]

    def step(block: Array, totals: list[Array]) -> list[Array]:
        column = mine.column(block)
        values = transposed.load(values_ref, mine.output[:, None], column[None, :],
                                 transposed.both(mine.output_mask, mine.inside(column)))
        weights = _halves(values, inline_asm=config.inline_asm and not interpret)
        return transposed.accumulated(totals, weights, x_ref, column, parts)

    totals = jax.lax.fori_loop(mine.first, mine.last, step, transposed.zeros(parts, jnp.float32))
    scales = mine.per_output(scales_ref)[:, None]
    for part, total in zip(parts, totals, strict=True):
        part.store(out_ref, total * scales, rows)


def _halves(values: Int8[Array, "n k"], *, inline_asm: bool) -> Float[Array, "n k"]:
    """The same numbers in f16.

    A byte with its uppermost bit inverted, or-ed into the mantissa of 1024, is that number plus 1152.
    """
    if not inline_asm:
        return values.astype(jnp.float16)
    asm = ("{ .reg .b32 t, a, b, c; xor.b32 t, $2, 0x80808080; mov.b32 c, 0x64806480; prmt.b32 a, t, 0x64646464, 0x4140; "
           "prmt.b32 b, t, 0x64646464, 0x4342; sub.f16x2 $0, a, c; sub.f16x2 $1, b, c; }")
    [halves] = plgpu.elementwise_inline_asm(asm, args=[values], constraints="=r,=r,r", pack=4,
                                            result_shape_dtypes=[jax.ShapeDtypeStruct(values.shape, jnp.float16)])
    return halves


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def matmul_partials(x: Float[Array, "M K"], values: Int8[Array, "N K"], scales: Float[Array, "N"], *, config: Config,
                    interpret: bool) -> Float[Array, "S M N"]:
    """Scaled partial products over the shares of K; M at most `transposed.MAX_ROWS`, x f16."""
    shares = transposed.share_count(x.shape[1], config.block_k, config.split_k)
    return transposed.launch_product(
        functools.partial(_body, config=config, shares=shares, interpret=interpret), (x, values, scales),
        outputs=values.shape[0], shares=shares, config=config, interpret=interpret, name="w8a16")
