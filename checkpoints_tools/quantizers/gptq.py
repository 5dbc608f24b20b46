"""GPTQ (Frantar et al., arXiv:2210.17323): a row's rounding error is made up for by the rows that are still to be rounded."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from checkpoints_tools.quantizers.grids import Grid, Level
from specmq_jax.errors import UserError
from specmq_jax.formats import Quantised

BLOCK = 128
"""Rows after which the errors reach the rows outside the block (Algorithm 1's B)."""
_MOST_DAMPING = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gptq:
    """How codes are chosen.

    Attributes:
      act_order: rows are rounded by falling mean square of their input, in groups whose levels come from the weight as it
        was ("static groups"), so that rows keep their place in what is stored. Else by their number, and a group's level
        comes from its rows as they are when the first of them is rounded.
      damping: share of the Hessian's mean diagonal that is added to its diagonal.
      search: levels are those of least error rather than those of the values' whole range.
    """

    act_order: bool = True
    damping: float = 0.01
    search: bool = True

    def quantise(self, weight: Float[Array, "K N"], hessian: Float[Array, "K K"], grid: Grid) -> Quantised:
        """The codes and scales for a layer's weight f32[K, N].

        An input that is zero in all of the calibration has no say in the others' rows, and its own are rounded to nearest.

        Args:
          weight: the layer's.
          hessian: f32[K, K], the mean over rows of x^T x, x being the layer's input.
          grid: the format's.

        Raises:
          UserError: the Hessian is not finite.
        """
        diagonal = np.asarray(jnp.diagonal(hessian))
        if not np.isfinite(diagonal).all():
            raise UserError("the inputs of a layer are not finite: the model's activations overflow on this calibration text")
        order = np.argsort(-diagonal, kind="stable") if self.act_order else np.arange(len(diagonal))
        order = jnp.asarray(order, jnp.int32)
        factor = self._factor(hessian, order)
        codes, levels, channel = _quantise(weight, factor, jnp.asarray(diagonal), order, grid=grid, gptq=self)
        return grid.logical(np.asarray(codes), Level(*map(np.asarray, levels)), np.asarray(channel))

    def _factor(self, hessian: Float[Array, "K K"], order: Int32[Array, "K"]) -> Float[Array, "K K"]:
        """`inverse_factor`, with more damping where it takes more to be positive definite."""
        damping = self.damping
        while damping <= _MOST_DAMPING:
            with jax.enable_x64(True):
                factor = inverse_factor(hessian, order, np.float64(damping))
            if bool(jnp.isfinite(factor).all()):
                return factor
            damping = max(10 * damping, 1e-4)
        raise UserError(f"the Hessian of a layer is not positive definite, even with damping {damping / 10:g}; give a longer "
                        "calibration text")


def reference_levels(weight: Float[Array, "K N"], importance: Float[Array, "K"], grid: Grid, search: bool
                     ) -> tuple[Level, Float[Array, "N"]]:
    """Every group's level [G, N] and every output's scale, from a weight as it is."""
    grouped, weighing = _grouped(weight, grid), _grouped(importance[:, None], grid)[..., 0]
    channel = grid.channel(grouped)
    if not search:
        return grid.level(grouped, channel, jnp.float32(1)), channel
    return jax.lax.map(lambda group: grid.search(*group, channel), (grouped, weighing)), channel


@jax.jit
def inverse_factor(hessian: Float[Array, "K K"], order: Int32[Array, "K"], damping: Float[Array, ""]) -> Float[Array, "K K"]:
    """The upper triangular U of the inverse Hessian U^T U, rows in `order`: f32 of f64 arithmetic, NaN where there is none.

    With the order of rows reversed, H = L L^T is one Cholesky factorisation, and U is L^-1 in the reversed order: the inverse
    itself, whose condition is the square of its factor's, is never made.
    """
    hessian = hessian.astype(jnp.float64)[order][:, order]
    diagonal = jnp.diagonal(hessian)
    dead = diagonal == 0
    # 1 for all-zero inputs: any number will do for a row that is correlated with none
    added = damping * jnp.where(dead.all(), 1, diagonal.sum() / jnp.maximum((~dead).sum(), 1)) + dead
    lower = jnp.linalg.cholesky((hessian + jnp.diag(added))[::-1, ::-1])
    inverse = jax.scipy.linalg.solve_triangular(lower, jnp.eye(len(hessian)), lower=True)
    return inverse[::-1, ::-1].astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("grid", "gptq"))
def _quantise(weight: Float[Array, "K N"], factor: Float[Array, "K K"], importance: Float[Array, "K"],
              order: Int32[Array, "K"], *, grid: Grid, gptq: Gptq) -> tuple[Float[Array, "K N"], Level, Float[Array, "N"]]:
    """Algorithm 1: codes [K, N] in the weight's own order of rows, levels [G, N] and the outputs' scales."""
    rows, _ = weight.shape
    size = rows if grid.group_size == -1 else grid.group_size
    reached = not gptq.act_order and grid.group_size != -1
    levels, channel = reference_levels(weight, importance, grid, gptq.search)
    padding = -rows % BLOCK
    left = jnp.pad(weight[order], ((0, padding), (0, 0)))
    weighing = jnp.pad(importance[order], (0, padding))
    factor = jnp.pad(factor, ((0, padding), (0, padding))) + jnp.diag((jnp.arange(rows + padding) >= rows).astype(jnp.float32))
    groups = jnp.pad(order // size, (0, padding), mode="edge")

    def block(number: Array, carry: tuple[Array, Array, Level]) -> tuple[Array, Array, Level]:
        left, codes, levels = carry
        start = number * BLOCK
        across = jax.lax.dynamic_slice_in_dim(factor, start, BLOCK, axis=0)
        within = jax.lax.dynamic_slice_in_dim(across, start, BLOCK, axis=1)

        def row(i: Array, carry: tuple[Array, Array, Array, Level]) -> tuple[Array, Array, Array, Level]:
            values, chosen, errors, levels = carry
            group = groups[start + i]
            if reached:
                begins = (i % size == 0) & (start + i < rows)
                levels = jax.lax.cond(begins, lambda: _set(levels, group, own_level(values, start, i)), lambda: levels)
            level = jax.tree.map(lambda part: part[group], levels)
            code = grid.codes(values[i], level, channel)
            error = (values[i] - grid.value(code, level, channel)) / within[i, i]
            # the row's own entry of U is on the diagonal, so it becomes its value on the grid
            return values - within[i][:, None] * error, chosen.at[i].set(code), errors.at[i].set(error), levels

        def own_level(values: Array, start: Array, i: Array) -> Level:
            mine = jax.lax.dynamic_slice_in_dim(values, i, size), jax.lax.dynamic_slice_in_dim(weighing, start + i, size)
            return grid.search(*mine, channel) if gptq.search else grid.level(mine[0], channel, jnp.float32(1))

        values = jax.lax.dynamic_slice_in_dim(left, start, BLOCK)
        zeros = jnp.zeros_like(values)
        _, chosen, errors, levels = jax.lax.fori_loop(0, BLOCK, row, (values, zeros, zeros, levels))
        left = left - jnp.matmul(across.T, errors, precision="highest")  # U is zero for the rows above
        return left, jax.lax.dynamic_update_slice_in_dim(codes, chosen, start, axis=0), levels

    _, codes, levels = jax.lax.fori_loop(0, len(left) // BLOCK, block, (left, jnp.zeros_like(left), levels))
    return jnp.zeros_like(weight).at[order].set(codes[:rows]), levels, channel


def _set(levels: Level, group: Array, level: Level) -> Level:
    return jax.tree.map(lambda all_groups, one: all_groups.at[group].set(one), levels, level)


def _grouped(values: Float[Array, "K N"], grid: Grid) -> Float[Array, "G g N"]:
    """Groups side by side, the last one filled up with zeros."""
    rows, columns = values.shape
    size = rows if grid.group_size == -1 else grid.group_size
    return jnp.pad(values, ((0, -rows % size), (0, 0))).reshape(-1, size, columns)
