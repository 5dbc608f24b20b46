"""Compares answer files: python -m experiments.speedup --base=BASE.jsonl --answers=A.jsonl,B.jsonl

Tokens/s are a question's new tokens over the seconds of its decode loops, averaged over questions. Speedups are ratios of these
means, accept lengths are means over rounds. The mean of ratios is that of each question's own speedup, with its bootstrap
interval over questions.

A file may hold several runs (a program that appends to it again, files put together): lines with another model_id are another
run, and so are those behind a question that was answered before under the same model_id. Run N of a file is FILE#N;
--answers=FILE takes all of them.
"""

import collections
import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags as absl_flags
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.answers.answer_files import Answer
from experiments.benchmarks.registry import BENCHMARKS
from experiments.display import plots, tables
from experiments.display.cells import NO_VALUE, number, times
from experiments.display.plots import PLAIN, Bar
from experiments.reporting import answer_runs
from experiments.reporting.answer_runs import Run
from experiments.reporting.figures import LEVEL, Figures, compare
from experiments.reporting.report import by_category, identical
from experiments.running import flags
from specmq_jax.commands import entry
from specmq_jax.errors import UserError
from specmq_jax.words import count

OVERALL = "overall"
_PICTURES = (".png", ".svg", ".pdf")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One run over the questions of one category, or over all of them (`OVERALL`)."""

    label: str
    run: Run
    category: str
    figures: Figures


def main(argv: Sequence[str]) -> None:
    """Reads, compares, prints and writes."""
    flags.no_arguments(argv)
    given = absl_flags.FLAGS
    if not given.base or not given.answers:
        raise UserError("expected --base=BASE.jsonl and --answers=A.jsonl[,B.jsonl...]")
    files = {flag: pathlib.Path(given[flag].value) for flag in ("csv", "markdown", "plot") if given[flag].value}
    for flag, path in files.items():
        tables.check_file(path, flag)
    if "plot" in files and files["plot"].suffix not in _PICTURES:
        raise UserError(f"--plot={given.plot} must end in {', '.join(_PICTURES)}, which says what kind of picture to draw")
    base = answer_runs.find_one(given.base, unfinished=given.common)
    others = [run for address in given.answers for run in answer_runs.find(address, unfinished=given.common)
              if (run.path.resolve(), run.number) != (base.path.resolve(), base.number)]
    if not others:
        raise UserError(f"--answers={','.join(given.answers)} holds nothing but the base {given.base}; name another file")
    task = BENCHMARKS[given.benchmark].task if given.benchmark else None
    base, *others = (run.by_task(task) if task else run for run in over_same_questions(base, others, common=given.common))
    rows = compared(base, others)
    show(rows, tables.stdout())
    benchmark = BENCHMARKS[given.benchmark].title if given.benchmark else None
    writers: Mapping[str, Callable[[pathlib.Path], None]] = {
        "csv": lambda path: tables.write(path, tables.comma_separated(FIELDS, rows)),
        "markdown": lambda path: tables.write(path, tables.markdown(_COLUMNS, rows, texts=2)),
        "plot": lambda path: plots.plot_speedups(bars(rows), path, base=rows[0].label, title=_title(rows, benchmark))}
    for flag, path in files.items():
        writers[flag](path)


def over_same_questions(base: Run, others: Sequence[Run], *, common: bool) -> list[Run]:
    """The base and the others, all over the same questions; `common` leaves out those that not all of them answer.

    Raises:
      UserError: they answer different questions, or no question is common to all.
    """
    if common:
        shared = set.intersection(*(set(map(_question, run.answers)) for run in (base, *others)))
        if not shared:
            raise UserError(f"no question is answered in {base.address} and in all of "
                            f"{', '.join(run.address for run in others)}; choose runs of the same question file")
        return [dataclasses.replace(run, answers=tuple(answer for answer in run.answers if _question(answer) in shared))
                for run in (base, *others)]
    for run in others:
        ours, theirs = (set(map(_question, side.answers)) for side in (run, base))
        if ours != theirs:
            raise UserError(
                f"{run.address} answers {count(len(run.answers), 'question')} and {base.address} {len(base.answers)}, of which "
                f"{len(ours & theirs)} are the same; speeds can only be compared over the same questions (finish the run that "
                "was interrupted, choose the same range, or compare over the common ones with --common)")
    return [base, *others]


def compared(base: Run, others: Sequence[Run]) -> list[Row]:
    """Each run's row of each category, in the base's order, and its row over all; the base comes first."""
    runs, rows = [base, *others], []
    expected = by_category(base.answers) | {OVERALL: list(base.answers)}
    for run, label in zip(runs, answer_runs.labels(runs), strict=True):
        found = by_category(run.answers) | {OVERALL: list(run.answers)}
        rows += [Row(label=label, run=run, category=category, figures=compare(found[category], group))
                 for category, group in expected.items()]
    return rows


def show(rows: Sequence[Row], console: Console) -> None:
    """Prints a table by category, in parts where it is too wide for the console, and one of the runs over all questions."""
    base, *labels = dict.fromkeys(row.label for row in rows)
    tables.print_in_parts(lambda shown: by_task(rows, base, shown), labels, console)
    tables.show({name: column for name, column in _COLUMNS.items() if name not in ("category", "questions")},
                [row for row in rows if row.category == OVERALL], console, texts=1)


def by_task(rows: Sequence[Row], base: str, labels: Sequence[str]) -> Table:
    """A row a category and one for all; tokens/s of the base; tokens/s, speedup and accept length of each other."""
    found = {(row.label, row.category): row.figures for row in rows}
    result = Table()
    result.add_column("category", no_wrap=True)
    result.add_column("questions", justify="right")
    result.add_column(f"{escape(base)}\ntokens/s", justify="right")
    for label in labels:
        for head in (f"{escape(label)}\ntokens/s", "\nspeedup", "accept\nlength"):
            result.add_column(head, justify="right")
    for category in dict.fromkeys(row.category for row in rows):
        if category == OVERALL:
            result.add_section()
        figures = found[base, category]
        cells = [escape(category), str(figures.questions), number(figures.tokens_per_second, 1)]
        for label in labels:
            figures = found[label, category]
            cells += [number(figures.tokens_per_second, 1), times(figures.speedup), number(figures.accept_length, 2)]
        result.add_row(*cells)
    return result


def bars(rows: Sequence[Row]) -> list[Bar]:
    """Each run's bar: by model and precision, plain decoding first where the run is of method baseline.

    A run whose model_id does not end in precision and method stands alone under its label.
    """
    rows = [row for row in rows if row.category == OVERALL and row.figures.speedup is not None]
    several = len({row.run.target for row in rows if row.run.precision}) > 1
    groups = [_group(row, several) for row in rows]
    series = [_series(row) for row in rows]
    twice = {key for key, count in collections.Counter(zip(groups, series, strict=True)).items() if count > 1}
    plain = {group: row.figures for group, name, row in zip(groups, series, rows, strict=True) if name == PLAIN}
    return [Bar(group=group, series=row.label if (group, name) in twice else name, speedup=row.figures.speedup,
                relative=row.figures.tokens_per_second / plain[group].tokens_per_second
                if group in plain and name != PLAIN else None)
            for group, name, row in zip(groups, series, rows, strict=True)]


def _question(answer: Answer) -> tuple[int | str, str]:
    return answer.question_id, answer.category


def _group(row: Row, several: bool) -> str:
    if row.run.precision is None:
        return row.label
    return f"{row.run.target}\n{row.run.precision}" if several else row.run.precision


def _series(row: Row) -> str:
    return f"+ {row.run.method}" if row.run.precision and row.run.method != "baseline" else PLAIN


def _title(rows: Sequence[Row], benchmark: str | None) -> str:
    targets = list(dict.fromkeys(row.run.target for row in rows if row.run.precision))
    parts = [", ".join(targets) or "Decoding speed", benchmark, count(rows[-1].figures.questions, "question")]
    return ", ".join(part for part in parts if part)


def _interval(row: Row) -> str:
    return "{:.2f} to {:.2f}".format(*row.figures.interval) if row.figures.interval else NO_VALUE


def _compared_turns(row: Row) -> str:
    figures = row.figures
    return NO_VALUE if figures.compared_turns in (0, figures.turns) else f"{figures.compared_turns}/{figures.turns}"


_COLUMNS: tables.Cells = {
    "run": lambda row: row.label,
    "category": lambda row: row.category,
    "questions": lambda row: str(row.figures.questions),
    "tokens/s": lambda row: number(row.figures.tokens_per_second, 1),
    "speedup": lambda row: times(row.figures.speedup),
    "mean of\nratios": lambda row: times(row.figures.mean_ratio),
    f"its {LEVEL:.0%}\ninterval": _interval,
    "accept\nlength": lambda row: number(row.figures.accept_length, 2),
    "identical": lambda row: identical(row.figures.identical_share),
    "turns\ncompared": _compared_turns,
}
FIELDS: Mapping[str, Callable[[Row], Any]] = {
    "run": lambda row: row.label,
    "file": lambda row: row.run.address,
    "model_id": lambda row: row.run.model_id,
    "category": lambda row: row.category,
    "questions": lambda row: row.figures.questions,
    "tokens_per_second": lambda row: row.figures.tokens_per_second,
    "base_tokens_per_second": lambda row: row.figures.base_tokens_per_second,
    "speedup": lambda row: row.figures.speedup,
    "mean_ratio": lambda row: row.figures.mean_ratio,
    "mean_ratio_low": lambda row: row.figures.interval and row.figures.interval[0],
    "mean_ratio_high": lambda row: row.figures.interval and row.figures.interval[1],
    "mean_accept_length": lambda row: row.figures.accept_length,
    "identical_share": lambda row: row.figures.identical_share,
    "compared_turns": lambda row: row.figures.compared_turns,
    "turns": lambda row: row.figures.turns,
}
"""Of the CSV."""


def declare_flags() -> None:
    """Declares the command's flags; not at import, where they would clash with those of other commands."""
    absl_flags.DEFINE_string("base", None, "The baseline's answer file (JSONL), or FILE#N for run N of a file with several.")
    absl_flags.DEFINE_list("answers", None, "Answer files (JSONL) to compare with it, of the same questions, with all their "
                           "runs; FILE#N is run N alone.")
    absl_flags.DEFINE_enum("benchmark", None, [name for name, benchmark in BENCHMARKS.items() if benchmark.task],
                           "Put together the categories that this benchmark counts as one task.")
    absl_flags.DEFINE_bool("common", False, "Compare over the questions that all of them answer, where some answer more or "
                           "are not finished.")
    absl_flags.DEFINE_string("csv", None, "Also write every run's figures by category into this file, in full.")
    absl_flags.DEFINE_string("markdown", None, "Also write them into this file as a Markdown table.")
    absl_flags.DEFINE_string("plot", None, "Also draw the speedups into this file, .png, .svg or .pdf: by precision, plain "
                             "decoding and the methods that draft, as the answers' model_id names them.")


if __name__ == "__main__":
    declare_flags()
    entry.run(main)
