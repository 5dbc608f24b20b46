"""Tables for a terminal, a Markdown page and a spreadsheet."""

import csv
import io
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from specmq_jax.errors import UserError

NO_VALUE = "-"

Row = TypeVar("Row")
Cells = Mapping[str, Callable[[Row], str]]
"""What a row shows in each column."""


def table(columns: Cells, rows: Sequence[Row], *, texts: int) -> Table:
    """A row each; the first `texts` columns are flush left. Columns without a value in any row are left out."""
    cells = {name: [show(row) for row in rows] for name, show in columns.items()}
    shown = {name: values for name, values in cells.items() if any(value != NO_VALUE for value in values)}
    result = Table()
    for name in shown:
        result.add_column(escape(name), justify="left" if name in list(columns)[:texts] else "right", no_wrap=True)
    for values in zip(*shown.values(), strict=True):
        result.add_row(*map(escape, values))
    return result


def markdown(columns: Cells, rows: Sequence[Row], *, texts: int) -> str:
    """The same table as GitHub reads it."""
    made = table({_in_line(name): lambda row, show=show: _in_line(show(row)) for name, show in columns.items()}, rows,
                 texts=texts)
    made.box = box.MARKDOWN
    Console(file=(text := io.StringIO()), width=100_000).print(made)
    return "".join(f"{line.strip()}\n" for line in text.getvalue().splitlines() if line.strip())


def _in_line(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|")


def comma_separated(columns: Mapping[str, Callable[[Row], str | int | float | None]], rows: Iterable[Row]) -> str:
    """Every figure in full, an empty field where there is none, a line of names first."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([value(row) for value in columns.values()] for row in rows)
    return text.getvalue()


def check_file(path: pathlib.Path, flag: str) -> None:
    """A file that can't be written to is a `UserError` that names the flag it came from."""
    existing = path if path.exists() else path.absolute().parent
    if path.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"{path} can't be written to; name another file with --{flag}=FILE")


def write(path: pathlib.Path, text: str) -> None:
    """Puts a text in place as a whole; a `UserError` where that fails."""
    beside = path.with_name(path.name + ".part")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}; the same command writes it again") from None
