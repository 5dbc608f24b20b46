"""The k best of a vocabulary with their log-probabilities, and of a few values."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import launch
from pallas_kernels.sequences import by_rows
from pallas_kernels.top_k import kernel, reference, small


def log_softmax_top_k(logits: Float[Array, "M V"], k: int, *, config: kernel.Config | None = None,
                      implementation: str | None = None) -> tuple[Float[Array, "M k"], Int32[Array, "M k"]]:
    """The k likeliest entries of each row, likeliest first, in two launches; ties go to the lower index.

    The kernel ranks logits. The reference ranks their f32 log-probabilities, in which logits that differ by less than
    a rounding may tie.

    Args:
      logits: f32, f16 or bf16 [M, V] without NaN, at least one of each row finite; -inf has probability zero.
      k: from 1 to V; above `kernel.MOST` the reference runs.
      config: how the kernel is cut; default the tuned table of this device, then a heuristic.
      implementation: "reference", "kernel", "interpret", or None for the backend's own.

    Returns:
      Log-probabilities f32[M, k] and their indices i32[M, k].

    Raises:
      ValueError: logits of another shape or dtype, a k outside 1 to V, or a config whose block is below k.
    """
    if logits.ndim != 2 or 0 in logits.shape or logits.dtype not in (jnp.float32, jnp.float16, jnp.bfloat16):
        raise ValueError(f"logits are {logits.dtype}{list(logits.shape)}; expected float32, float16 or bfloat16[M, V]")
    columns = logits.shape[1]
    if not 1 <= k <= columns:
        raise ValueError(f"k is {k}; expected 1 to {columns}")
    chosen = launch.choose(implementation)
    if chosen == "reference" or k > kernel.MOST:
        return reference.log_softmax_top_k(logits, k)
    if config and config.block < k:
        raise ValueError(f"block is {config.block}; expected at least k, {k}")

    def ranked(logits: Float[Array, "M V"]) -> tuple[Float[Array, "M k"], Int32[Array, "M k"]]:
        fields = None if config else launch.tuned("top_k", tuning_key(len(logits), columns, k))
        cut = config or (kernel.Config(**fields) if fields else kernel.heuristic(len(logits), columns, k))
        return kernel.log_softmax_top_k(logits, k, config=cut, interpret=chosen == "interpret")

    return by_rows(ranked)(logits)


def tuning_key(rows: int, columns: int, k: int) -> str:
    """What a tuned table calls the k best of [rows, columns]; rows up to the same power of two share a config."""
    return f"{columns}/k{k}/m{launch.power_of_two(rows)}"


def ranks(values: Float[Array, "C"], *, implementation: str | None = None) -> Int32[Array, "C"]:
    """Each value's place in descending order, ties to the lower index: the order of `jax.lax.top_k`.

    Every pair is compared, which suits up to a few thousand values on a GPU: one launch, and no call of a sorting
    library, which its graphs cannot capture. The reference sorts.

    Args:
      values: f32[C].
      implementation: "reference", "kernel", "interpret" (the kernel's plain jnp), or None for the backend's own.

    Returns:
      i32[C], a permutation of 0 to C - 1.

    Raises:
      ValueError: values of another shape or dtype.
    """
    _check_values(values)
    return small.sorted_ranks(values) if launch.choose(implementation) == "reference" else small.ranks(values)


def top_k_small(values: Float[Array, "C"], k: int, *, implementation: str | None = None
                ) -> tuple[Float[Array, "k"], Int32[Array, "k"]]:
    """Equals `jax.lax.top_k(values, k)`, by `ranks` in two launches on a GPU.

    Args:
      values: f32[C].
      k: from 1 to C.
      implementation: as in `ranks`.

    Returns:
      The k largest, f32[k] in descending order, and their indices i32[k].

    Raises:
      ValueError: values of another shape or dtype, or a k outside 1 to C.
    """
    _check_values(values)
    if not 1 <= k <= values.shape[0]:
        raise ValueError(f"k is {k}; expected 1 to {values.shape[0]}")
    if launch.choose(implementation) == "reference":
        best, indices = jax.lax.top_k(values, k)
        return best, indices.astype(jnp.int32)
    return small.top_k(values, k)


def _check_values(values: Array) -> None:
    if values.ndim != 1 or values.dtype != jnp.float32:
        raise ValueError(f"values are {values.dtype}{list(values.shape)}; expected float32[C]")
