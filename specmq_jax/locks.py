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


@contextlib.contextmanager
def claimed(directory: pathlib.Path, name: str, taken: str, way_out: str) -> Iterator[None]:
    """Holds a lock file in a directory, which is made where it is missing.

    Args:
      directory: that is claimed.
      name: of the lock file.
      taken: what somebody else who holds it does, as a message begins.
      way_out: ends every message.

    Raises:
      UserError: the lock is held, or the directory can't be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{directory} can't be written: {error.strerror or error}; {way_out}") from None
    with locked(directory / name, f"{taken} in {directory}; wait until it has ended, or {way_out}"):
        yield
