"""Output directories that appear whole or not at all."""

import contextlib
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from specmq_jax.checkpoint import check_destination
from specmq_jax.errors import UserError


@contextlib.contextmanager
def staged(destination: pathlib.Path) -> Iterator[pathlib.Path]:
    """A directory beside `destination`, which is renamed to it when the context ends well, else removed.

    Raises:
      UserError: the destination is taken, or can't be written.
    """
    check_destination(destination)
    final = destination.absolute()
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".partial", dir=final.parent))
        try:
            partial.chmod(0o755)
            yield partial
            check_destination(destination)
            partial.rename(final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{destination} can't be written: {error.strerror or error}") from None
