"""Measures a grid of settings: python -m experiments.sweep --precisions=fp16,w4a16-g64 --methods=eagle2 --tree_depths=2,4

Each cell is a precision, a method, and a value of each setting that this method uses; a baseline has no trees. All flags of the
other experiments hold for every cell. A grid may also be a YAML file (--grid=FILE) whose keys are the flags' names.

Cells of one target and precision run in a process of their own, so that the device is empty before the next is loaded. The same
command goes on where a sweep was ended, and tries again what failed; a failed cell does not keep the others from running.
"""

import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from absl import flags as absl_flags
from rich.console import Console

from experiments.display.lines import say
from experiments.display.tables import stdout
from experiments.running import claims, flags
from experiments.sweeping import grid, isolated, sweep_cells, sweep_report
from experiments.sweeping.isolated import ProcessEnded
from experiments.sweeping.sweep_cells import Cell, Prepared
from experiments.sweeping.sweep_progress import Display, display
from experiments.sweeping.sweep_worker import Event, run_cells
from specmq_jax.commands import entry, flag_values
from specmq_jax.errors import UserError
from specmq_jax.words import count

Reports = Callable[..., Iterator[Any]]
"""As `isolated.reports`."""


def main(argv: Sequence[str]) -> None:
    """Prepares, runs and reports; a cell that failed is a `UserError` at the end."""
    flags.no_arguments(argv)
    given = absl_flags.FLAGS
    known = sweep_cells.key_flags()
    if given.grid:
        grid.apply_file(pathlib.Path(given.grid), given, known)
        for name in known:
            flag_values.check_value(name, given[name].value if given[name].present else None)
    (sweep,) = isolated.reports(sweep_cells.prepare, [given[name].serialize() for name in known if given[name].present])
    progress = Console(stderr=True)
    with claims.reported(sweep.output_dir):
        _run_and_report(sweep, progress)


def _run_and_report(sweep: Prepared, progress: Console) -> None:
    for line in sweep.left_out:
        say(progress, f"left out: {line}")
    for name in sweep.lost:
        say(progress, f"{name}: had finished, and answers are gone, which are made again")
    scorer = sweep.benchmark.scorer
    obstacle = scorer.obstacle() if scorer else None
    failures = run(sweep, progress)
    sweep_report.report(sweep, failures, stdout(), scorer=None if obstacle else scorer)
    if obstacle:
        say(stdout(), f"Not scored: {obstacle}; the same command scores these answers then")
    if failures:
        raise UserError(f"{len(failures)} of {count(len(sweep.cells), 'cell')} failed, see above; the same command tries "
                        "them again")


def run(sweep: Prepared, console: Console, reports: Reports = isolated.reports) -> dict[str, str]:
    """Runs what is not finished, a process a group.

    Args:
      sweep: what to run.
      console: where progress goes.
      reports: how `run_cells` is run.

    Returns:
      Why cells failed, by their names.
    """
    waiting = {cell.name: sweep.questions - sweep.answered[cell.name] for cell in sweep.cells
               if cell.name not in sweep.finished}
    say(console, f"cells: {len(sweep.cells)}, questions in each: {sweep.questions}, finished before: {len(sweep.finished)} "
                 f"({sweep.output_dir})")
    failures: dict[str, str] = {}
    done = sum(sweep.answered.values())
    with display(console, waiting, cells=len(sweep.cells), done=done) as shown:
        for group in dict.fromkeys(cell.group for cell in sweep.cells):
            cells = [cell for cell in sweep.cells if cell.group == group and cell.name in waiting]
            failures |= _run_group(cells, shown, reports)
    return failures


def _run_group(cells: Sequence[Cell], shown: Display, reports: Reports) -> Mapping[str, str]:
    """A process that ends early costs the cell it was at; another goes on with the rest."""
    failures: dict[str, str] = {}
    ended: set[str] = set()

    def take(event: Event) -> None:
        shown.show(event)
        if event.kind == "failed":
            failures[event.cell] = event.text
        if event.kind in ("failed", "finished"):
            ended.add(event.cell)

    while cells:
        current = cells[0].name
        try:
            for event in reports(run_cells, cells):
                current = event.cell
                take(event)
        except ProcessEnded as error:
            take(Event(cell=current, kind="failed", text=str(error)))
        cells = [cell for cell in cells if cell.name not in ended]
    return failures


if __name__ == "__main__":
    sweep_cells.declare_flags()
    absl_flags.adopt_module_key_flags(sweep_cells)
    entry.run(main)
