"""Where top-k and top-p cut a row of scores."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import launch
from pallas_kernels.nucleus import kernel, reference
from pallas_kernels.sequences import by_rows


def least_kept(scores: Float[Array, "M V"], top_k: Int32[Array, "M"], top_p: Float[Array, "M"], *, most: int = 0,
               config: kernel.Config | None = None, implementation: str | None = None) -> Float[Array, "M"]:
    """The least score of each row that stays, with its equals, when top-k and then top-p have cut the row.

    The `top_k` best stay first, equals of the last one with them. Of these the smallest set of best ones stays whose
    probability reaches `top_p`: softmax over the `top_k` best, of which the equals beyond them have no part. The best
    score of a row always stays.

    The kernel sorts nothing: a few launches narrow down where each row's threshold lies, and one more finds it. Sums of
    probabilities are added up in another order than the reference's, so that one whose sum is `top_p` but for a rounding
    may fall on the other side. What a row gives depends on its scores and settings, V and the config alone, not on M. Under
    `vmap` the rows of all sequences are one call.

    Args:
      scores: f32[M, V] without NaN: log-probabilities, or these but for a constant, whose best is 0 in each row.
      top_k: i32[M], how many stay; 0 keeps all, and so does V or more.
      top_p: f32[M] in (0, 1]; 1 keeps all.
      most: a number that no row's `top_k` exceeds and of which none is 0, which spares the reference a whole sort; 0 where
        there is none.
      config: how the kernel is cut; default the tuned table of this device, then a heuristic.
      implementation: "reference", "kernel", "interpret", or None for the backend's own.

    Returns:
      f32[M]: a score of the row, or a number between the least that stays and the next lower one; -inf where nothing is
      cut.

    Raises:
      ValueError: operands of other shapes or dtypes.
    """
    if scores.ndim != 2 or 0 in scores.shape or scores.dtype != jnp.float32:
        raise ValueError(f"scores are {scores.dtype}{list(scores.shape)}; expected float32[M, V]")
    for name, values, dtype in (("top_k", top_k, "int32"), ("top_p", top_p, "float32")):
        if values.shape != scores.shape[:1] or values.dtype != dtype:
            raise ValueError(f"{name} is {values.dtype}{list(values.shape)}; expected {dtype}[{len(scores)}]")
    chosen = launch.choose(implementation)
    columns = scores.shape[1]

    def found(scores: Float[Array, "M V"], top_k: Int32[Array, "M"], top_p: Float[Array, "M"]) -> Float[Array, "M"]:
        if chosen == "reference":
            return reference.least_kept(scores, top_k, top_p, most=most)
        fields = None if config else launch.tuned("nucleus", tuning_key(columns))
        cut = config or (kernel.Config(**fields) if fields else kernel.heuristic(columns))
        return kernel.least_kept(scores, top_k, top_p, config=cut, interpret=chosen == "interpret")

    return by_rows(found)(scores, top_k, top_p)


def tuning_key(columns: int) -> str:
    """What a tuned table calls rows of `columns`; their number has no part, for the sums of a row must not depend on it."""
    return str(columns)
