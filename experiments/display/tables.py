"""Tables for a terminal, a Markdown page and a spreadsheet."""

import csv
import io
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.display.cells import NO_VALUE
from specmq_jax.errors import UserError
from specmq_jax.files import put_text

_WIDE = 200
"""Columns of a table for a pipe or a file where $COLUMNS doesn't say."""
_LEAST_KEY = 8
"""Columns that a name has at least where there is not enough room for all."""

Row = TypeVar("Row")
Part = TypeVar("Part")
Cells = Mapping[str, Callable[[Row], str]]
"""What a row shows in each column."""


def stdout() -> Console:
    """Where tables go: as wide as the terminal, or as $COLUMNS says; for a pipe or a file wider than the 80 columns that rich
    assumes there."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=_WIDE)


def table(columns: Cells, rows: Sequence[Row], *, texts: int, title: str | None = None) -> Table:
    """A row each; the first `texts` columns are flush left. Columns without a value in any row are left out."""
    return _made(_shown(columns, rows), list(columns)[:texts], title)


def show(columns: Cells, rows: Sequence[Row], console: Console, *, texts: int, keys: int = 1, title: str | None = None) -> None:
    """Prints the table. Where it is too wide, further ones below hold the columns that are left, beside the first `keys`
    columns, which say what a row is."""
    shown = _shown(columns, rows)
    flush_left, said = list(columns)[:texts], [name for name in list(columns)[:keys] if name in shown]
    others = [name for name in shown if name not in said]

    def build(names: Sequence[str], widest: int | None = None) -> Table:
        return _made({name: shown[name] for name in (*said, *names)}, flush_left, title, folded=said, widest=widest)

    if others and _width(build(others[:1]), console) > console.width:
        widest = max(_LEAST_KEY, console.width // (2 * max(len(said), 1)))
        print_in_parts(lambda names: build(names, widest), others, console)
    else:
        print_in_parts(build, others, console)


def print_in_parts(build: Callable[[Sequence[Part]], Table], parts: Sequence[Part], console: Console) -> None:
    """Prints `build(parts)`, or where that is too wide, one table after another, each of as many parts as fit."""
    left = list(parts)
    while left:
        fits = (some for some in range(len(left), 1, -1) if _width(build(left[:some]), console) <= console.width)
        fitting = next(fits, 1)
        console.print(build(left[:fitting]))
        left = left[fitting:]


def _width(made: Table, console: Console) -> int:
    """That a table needs not to be cut."""
    return console.measure(made, options=console.options.update(max_width=100_000)).maximum


def _shown(columns: Cells, rows: Sequence[Row]) -> dict[str, list[str]]:
    """The cells of each column that has a value."""
    cells = {name: [value(row) for row in rows] for name, value in columns.items()}
    return {name: values for name, values in cells.items() if any(value != NO_VALUE for value in values)}


def _made(cells: Mapping[str, Sequence[str]], flush_left: Sequence[str], title: str | None, *, folded: Sequence[str] = (),
          widest: int | None = None) -> Table:
    """A column of `folded` that is wider than `widest` goes on in the next line."""
    result = Table(title=title and escape(title), title_justify="left")
    for name in cells:
        folds = name in folded
        result.add_column(escape(name), justify="left" if name in flush_left else "right", no_wrap=not folds,
                          overflow="fold" if folds else "ellipsis", max_width=widest if folds else None)
    for values in zip(*cells.values(), strict=True):
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


def json_text(content: Any) -> str:
    """JSON of figures, null for one that is no number: JSON knows neither NaN nor infinity."""
    return json.dumps(_numbers(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _numbers(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _numbers(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_numbers(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def check_file(path: pathlib.Path, flag: str) -> None:
    """A file that can't be written to is a `UserError` that names the flag it came from."""
    existing = path if path.exists() else path.absolute().parent
    if path.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"{path} can't be written to; name another file with --{flag}=FILE")


def write(path: pathlib.Path, text: str) -> None:
    """Puts a text in place as a whole; a `UserError` where that fails."""
    put_text(path, text, advice="the same command writes it again")
