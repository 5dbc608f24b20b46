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

from experiments import comparison, methods, plots
from experiments.answers import Answer
from experiments.flags import Settings
from experiments.runner import Result
from experiments.scoring import Score, score_file
from experiments.tables import NO_VALUE
from specmq_jax import formats, metrics
from specmq_jax.sampling import Greedy, Sampling

_LABEL_WIDTH, _BAR_COLUMN_WIDTH = 33, 16
"""Of the table's columns with bars in them, borders included."""

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
    written += [str(score_file(settings.answers(result.method))) for result in results if result.score]
    written += [str(settings.output_dir / name) for name in ("summary.json", "plot.png")]
    console.print(f"Wrote {', '.join(written)}", highlight=False, markup=False, soft_wrap=True)


def stdout() -> Console:
    """Where tables go; a table for a pipe or a file is not cut to the 80 columns that rich assumes there."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


def summarise(settings: Settings, results: Sequence[Result]) -> dict[str, Any]:
    """What summary.json holds: the run's machine and settings, and each method's figures.

    Times are in seconds, bandwidths in bytes a second; the histogram counts, at index i, rounds that accepted i + 1
    tokens; the depth acceptance is, at index i, the share of the rounds which accepted i drafts that accepted another (a
    round whose drafts ended there counts as one that did not). Turns are compared with the baseline's while their prompts
    are the same. Figures relative to the baseline are None where it did not run. Tasks are there where the benchmark has
    some, a score where answers were judged.
    """
    base = next((result for result in results if result.method == "baseline"), None)
    expanded = settings.models.drafter is None and results[0].measured["device"].startswith("CPU")
    measured = results[0].measured
    return {
        "device": measured["device"], "device_bandwidth": measured["device_bandwidth"], "jax": measured["jax"],
        "python": platform.python_version(), "model": settings.models.target_name, "precision": measured["precision"],
        "reproducible": settings.reproducible, "max_length": measured["max_length"],
        "prefill_tokens": measured["phase_prompt_tokens"], "max_new_tokens": settings.max_new_tokens,
        "sampling": _words(settings.sampling), "questions": len(results[0].answers),
        "turns": sum(len(answer.new_tokens) for answer in results[0].answers),
        "question_file": settings.question_file.name,
        "methods": {result.method: _figures(result, base) | {
            "tasks": _tasks(result, base, settings.benchmark.task) if settings.benchmark.task else {},
            "expanded_drafter": expanded and methods.METHODS[result.method].small_model} for result in results},
    }


def print_table(summary: Summary, console: Console) -> None:
    """One column a method, one row a figure, acceptance by length and by depth below."""
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
    for task in figures[next(iter(figures))]["tasks"]:
        kind, show = _TASK_ROWS[any(method["speedup"] for method in figures.values())]
        table.add_row(f"{kind}, {task}", *(show(method["tasks"][task]) for method in figures.values()))
    table.add_section()
    longest = max(len(method["accept_histogram"]) for method in figures.values())
    bars = _LABEL_WIDTH + _BAR_COLUMN_WIDTH * len(figures) <= console.width
    for length in range(1, longest + 1):
        name = f"rounds accepting {length} token{'s' if length > 1 else ''}"
        table.add_row(name, *(_share(method, length, bars) for method in figures.values()))
    table.add_section()
    for depth in range(1, longest):
        name = f"draft {depth} accepted" + (f" where {depth - 1} was" if depth > 1 else "")
        table.add_row(name, *(_depth_share(method, depth) for method in figures.values()))
    console.print(table)
    for method, figure in figures.items():
        if figure["cut"]:
            console.print(f"{method}: {figure['cut']} questions end early, their later turns did not fit into the cache "
                          "(\"cut\" in the answers tells which)", highlight=False)
        if figure["stray_differences"]:
            console.print(f"{method}: {figure['stray_differences']} of {figure['differences']} differences are not between "
                          "the target's two best tokens (\"differences\" in the method's .settings.json lists them)",
                          highlight=False)
    parted = any(figure["identical_share"] not in (None, 1) for figure in figures.values())
    if parted and formats.get(summary["precision"]).activation_bits == 8 and not summary["reproducible"]:
        console.print(f"At {summary['precision']} a last bit that differs becomes a whole code of an activation; with "
                      "--reproducible no last bit depends on how many rows a method verifies at once.", highlight=False)
    slow = [method for method, figure in figures.items() if figure["expanded_drafter"] and (figure["speedup"] or 1) < 1]
    if slow:
        console.print(f"On a CPU, low-bit weights are expanded to f32: a token that the small model of {' and '.join(slow)} "
                      "makes costs as much as one of the target, so no speedup can be expected there.", highlight=False)


def _figures(result: Result, base: Result | None) -> dict[str, Any]:
    found, measured = result.answers, result.measured
    accepted = [length for answer in found for length in answer.accept_lengths]
    inner = [length for answer in found for length in answer.draft_accept_lengths]
    seconds = sum(sum(answer.wall_time) for answer in found)
    histogram = metrics.accept_histogram(accepted).tolist()
    differences = measured.get("differences", ()) if base else ()
    return {
        "tokens_per_second": statistics.fmean(answer.speed for answer in found),
        "speedup": metrics.speedup(_speeds(found), _speeds(base.answers)) if base else None,
        "mean_accept_length": metrics.mean_accept_length(accepted),
        "mean_draft_accept_length": metrics.mean_accept_length(inner) if inner else None,
        "accept_histogram": histogram, "depth_acceptance": _depth_acceptance(histogram),
        **_compared(found, base.answers if base else None), "differences": len(differences),
        "largest_gap": max((entry["gap"] for entry in differences), default=None),
        "stray_differences": sum(not entry["top_two"] for entry in differences),
        "prefill_time": measured["prefill"], "draft_time": measured["draft"], "verify_time": measured["verify"],
        "round_time": measured["round"], "bytes_per_round": measured["bytes_per_round"],
        "achieved_bandwidth": measured["bytes_per_round"] * len(accepted) / seconds,
        "new_tokens": sum(sum(answer.new_tokens) for answer in found), "wall_time": seconds,
        "categories": {category: statistics.fmean(_speeds(group)) for category, group in by_category(found).items()},
        "cut": sum(answer.cut is not None for answer in found),
        "score": _score(result.score) if result.score else None,
    }


def _score(score: Score) -> dict[str, Any]:
    return {"metric": score.metric, "share": score.share, "right": score.right, "answered": len(score.verdicts)}


def _tasks(result: Result, base: Result | None, task: Callable[[str], str]) -> dict[str, dict[str, Any]]:
    grouped, bases = by_category(result.answers, task), by_category(base.answers, task) if base else {}
    return {name: {
        "questions": len(group), "tokens_per_second": statistics.fmean(_speeds(group)),
        "speedup": metrics.speedup(_speeds(group), _speeds(bases[name])) if base else None,
        "mean_accept_length": metrics.mean_accept_length([length for answer in group for length in answer.accept_lengths]),
    } for name, group in grouped.items()}


def by_category(found: Sequence[Answer], task: Callable[[str], str] = str) -> dict[str, list[Answer]]:
    """The answers of each category, or of each task that `task` counts categories to, in order of first appearance."""
    groups: dict[str, list[Answer]] = {}
    for answer in found:
        groups.setdefault(task(answer.category), []).append(answer)
    return groups


def _speeds(found: Sequence[Answer]) -> list[float]:
    return [answer.speed for answer in found]


def _compared(found: Sequence[Answer], base: Sequence[Answer] | None) -> dict[str, Any]:
    turns = sum(len(answer.token_ids) for answer in found)
    if base is None:
        return {"turns": turns, "comparable_turns": None, "identical_share": None}
    pairs = comparison.pairs(found, base)
    return {"turns": turns, "comparable_turns": len(pairs),
            "identical_share": metrics.identical_share([pair.tokens for pair in pairs], [pair.base for pair in pairs])}


def _depth_acceptance(histogram: Sequence[int]) -> list[float]:
    reached = [sum(histogram[depth:]) for depth in range(len(histogram))]
    return [further / here for here, further in itertools.pairwise(reached)]


def _share(method: Summary, length: int, bars: bool) -> str:
    counts = method["accept_histogram"]
    total = sum(counts)
    if length > len(counts) or not total:
        return NO_VALUE
    bar = f"{'█' * round(8 * counts[length - 1] / total):<8} " if bars else ""
    return f"{bar}{counts[length - 1] / total:4.0%}"


def _depth_share(method: Summary, depth: int) -> str:
    shares = method["depth_acceptance"]
    return f"{shares[depth - 1]:.0%}" if depth <= len(shares) else NO_VALUE


def _words(sampling: Greedy | Sampling) -> str:
    if isinstance(sampling, Greedy):
        return "greedy"
    return f"temperature {sampling.temperature}, top_k {sampling.top_k}, top_p {sampling.top_p}"


def identical(share: float | None) -> str:
    """Rounded down, so that only all is 100%."""
    return NO_VALUE if share is None else f"{math.floor(1000 * share) / 10:g}%"


def _comparable(summary: Summary, method: Summary) -> str:
    del summary
    count, turns = method["comparable_turns"], method["turns"]
    return NO_VALUE if count in (None, turns) else f"{count}/{turns}"


def _milliseconds(key: str) -> Callable[[Summary, Summary], str]:
    return lambda summary, method: f"{1e3 * method[key]:.2f}" if method[key] else NO_VALUE


def _scored(metric: str) -> Callable[[Summary, Summary], str]:
    def show(summary: Summary, method: Summary) -> str:
        del summary
        score = method["score"]
        return f"{score['share']:.1%}" if score and score["metric"] == metric else NO_VALUE

    return show


def _speedup(figures: Summary) -> str:
    return f"{figures['speedup']:.2f}x" if figures["speedup"] else NO_VALUE


_TASK_ROWS: Mapping[bool, tuple[str, Callable[[Summary], str]]] = {
    True: ("speedup", _speedup), False: ("tokens/s", lambda figures: f"{figures['tokens_per_second']:.1f}")}
"""What is shown of each task, with a baseline and without."""

_ROWS: Mapping[str, Callable[[Summary, Summary], str]] = {
    "accuracy": _scored("accuracy"),
    "pass@1": _scored("pass@1"),
    "tokens/s": lambda summary, method: f"{method['tokens_per_second']:.1f}",
    "speedup": lambda summary, method: _speedup(method),
    "mean accept length": lambda summary, method: f"{method['mean_accept_length']:.2f}",
    "accept length inside drafter": lambda summary, method: (
        f"{method['mean_draft_accept_length']:.2f}" if method["mean_draft_accept_length"] else NO_VALUE),
    "answers identical to baseline": lambda summary, method: identical(method["identical_share"]),
    "turns comparable with it": _comparable,
    "largest gap at a difference": lambda summary, method: (
        NO_VALUE if method["largest_gap"] is None else f"{method['largest_gap']:.2g}"),
    "prefill of {prefill_tokens} tokens, ms": _milliseconds("prefill_time"),
    "draft, ms a round": _milliseconds("draft_time"),
    "verify, ms a round": _milliseconds("verify_time"),
    "weights and cache read, GB/s": lambda summary, method: f"{method['achieved_bandwidth'] / 1e9:.1f}",
    "of the device's copy speed": lambda summary, method: (
        f"{method['achieved_bandwidth'] / summary['device_bandwidth']:.0%}"),
}
