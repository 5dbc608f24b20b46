"""What commands on checkpoints share: arguments, a flag, a progress bar."""

from collections.abc import Sequence

from absl import flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from specmq_jax import formats
from specmq_jax.errors import UserError


def progress_bar() -> Progress:
    """A bar on stderr with a description, a count, the time gone and the time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn(compact=True), TextColumn("left"))
    return Progress(*columns, console=Console(stderr=True))


def arguments(argv: Sequence[str], usage: str, count: int) -> list[str]:
    """The `count` positional arguments of a command, else a `UserError` that shows its usage."""
    given = list(argv[1:])
    if len(given) != count:
        raise UserError(f"expected {count or 'no'} argument{'s' * (count != 1)}, found {len(given)}; usage: {usage}")
    return given


def define_head_precision() -> None:
    """The flag that `checkpoints_tools.quantize` has, too."""
    flags.DEFINE_string("head_precision", None, "Precision of lm_head, made by round-to-nearest; one of "
                        f"{', '.join(formats.names())}. Default: dense, as it is in the source.")
