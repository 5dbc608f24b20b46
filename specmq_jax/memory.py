"""Finds too little device memory before anything is allocated."""

import jax

from specmq_jax.errors import UserError


def check_room(needed: int, purpose: str) -> None:
    """Raises a `UserError` where `needed` bytes exceed what the default device has free (unknown on CPUs: no check)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return
    free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if needed > free:
        raise UserError(f"{purpose} takes {needed / 1e9:.1f} GB, the device has {free / 1e9:.1f} GB free of "
                        f"{stats['bytes_limit'] / 1e9:.1f}; choose a lower precision, a shorter max_len or a larger device")
