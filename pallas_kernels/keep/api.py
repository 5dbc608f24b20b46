"""What stays of a tree's rows in key-value caches once a path of it is accepted."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import launch
from pallas_kernels.keep import kernel, reference


def keep_path(caches: Sequence[Float[Array, "*B L H d"]], paths: Int32[Array, "*N P"], counts: Int32[Array, "*N"],
              lengths: Int32[Array, "*N"], *, slots: Int32[Array, "*N"] | None = None, config: kernel.Config | None = None,
              implementation: str | None = None) -> tuple[Float[Array, "*B L H d"], ...]:
    """Moves row length + path[j] to row length + j, for every j below count, in the keys and values of all layers.

    All rows are read before one is written. A row past the cache's end is neither read nor written. On a GPU the caches are
    updated in place when their buffers may be given up, and 64 of them are one launch.

    Args:
      caches: [L, heads, head_dim], or with slots [B, L, heads, head_dim]; all of one shape and dtype.
      paths: i32[P], or i32[N, P] of N sequences: nodes of a tree, of which those below count are not negative.
      counts: i32 scalar or i32[N], how many entries of a path move, at most P.
      lengths: i32 scalar or i32[N], the row of each tree's root.
      slots: i32 scalar or i32[N], where in the caches each sequence stands; no two in one.
      config: how launches are cut; default a heuristic.
      implementation: "reference", "kernel", "interpret", or None for the backend's own.

    Returns:
      The caches, in their order.

    Raises:
      ValueError: shapes or dtypes that do not fit each other, or a path that is longer than the cache.
    """
    if not caches:
        return ()
    shape = caches[0].shape
    _check(caches, paths, counts, lengths, slots)
    counts, lengths = jnp.atleast_1d(counts), jnp.atleast_1d(lengths)
    paths = paths.reshape(len(lengths), -1)
    slots = None if slots is None else jnp.atleast_1d(slots)
    stored = [cache.reshape(-1, *shape[-3:]) for cache in caches]
    chosen = launch.choose(implementation)
    if chosen == "reference":
        kept = reference.keep_path(stored, paths, counts, lengths, slots)
    else:
        if config is None:
            config = kernel.heuristic(paths.shape[1], shape[-2] * shape[-1], caches[0].dtype)
        kept = kernel.keep_path(stored, paths, counts, lengths, slots, config=config, interpret=chosen == "interpret")
    return tuple(cache.reshape(shape) for cache in kept)


def _check(caches: Sequence[Array], paths: Array, counts: Array, lengths: Array, slots: Array | None) -> None:
    first = caches[0]
    if first.ndim != (3 if slots is None else 4):
        raise ValueError(f"caches[0] has shape {list(first.shape)}; expected [B, L, heads, head_dim] with slots, and "
                         "[L, heads, head_dim] without")
    for i, cache in enumerate(caches):
        if cache.shape != first.shape or cache.dtype != first.dtype:
            raise ValueError(f"caches[{i}] is {cache.dtype}{list(cache.shape)}; expected caches[0]'s "
                             f"{first.dtype}{list(first.shape)}")
    sequences = () if slots is None else jnp.shape(slots)
    for name, values in (("counts", counts), ("lengths", lengths)):
        if jnp.shape(values) != sequences:
            raise ValueError(f"{name} has shape {list(jnp.shape(values))}; expected {list(sequences)}, one a sequence")
    if paths.shape[:-1] != sequences or paths.ndim != len(sequences) + 1 or not 0 < paths.shape[-1] <= first.shape[-3]:
        expected = ", ".join([*map(str, sequences), f"1 to {first.shape[-3]}"])
        raise ValueError(f"paths has shape {list(paths.shape)}; expected [{expected}]")
