"""Locks that keep a second process out."""

import contextlib
import pathlib
from collections.abc import Iterator

import filelock

from specmq_jax.errors import UserError


@contextlib.contextmanager
def locked(path: pathlib.Path, taken: str) -> Iterator[None]:
    """Holds the lock file `path` while the context lasts; it is free again when the process ends, however that happens.

    The file itself stays. A file system without locks keeps nobody out.

    Args:
      path: of the lock file, in a directory that exists.
      taken: the whole message where somebody else holds it.

    Raises:
      UserError: the lock is held, or can't be had.
    """
    lock = filelock.FileLock(path, blocking=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(taken) from None
    except NotImplementedError:
        pass
    except OSError as error:
        raise UserError(f"{path} can't be made: {error.strerror or error}") from None
    try:
        yield
    finally:
        lock.release()
