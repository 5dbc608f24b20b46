"""The table and the figures of a sweep."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console

from experiments.answers import metrics, scoring
from experiments.answers.scoring import Score, Scorer
from experiments.display import plots, tables
from experiments.display.cells import NO_VALUE, milliseconds, number, percent, times
from experiments.display.lines import say
from experiments.display.plots import PLAIN, Bar, HeatMap
from experiments.reporting.figures import Figures, compare
from experiments.reporting.report import identical
from experiments.sweeping.sweep_cells import Cell, Prepared
from specmq_jax.words import count

AXES = {"depth": "tree depth", "size": "tree size, nodes", "top_k": "top-k", "length": "draft length, tokens",
        "min_length": "least draft, tokens"}
"""A variant's settings, in the order in which they become a heat map's vertical and horizontal axis."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What came of a cell.

    Attributes:
      cell: which.
      figures: beside plain decoding of its group; beside itself where that is missing; None where the cell has not finished.
      has_plain: whether plain decoding of its group has finished.
      plain_speed, first_speed: as `speed`, of plain decoding of its group and of the sweep's first; None where it has not
        finished.
      measured: what the runner measured, None where the cell has not finished.
      score: of its answers, None where they are not scored.
      error: why the cell failed, if it did.
    """

    cell: Cell
    figures: Figures | None
    has_plain: bool
    plain_speed: float | None
    first_speed: float | None
    measured: Mapping[str, Any] | None
    score: Score | None
    error: str | None

    @property
    def speed(self) -> float | None:
        """Tokens/s of a stream; of all streams together where questions were answered side by side."""
        return None if self.measured is None or self.figures is None else _speed(self.measured, self.figures)

    @property
    def is_throughput(self) -> bool:
        """Whether its speed is that of several streams together."""
        return self.cell.settings.slots > 1

    @property
    def speedup(self) -> float | None:
        """Over plain decoding of its group."""
        return metrics.ratio(self.speed, self.plain_speed)

    @property
    def first_speedup(self) -> float | None:
        """Over the sweep's first plain decoding."""
        return metrics.ratio(self.speed, self.first_speed)

    @property
    def precision(self) -> str:
        """Of the target, as the run found it."""
        return str(self.measured["precision"]) if self.measured else self.cell.settings.models.precision or "as stored"


def _speed(measured: Mapping[str, Any], figures: Figures) -> float | None:
    return measured["throughput"] if "throughput" in measured else figures.tokens_per_second


def rows(sweep: Prepared, failures: Mapping[str, str], scorer: Scorer | None = None) -> list[Row]:
    """Reads what the cells left, and scores it; `failures` says why some ended early."""
    asked = sweep.cells[0].settings.questions() if scorer else []
    files = {cell.name: cell.answers() for cell in sweep.cells}
    done = {name: file for name, file in files.items() if file.measured and name not in failures}
    plain = {cell.group: done[cell.name] for cell in sweep.cells if cell.variant.method == "baseline" and cell.name in done}
    speeds = {group: _speed(file.measured, compare(file.found, file.found)) for group, file in plain.items()}
    result = []
    for cell in sweep.cells:
        file, base = done.get(cell.name), plain.get(cell.group)
        result.append(Row(
            cell=cell, figures=compare(file.found, (base or file).found) if file else None, has_plain=base is not None,
            plain_speed=speeds.get(cell.group), first_speed=next(iter(speeds.values()), None),
            measured=file.measured if file else None,
            score=scoring.score(scorer, file.found, asked) if file and scorer else None, error=failures.get(cell.name)))
    return result


def report(sweep: Prepared, failures: Mapping[str, str], console: Console, *, scorer: Scorer | None = None) -> None:
    """Prints the table and writes table.csv, table.md, speedup.png and a picture of heat maps for each method with several
    variants into the sweep's directory, and scores beside the answers."""
    found = rows(sweep, failures, scorer)
    for row in found:
        if row.score:
            file = row.cell.answers()
            scoring.write(file.path, [(file.found[0].model_id, row.score)])
    title = (f"{_names(found)} on {sweep.device}\n{count(sweep.questions, 'question')} of "
             f"{sweep.benchmark.title} ({sweep.cells[0].settings.question_file.name})"
             + (f"\n{sweep.slots} questions side by side: tokens/s of all together" if sweep.slots > 1 else ""))
    say(console, title, wrap=True)
    _print_table(found, console)
    lines = [f"failed: {name}: {error}" for name, error in failures.items()]
    lines += [f"{row.cell.name}: no throughput, for a former run answered a part; --noresume answers all again"
              for row in found if row.is_throughput and row.measured and row.speed is None]
    for line in lines:
        say(console, line)
    written = [sweep.output_dir / "table.csv", sweep.output_dir / "table.md"]
    tables.write(written[0], tables.comma_separated(FIELDS, found))
    text = f"{title}\n\n{tables.markdown(_columns(found), found, texts=3)}"
    tables.write(written[1], text + "".join(f"\n{line}\n" for line in lines))
    written += _pictures(sweep.output_dir, found, title)
    say(console, f"Wrote {', '.join(map(str, written))}")


def _pictures(directory: pathlib.Path, found: Sequence[Row], title: str) -> list[pathlib.Path]:
    written = []
    if drawn := bars(found):
        written.append(directory / "speedup.png")
        plots.plot_speedups(drawn[1], written[-1], base=drawn[0], title=title)
    for method in dict.fromkeys(row.cell.variant.method for row in found):
        if maps := heat_maps(found, method):
            written.append(directory / f"speed-{method}.png")
            unit = "tokens/s together" if found[0].is_throughput else "tokens/s"
            plots.plot_heat_maps(maps, written[-1], unit=unit, title=title)
    return written


def bars(found: Sequence[Row]) -> tuple[str, list[Bar]] | None:
    """The base's name, and the fastest variant of each method in each group; None where no cell has finished.

    The base is the sweep's first plain decoding, or its first cell where there is none.
    """
    done = [row for row in found if row.speed is not None]
    if not done:
        return None
    base = next((row for row in done if row.cell.variant.method == "baseline"), done[0])
    fastest: dict[tuple[str, str], Row] = {}
    for row in done:
        key = row.cell.group, row.cell.variant.method
        if key not in fastest or row.speed > fastest[key].speed:
            fastest[key] = row
    return base.cell.name, [Bar(
        group=group, series=PLAIN if method == "baseline" else f"+ {method}", speedup=row.speed / base.speed,
        relative=None if method == "baseline" else row.speedup) for (group, method), row in fastest.items()]


def heat_maps(found: Sequence[Row], method: str) -> list[HeatMap]:
    """A method's speeds by the settings that vary: one map a group for two or more, a row a group for a single one.

    Settings beyond the second don't appear: a field is the fastest of their variants.
    """
    done = [row for row in found if row.speed is not None and row.cell.variant.method == method]
    values = {name: sorted({row.cell.variant.settings[name] for row in done if name in row.cell.variant.settings})
              for name in AXES}
    varied = [name for name in AXES if len(values[name]) > 1]
    groups = tuple(dict.fromkeys(row.cell.group for row in done))
    if not varied:
        return []
    if len(varied) == 1:
        return [_heat_map(done, method, y="group", rows=groups, x=varied[0], columns=values[varied[0]])]
    rest = f", best {' and '.join(AXES[name].partition(',')[0] for name in varied[2:])}" if varied[2:] else ""
    return [_heat_map([row for row in done if row.cell.group == group], f"{method} at {group}{rest}", y=varied[0],
                      rows=values[varied[0]], x=varied[1], columns=values[varied[1]]) for group in groups]


def _heat_map(done: Sequence[Row], title: str, *, y: str, rows: Sequence[int | str], x: str, columns: Sequence[int]) -> HeatMap:
    speeds: dict[tuple[int | str, int | str], float] = {}
    for row in done:
        settings = row.cell.variant.settings
        key = row.cell.group if y == "group" else settings[y], settings[x]
        speeds[key] = max(row.speed, speeds.get(key, 0.0))
    return HeatMap(title=title, x=AXES[x], y=AXES.get(y, "precision"), columns=tuple(columns), rows=tuple(rows), values=speeds)


def _names(found: Sequence[Row]) -> str:
    return ", ".join(dict.fromkeys(row.cell.settings.models.target_name for row in found))


def _setting(name: str) -> Callable[[Row], str]:
    return lambda row: str(row.cell.variant.settings.get(name, NO_VALUE))


def _milliseconds(phase: str) -> Callable[[Row], str]:
    """A baseline drafts nothing; of questions side by side no phases are measured."""
    return lambda row: NO_VALUE if not row.measured or (phase == "draft" and row.cell.variant.method == "baseline") else (
        milliseconds(row.measured.get(phase)))


def _tree(row: Row) -> str:
    tree = row.cell.variant.tree
    return f"{tree.depth}/{tree.top_k}/{tree.size}" if tree else NO_VALUE


def _speed_column(found: Sequence[Row]) -> str:
    return "tokens/s\ntogether" if found[0].is_throughput else "tokens/s"


def _columns(found: Sequence[Row]) -> tables.Cells:
    """A tree is written depth/top-k/size, as in the papers."""
    several = len({row.cell.settings.models.target for row in found}) > 1
    first = next((row.cell.group for row in found if row.cell.variant.method == "baseline" and row.figures), "")
    metric = next((row.score.metric for row in found if row.score), None)
    return {
        **({"model": lambda row: row.cell.settings.models.target_name} if several else {}),
        "precision": lambda row: row.precision,
        "method": lambda row: row.cell.variant.method,
        "tree": _tree,
        "draft\nlength": _setting("length"),
        "least\ndraft": _setting("min_length"),
        _speed_column(found): lambda row: "failed" if row.error else number(row.speed, 1),
        "over\nplain": lambda row: times(row.speedup),
        f"over plain\n{first}": lambda row: times(row.first_speedup),
        "accept\nlength": lambda row: number(row.figures and row.figures.accept_length, 2),
        **({metric: lambda row: percent(row.score and row.score.share, 1)} if metric else {}),
        "identical": lambda row: identical(row.figures.identical_share if row.has_plain and row.figures else None),
        "draft\nms": _milliseconds("draft"),
        "verify\nms": _milliseconds("verify"),
    }


def _print_table(found: Sequence[Row], console: Console) -> None:
    """In several tables where the console is too narrow for one; what says which cell a row is stands in each."""
    columns = _columns(found)
    keys = list(columns).index(_speed_column(found))
    tables.show(columns, found, console, texts=keys, keys=keys)


FIELDS: Mapping[str, Callable[[Row], Any]] = {
    "model": lambda row: row.cell.settings.models.target_name,
    "precision": lambda row: row.precision,
    "method": lambda row: row.cell.variant.method,
    **{name: (lambda row, name=name: row.cell.variant.settings.get(name)) for name in AXES},
    "questions": lambda row: row.figures and row.figures.questions,
    "slots": lambda row: row.cell.settings.slots,
    "tokens_per_second": lambda row: None if row.is_throughput else row.speed,
    "throughput": lambda row: row.speed if row.is_throughput else None,
    "speedup": lambda row: row.speedup,
    "mean_ratio": lambda row: row.figures.mean_ratio if row.has_plain and row.figures else None,
    "mean_ratio_low": lambda row: row.figures.interval[0] if row.has_plain and row.figures and row.figures.interval else None,
    "mean_ratio_high": lambda row: row.figures.interval[1] if row.has_plain and row.figures and row.figures.interval else None,
    "speedup_over_first": lambda row: row.first_speedup,
    "mean_accept_length": lambda row: row.figures and row.figures.accept_length,
    "identical_share": lambda row: row.figures.identical_share if row.has_plain and row.figures else None,
    "score": lambda row: row.score and row.score.share,
    **{f"{phase}_seconds": (lambda row, phase=phase: row.measured and row.measured.get(phase))
       for phase in ("prefill", "draft", "verify", "round")},
    "answers": lambda row: str(row.cell.settings.answers(row.cell.variant.method)),
    "error": lambda row: row.error,
}
"""Of the CSV: speeds in tokens/s, the throughput that of several questions side by side; times in seconds; speedups over plain
decoding of the same model and precision, intervals of their mean over questions, and speedups over the sweep's first plain
decoding."""
