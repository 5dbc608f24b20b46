"""JAX's persistent compilation cache, on by default."""

import jax

from specmq_jax.checkpoint import cache_directory


def enable_persistent_cache() -> None:
    """Keeps compiled programs under the cache directory, unless the user has chosen a place (or none) of their own."""
    if jax.config.jax_compilation_cache_dir is not None or not jax.config.jax_enable_compilation_cache:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
