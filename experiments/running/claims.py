"""Directories that one run at a time writes to."""

import contextlib
import pathlib
from collections.abc import Iterable, Iterator

from specmq_jax.locks import locked


def reported(directory: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """Keeps every other run's tables and pictures out of an output directory, which exists.

    Raises:
      UserError: another run holds it.
    """
    return _claimed(directory, ".run.lock")


@contextlib.contextmanager
def answered(directories: Iterable[pathlib.Path]) -> Iterator[None]:
    """Keeps every other run's answers out of the directories, which exist; a sweep's processes each claim their own, below the
    one that the sweep reports in.

    Raises:
      UserError: another run holds one of them.
    """
    with contextlib.ExitStack() as claims:
        for directory in sorted({directory.resolve() for directory in directories}):
            claims.enter_context(_claimed(directory, ".answers.lock"))
        yield


def _claimed(directory: pathlib.Path, name: str) -> contextlib.AbstractContextManager[None]:
    return locked(directory / name, f"another run is writing into {directory}; wait until it has ended, or give another "
                                    "--output_dir")
