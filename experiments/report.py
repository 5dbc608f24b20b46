"""The table, the summary and the plot of a run."""

import itertools
import json
import math
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments import plots
from experiments.answers import Answer
from experiments.flags import Settings
from experiments.runner import Result
from specmq_jax import metrics
from specmq_jax.sampling import Greedy, Sampling

NO_VALUE = "-"

Summary = Mapping[str, Any]


def report(settings: Settings, results: Sequence[Result], console: Console | None = None) -> None:
    """Prints the table to stdout and writes summary.json and plot.png into the output directory."""
    console = console or stdout()
    summary = summarise(settings, results)
    text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
    (settings.output_dir / "summary.json").write_text(text, encoding="utf-8")
    plots.plot(summary, settings.output_dir / "plot.png")
    print_table(summary, console)
    written = [str(settings.answers(result.method)) for result in results]
    written += [str(settings.output_dir / name) for name in ("summary.json", "plot.png")]
    console.print(f"Wrote {', '.join(written)}", highlight=False, markup=False, soft_wrap=True)


def stdout() -> Console:
    """Where tables go; a table for a pipe or a file is not cut to the 80 columns that rich assumes there."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


def summarise(settings: Settings, results: Sequence[Result]) -> dict[str, Any]:
    """What summary.json holds: the run's machine and settings, and each method's figures.

    Times are in seconds, bandwidths in bytes a second; the histogram counts, at index i, rounds that accepted i + 1
    tokens. Figures relative to the baseline are None where it did not run.
    """
    base = next((result for result in results if result.method == "baseline"), None)
    measured = results[0].measured
    return {
        "device": measured["device"], "device_bandwidth": measured["device_bandwidth"], "jax": measured["jax"],
        "python": platform.python_version(), "model": settings.models.target_name, "precision": measured["precision"],
        "max_length": measured["max_length"],
        "prefill_tokens": measured["phase_prompt_tokens"], "max_new_tokens": settings.max_new_tokens,
        "sampling": _words(settings.sampling), "questions": len(results[0].answers),
        "turns": sum(len(answer.new_tokens) for answer in results[0].answers),
        "question_file": settings.question_file.name,
        "methods": {result.method: _figures(result, base) for result in results},
    }


def print_table(summary: Summary, console: Console) -> None:
    """One column a method, one row a figure, the acceptance histogram below."""
    console.print(f"{summary['device']}, copies {summary['device_bandwidth'] / 1e9:.0f} GB/s | jax {summary['jax']}, "
                  f"Python {summary['python']}\n{summary['model']} at {summary['precision']}, cache of "
                  f"{summary['max_length']} tokens | {summary['questions']} questions, {summary['turns']} turns of "
                  f"{summary['max_new_tokens']} tokens at most ({summary['question_file']}), {summary['sampling']}",
                  highlight=False, markup=False, soft_wrap=True)
    table = Table()
    table.add_column("", no_wrap=True)
    figures = summary["methods"]
    for method in figures:
        table.add_column(method, justify="right", no_wrap=True)
    for name, show in _ROWS.items():
        values = [show(summary, method) for method in figures.values()]
        if any(value != NO_VALUE for value in values):
            table.add_row(name.format(**summary), *values)
    table.add_section()
    for length in range(1, max(len(method["accept_histogram"]) for method in figures.values()) + 1):
        name = f"rounds accepting {length} token{'s' if length > 1 else ''}"
        table.add_row(name, *(_share(method, length) for method in figures.values()))
    console.print(table)
    for method, figure in figures.items():
        if figure["cut"]:
            console.print(f"{method}: {figure['cut']} questions end early, their later turns did not fit into the cache "
                          "(\"cut\" in the answers tells which)", highlight=False)
    if summary["device"].startswith("CPU") and any((f["speedup"] or 1) < 1 for f in figures.values()):
        console.print("On a CPU, low-bit weights are expanded to f32: drafting a token with them costs as much as decoding "
                      "one, so no speedup can be expected here.", highlight=False)


def _figures(result: Result, base: Result | None) -> dict[str, Any]:
    found, measured = result.answers, result.measured
    accepted = [length for answer in found for length in answer.accept_lengths]
    inner = [length for answer in found for length in answer.draft_accept_lengths]
    seconds = sum(sum(answer.wall_time) for answer in found)
    return {
        "tokens_per_second": statistics.fmean(answer.speed for answer in found),
        "speedup": metrics.speedup(_speeds(found), _speeds(base.answers)) if base else None,
        "mean_accept_length": metrics.mean_accept_length(accepted),
        "mean_draft_accept_length": metrics.mean_accept_length(inner) if inner else None,
        "accept_histogram": metrics.accept_histogram(accepted).tolist(),
        "identical_share": _identical_share(found, base.answers) if base else None,
        "prefill_time": measured["prefill"], "draft_time": measured["draft"], "verify_time": measured["verify"],
        "round_time": measured["round"], "bytes_per_round": measured["bytes_per_round"],
        "achieved_bandwidth": measured["bytes_per_round"] * len(accepted) / seconds,
        "new_tokens": sum(sum(answer.new_tokens) for answer in found), "wall_time": seconds,
        "categories": {category: statistics.fmean(_speeds(group)) for category, group in by_category(found).items()},
        "cut": sum(answer.cut is not None for answer in found),
    }


def by_category(found: Sequence[Answer]) -> dict[str, list[Answer]]:
    """The answers of each category, in order of first appearance."""
    groups: dict[str, list[Answer]] = {}
    for answer in found:
        groups.setdefault(answer.category, []).append(answer)
    return groups


def _speeds(found: Sequence[Answer]) -> list[float]:
    return [answer.speed for answer in found]


def _identical_share(found: Sequence[Answer], base: Sequence[Answer]) -> float:
    """Over turns; a turn that only one of the two has is a different one."""
    expected = {answer.question_id: answer.token_ids for answer in base}
    pairs = [pair for answer in found
             for pair in itertools.zip_longest(answer.token_ids, expected[answer.question_id], fillvalue=())]
    return metrics.identical_share([ours for ours, _ in pairs], [theirs for _, theirs in pairs])


def _share(method: Summary, length: int) -> str:
    counts = method["accept_histogram"]
    total = sum(counts)
    if length > len(counts) or not total:
        return NO_VALUE
    return f"{'█' * round(8 * counts[length - 1] / total):<8} {counts[length - 1] / total:4.0%}"


def _words(sampling: Greedy | Sampling) -> str:
    if isinstance(sampling, Greedy):
        return "greedy"
    return f"temperature {sampling.temperature}, top_k {sampling.top_k}, top_p {sampling.top_p}"


def _identical(share: float | None) -> str:
    """Rounded down, so that only all is 100%."""
    return NO_VALUE if share is None else f"{math.floor(1000 * share) / 10:g}%"


def _milliseconds(key: str) -> Callable[[Summary, Summary], str]:
    return lambda summary, method: f"{1e3 * method[key]:.2f}" if method[key] else NO_VALUE


_ROWS: Mapping[str, Callable[[Summary, Summary], str]] = {
    "tokens/s": lambda summary, method: f"{method['tokens_per_second']:.1f}",
    "speedup": lambda summary, method: f"{method['speedup']:.2f}x" if method["speedup"] else NO_VALUE,
    "mean accept length": lambda summary, method: f"{method['mean_accept_length']:.2f}",
    "mean accept length inside the drafter": lambda summary, method: (
        f"{method['mean_draft_accept_length']:.2f}" if method["mean_draft_accept_length"] else NO_VALUE),
    "answers identical to baseline": lambda summary, method: _identical(method["identical_share"]),
    "prefill of {prefill_tokens} tokens, ms": _milliseconds("prefill_time"),
    "draft, ms a round": _milliseconds("draft_time"),
    "verify, ms a round": _milliseconds("verify_time"),
    "weights and cache read, GB/s": lambda summary, method: f"{method['achieved_bandwidth'] / 1e9:.1f}",
    "of the device's copy speed": lambda summary, method: (
        f"{method['achieved_bandwidth'] / summary['device_bandwidth']:.0%}"),
}
