"""Finds too little device memory before anything is allocated."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from specmq_jax.errors import UserError


class Room(NamedTuple):
    """Bytes of the default device: what is `free`, and the `limit` of what this process may take."""

    free: int
    limit: int


def room() -> Room | None:
    """What the default device has; None where it doesn't tell, as CPUs don't."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return Room(free=stats["bytes_limit"] - stats.get("bytes_in_use", 0), limit=stats["bytes_limit"])


def check_room(needed: int, purpose: str) -> None:
    """Raises a `UserError` where `needed` bytes exceed what the default device has free (unknown on CPUs: no check)."""
    found = room()
    if found is not None and needed > found.free:
        raise UserError(f"{purpose} takes {size(needed)}, the device has {size(found.free)} free of {size(found.limit)}; "
                        "choose a lower precision, a shorter max_len or a larger device")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Device memory of a run where it holds most.

    Attributes:
      parts: bytes by what takes them; parts of 0 bytes are not spoken of.
    """

    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def describe(self) -> str:
        """One line with each part, their sum, and what the device has free, where it tells."""
        found = room()
        return f"memory: {self._listed}: {size(self.total)}" + (f" of {size(found.free)} free" if found else "")

    def check(self) -> None:
        """Raises a `UserError` where the default device has less free (unknown on CPUs: no check)."""
        found = room()
        if found is not None and self.total > found.free:
            raise UserError(
                f"this takes {size(self.total)} of device memory ({self._listed}), the device has {size(found.free)} free "
                f"of {size(found.limit)}; choose a lower precision, a shorter cache or fewer methods, or let JAX use more of "
                "the device (XLA_PYTHON_CLIENT_MEM_FRACTION=0.95)")

    @property
    def _listed(self) -> str:
        return ", ".join(f"{name} {size(count)}" for name, count in self.parts.items() if count)


def tree_bytes(*trees: Any) -> int:
    """Bytes of the arrays in some trees, or of the arrays that their `jax.ShapeDtypeStruct`s stand for; one that occurs
    several times is counted once."""
    leaves = {id(leaf): leaf for leaf in jax.tree.leaves(trees)}
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values())


def size(count: int) -> str:
    """A number of bytes in MB or GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
