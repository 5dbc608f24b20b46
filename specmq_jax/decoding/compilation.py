"""How decoding programs are compiled: JAX's persistent cache, and options that suit the device."""

import functools
import re

import jax

from specmq_jax.files import cache_directory

_PDL = "xla_gpu_enable_pdl"
_FIRST_WITH_PDL = 9  # compute capability of Hopper


def enable_persistent_cache() -> None:
    """Keeps compiled programs under the cache directory, unless the user has chosen a place (or none) of their own."""
    chosen = jax.config.values
    if chosen["jax_compilation_cache_dir"] is not None or not chosen["jax_enable_compilation_cache"]:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@functools.cache
def compiler_options() -> dict[str, bool]:
    """`compiler_options` of `jax.jit` for a decoding loop; empty where there is nothing to gain.

    A step is some hundreds of launches. From Hopper on, programmatic dependent launch sets up a kernel while the one
    before it ends.
    """
    device = jax.devices()[0]
    capability = re.match(r"(\d+)\.\d+$", str(getattr(device, "compute_capability", "")))
    if device.platform != "gpu" or capability is None or int(capability[1]) < _FIRST_WITH_PDL:
        return {}
    options = {_PDL: True}
    try:
        jax.jit(lambda x: x + 1, compiler_options=options).lower(jax.ShapeDtypeStruct((), "int32")).compile()
    except jax.errors.JaxRuntimeError:  # an XLA that has no such option
        return {}
    return options
