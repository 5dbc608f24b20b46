"""Files and directories that appear whole or not at all: they are written beside their place and renamed.

What is being written is called .NAME.TOKEN.partial, and its process holds a lock on it. What a killed process left has no
lock, and goes when NAME is written again.
"""

import atexit
import contextlib
import errno
import glob
import json
import os
import pathlib
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import platformdirs

from specmq_jax.errors import UserError

if sys.platform != "win32":  # without locks, nothing that others left is removed
    import fcntl

ADVICE = "make room there, or choose another place"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_IN_TEXT = re.compile(r"os[ _]error(?:_code=')? ?(\d+)")
"""How safetensors and TensorStore, which raise errors of their own, tell the system's number."""
_NAME_LENGTH = 50  # of what a partial's name keeps of NAME, for names that are as long as a system allows


def cache_directory() -> pathlib.Path:
    """Where downloads and converted models are kept: $SPECMQ_CACHE, else the platform's cache folder."""
    return pathlib.Path(os.environ.get("SPECMQ_CACHE") or platformdirs.user_cache_dir("specmq_jax"))


def full_disk(error: BaseException) -> str | None:
    """What the system says where an error tells of a disk that takes no more, whoever raises it; None for other errors."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _IN_TEXT.search(str(error))):
        number = int(found[1])
    return os.strerror(number) if number in _FULL else None


def check_destination(destination: pathlib.Path) -> None:
    """Raises a `UserError` where a directory can't be put under that name."""
    try:
        if destination.is_dir():
            if any(destination.iterdir()):
                raise UserError(f"{destination} exists and is not empty; choose another name or remove it")
        elif destination.exists():
            raise UserError(f"{destination} exists and is not a directory; choose another name")
    except OSError as error:
        raise UserError(f"{destination} can't be written: {error.strerror}; choose another name") from None


@contextlib.contextmanager
def staged(destination: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """A directory beside `destination`, which is renamed to it when the context ends well, else removed.

    Raises:
      UserError: the destination is taken, it can't be written, or the disk is full.
    """
    destination = pathlib.Path(destination)
    check_destination(destination)
    final = destination.absolute()
    with _placed(destination, final, lambda path: path.mkdir(), parents=True) as partial:
        with _full_disk_reported(destination):
            yield partial
        check_destination(destination)


@contextlib.contextmanager
def written(path: str | pathlib.Path, *, parents: bool = False, advice: str = ADVICE) -> Iterator[pathlib.Path]:
    """A file beside `path` to be written, which takes its place when the context ends well, else is removed.

    Args:
      path: of a file that is there or not. A pipe or a device can't be replaced, and is what the context yields.
      parents: make the directories above that are missing.
      advice: ends the message of an error.

    Raises:
      UserError: the path is a directory or can't be written, or the disk is full.
    """
    path = pathlib.Path(path)
    try:
        if path.is_dir():
            raise UserError(f"{path} is a directory; expected the name of a file")
        if path.exists() and (not path.is_file() or pathlib.Path("/dev") in path.absolute().parents):
            yield path
            return
        with _placed(path, path.resolve(), lambda partial: partial.touch(exist_ok=False), parents, advice) as partial:
            yield partial
    except UserError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or full_disk(error)
        if reason is None:
            raise
        raise UserError(f"{path} can't be written: {reason}; {advice}") from None


def put_text(path: str | pathlib.Path, text: str, *, parents: bool = False, advice: str = ADVICE) -> None:
    """Puts a text in place as a whole, as UTF-8; errors and arguments as in `written`.

    What UTF-8 has no form for, half of a surrogate pair, is written as JSON's escape.
    """
    with written(path, parents=parents, advice=advice) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def put_json(path: str | pathlib.Path, value: Any, *, indent: int = 2, parents: bool = False, advice: str = ADVICE) -> None:
    """Puts indented JSON with a final newline in place as a whole; errors and arguments as in `written`."""
    put_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n", parents=parents, advice=advice)


@contextlib.contextmanager
def scratch(name: str) -> Iterator[pathlib.Path]:
    """A directory among the system's temporary ones, removed with the context, and what a killed process left of `name` too.

    Raises:
      UserError: there is no place for it, or the disk is full.
    """
    place = pathlib.Path(tempfile.gettempdir()) / name
    with _full_disk_reported(place.parent), _claimed(place, lambda path: path.mkdir(mode=0o700)) as directory:
        yield directory


@contextlib.contextmanager
def _placed(named: pathlib.Path, final: pathlib.Path, make: Callable[[pathlib.Path], None], parents: bool,
            advice: str = ADVICE) -> Iterator[pathlib.Path]:
    """A claimed place beside `final`, renamed to it; errors of the claim and the renaming name the path as it was `named`."""
    with contextlib.ExitStack() as stack:
        with _reported(named, advice):
            if parents:
                final.parent.mkdir(parents=True, exist_ok=True)
            partial = stack.enter_context(_claimed(final, make))
        yield partial
        with _reported(named, advice):
            partial.replace(final)


@contextlib.contextmanager
def _claimed(final: pathlib.Path, make: Callable[[pathlib.Path], None]) -> Iterator[pathlib.Path]:
    _remove_abandoned(final)
    while True:
        partial = final.with_name(f".{final.name[:_NAME_LENGTH]}.{secrets.token_hex(4)}.partial")
        # within `try` before it is made, so that Ctrl-C finds no moment between the two
        try:
            make(partial)
            with _locked(partial):
                if partial.exists():  # not taken for abandoned by another process before it was locked
                    yield partial
                    return
        finally:
            _remove(partial)


def _remove_abandoned(final: pathlib.Path) -> None:
    with contextlib.suppress(OSError):
        for path in final.parent.glob(f".{glob.escape(final.name[:_NAME_LENGTH])}.*.partial"):
            with _locked(path) as lock:
                if lock is not None:
                    _remove(path)


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[int | None]:
    """Holds the lock of a file or directory, which ends with the process; None where another has it or there are none."""
    descriptor = lock = None
    try:
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            if sys.platform != "win32":
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                lock = descriptor
        yield lock
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _remove(path: pathlib.Path) -> None:
    try:
        _delete(path)
    except BaseException:  # Ctrl-C
        _delete(path)
        raise


def _delete(path: pathlib.Path) -> None:
    if not os.path.lexists(path):
        return
    if path.is_dir() and not path.is_symlink():
        # threads of a library may still write there; they have ended when the process does
        atexit.register(shutil.rmtree, path, ignore_errors=True)
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def _full_disk_reported(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = full_disk(error)
        if reason is None:
            raise
        raise UserError(f"{path} can't be written: {reason}; {ADVICE}") from None


@contextlib.contextmanager
def _reported(path: pathlib.Path, advice: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror or error}; {advice}") from None
