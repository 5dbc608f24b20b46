"""Compares answer files: python -m experiments.speedup --base=BASE.jsonl --answers=A.jsonl,B.jsonl

Speeds are means over questions, speedups are ratios of these means, accept lengths are means over rounds.
"""

import pathlib
import statistics
from collections.abc import Sequence

from absl import flags as absl_flags
from rich.table import Table

from experiments import answers, flags
from experiments.answers import Answer
from experiments.report import by_category, stdout
from specmq_jax import errors, metrics
from specmq_jax.errors import UserError

_BASE = absl_flags.DEFINE_string("base", None, "The baseline's answer file (JSONL).")
_ANSWERS = absl_flags.DEFINE_list("answers", None, "Answer files (JSONL) to compare with it, of the same questions.")


def main(argv: Sequence[str]) -> None:
    """Prints the table."""
    flags.no_arguments(argv)
    if not _BASE.value or not _ANSWERS.value:
        raise UserError("expected --base=BASE.jsonl and --answers=A.jsonl[,B.jsonl...]")
    base = answers.read(pathlib.Path(_BASE.value))
    others = {name: answers.read(pathlib.Path(name)) for name in _ANSWERS.value}
    for name, found in others.items():
        _check_same_questions(name, found, base)
    stdout().print(table(base, others))


def table(base: Sequence[Answer], others: dict[str, list[Answer]]) -> Table:
    """A row a category and one for all; tokens/s of the base; tokens/s, speedup and accept length of each other."""
    result = Table()
    result.add_column("category", no_wrap=True)
    result.add_column("questions", justify="right")
    result.add_column("base\ntokens/s", justify="right")
    for name in others:
        path = pathlib.Path(name)
        alike = sum(pathlib.Path(other).stem == path.stem for other in others) > 1
        label = f"{path.parent.name}/{path.stem}" if alike else path.stem
        for head in (f"{label}\ntokens/s", "\nspeedup", "\naccept length"):
            result.add_column(head, justify="right")
    grouped = {name: by_category(found) for name, found in others.items()}
    for category, group in by_category(base).items():
        result.add_row(*_row(category, group, [grouped[name][category] for name in others]))
    result.add_section()
    result.add_row(*_row("overall", base, list(others.values())))
    return result


def _row(label: str, base: Sequence[Answer], others: Sequence[Sequence[Answer]]) -> list[str]:
    base_speeds = [answer.speed for answer in base]
    cells = [label, str(len(base)), f"{statistics.fmean(base_speeds):.1f}"]
    for found in others:
        speeds = [answer.speed for answer in found]
        accepted = [length for answer in found for length in answer.accept_lengths]
        cells += [f"{statistics.fmean(speeds):.1f}", f"{metrics.speedup(speeds, base_speeds):.2f}x",
                  f"{metrics.mean_accept_length(accepted):.2f}"]
    return cells


def _check_same_questions(name: str, found: Sequence[Answer], base: Sequence[Answer]) -> None:
    ours, theirs = ({(answer.question_id, answer.category) for answer in side} for side in (found, base))
    if ours != theirs or len(found) != len(base):
        raise UserError(f"{name} answers {len(found)} questions and {_BASE.value} {len(base)}, of which {len(ours & theirs)} "
                        "are the same; speeds can only be compared over the same questions (finish the run that was "
                        "interrupted, or choose the same range)")


if __name__ == "__main__":
    errors.run(main)
