"""Arrays by name in one file with a checksum: what unfinished work keeps of itself, and nothing else reads."""

import contextlib
import pathlib
import zlib
from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Array
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from specmq_jax.errors import UserError
from specmq_jax.files import written


def save_leaves(path: pathlib.Path, leaves: Mapping[str, Array], advice: str) -> None:
    """Writes the file, whole or not at all; errors and `advice` as in `files.written`."""
    with written(path, advice=advice) as partial:
        write_leaves(partial, leaves)


def write_leaves(path: pathlib.Path, leaves: Mapping[str, Array]) -> None:
    """Writes the file in its place, for whoever sees to its being whole; errors are safetensors'."""
    save_file(dict(leaves), path, metadata={"crc32": str(_checksum(leaves))})


def load_leaves(path: pathlib.Path) -> dict[str, Array]:
    """What `save_leaves` wrote.

    Raises:
      UserError: the file is missing or damaged; the message ends behind the reason, for the caller to say what to do.
    """
    with damaged(path), safe_open(path, "flax") as file:
        leaves = {name: file.get_tensor(name) for name in file.keys()}
        if (file.metadata() or {}).get("crc32") != str(_checksum(leaves)):
            raise ValueError("its checksum is another")
        return leaves


@contextlib.contextmanager
def damaged(path: pathlib.Path) -> Iterator[None]:
    """Turns what a damaged file raises into a `UserError` that says so."""
    try:
        yield
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is damaged ({reason[:120]})") from None


def _checksum(leaves: Mapping[str, Array]) -> int:
    checksum = 0
    for name in sorted(leaves):
        values = np.ascontiguousarray(leaves[name]).reshape(-1).view(np.uint8)
        checksum = zlib.crc32(values, zlib.crc32(name.encode(), checksum))
    return checksum
