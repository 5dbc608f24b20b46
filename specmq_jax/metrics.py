"""What an evaluation reports: speed, acceptance, equality of answers, and how near the device's memory bandwidth it came.

The definitions are those of SpecMQuant's evaluation (https://github.com/AI9Stars/SpecMQuant, `evaluation/`).
"""

import functools
import os
import platform
import statistics
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int64


def speed(new_tokens: Sequence[int], seconds: Sequence[float]) -> float:
    """Tokens a second of one question: its turns' tokens over its turns' decoding time."""
    return sum(new_tokens) / sum(seconds)


def speedup(speeds: Sequence[float], base: Sequence[float]) -> float:
    """Mean of the questions' speeds over that of the baseline's: a ratio of means, not a mean of ratios."""
    return statistics.fmean(speeds) / statistics.fmean(base)


def mean_accept_length(accept_lengths: Sequence[int]) -> float:
    """Tokens a round commits, the bonus token counted, over all rounds; 1.0 where there was none."""
    return statistics.fmean(accept_lengths) if len(accept_lengths) else 1.0


def accept_histogram(accept_lengths: Sequence[int]) -> Int64[np.ndarray, "L"]:
    """How many rounds accepted i + 1 tokens, at index i."""
    return np.bincount(np.asarray(accept_lengths, np.int64), minlength=2)[1:]


def identical_share(answers: Sequence[Sequence[int]], base: Sequence[Sequence[int]]) -> float:
    """Share of answers whose token ids are all equal to the baseline's.

    Raises:
      ValueError: the two have different numbers of answers, or none.
    """
    if len(answers) != len(base) or not len(base):
        raise ValueError(f"needs as many answers as the baseline's {len(base)}, and at least one; found {len(answers)}")
    return statistics.fmean(list(a) == list(b) for a, b in zip(answers, base, strict=True))


def device_name() -> str:
    """The default device in words."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return f"CPU ({platform.machine()}, {os.cpu_count()} cores)"
    return device.device_kind


@functools.cache
def device_bandwidth() -> float:
    """Bytes a second that the default device moves in a copy far larger than its caches, read and written; measured once."""
    size = 256 * 2**20 if jax.default_backend() == "cpu" else 1024 * 2**20
    # enough repeats inside one call for dispatch and the first copy, into the loop's own buffer, to weigh little
    values, repeats = jnp.ones(size // 4, jnp.float32), 32

    def seconds() -> float:
        start = time.perf_counter()
        jax.block_until_ready(_copy(values, repeats))
        return time.perf_counter() - start

    seconds()
    return 2 * size * repeats / min(seconds() for _ in range(3))


@jax.jit
def _copy(values: Float[Array, "n"], repeats: int) -> Float[Array, "n"]:
    return jax.lax.fori_loop(0, repeats, lambda _, x: -x, values)
