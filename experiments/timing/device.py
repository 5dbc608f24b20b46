"""The device that figures are of: its name, and how fast it copies at this moment."""

import os
import platform
import time

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from specmq_jax.loading.memory import room

_LEAST_COPY = 256 * 2**20


def device_name() -> str:
    """The default device in words."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return f"CPU ({platform.machine()}, {os.cpu_count()} cores)"
    return device.device_kind


def device_bandwidth() -> float | None:
    """Bytes a second that the default device moves at this moment in a copy far larger than its caches, read and written; None
    where it has no room for one.

    A machine that others share is not as fast at every moment: measure it beside what it is compared with.
    """
    found = room()
    size = _LEAST_COPY if jax.default_backend() == "cpu" else 4 * _LEAST_COPY
    if found is not None:
        size = min(size, found.free // 4)
    if size < _LEAST_COPY:
        return None
    try:
        return _copy_speed(size)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


def _copy_speed(size: int) -> float:
    # enough repeats inside one call for dispatch and the first copy, into the loop's own buffer, to weigh little: a GPU copies
    # a gigabyte in half a millisecond, about what starting a call takes
    values, copies = jnp.ones(size // 4, jnp.float32), 8 if jax.default_backend() == "cpu" else 32

    def seconds() -> float:
        start = time.perf_counter()
        jax.block_until_ready(_copy(values, copies))
        return time.perf_counter() - start

    seconds()
    return 2 * size * copies / min(seconds() for _ in range(3))


@jax.jit
def _copy(values: Float[Array, "n"], repeats: int) -> Float[Array, "n"]:
    return jax.lax.fori_loop(0, repeats, lambda _, x: -x, values)
