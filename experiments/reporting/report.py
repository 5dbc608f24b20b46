"""The table, the summary and the plot of a run."""

import itertools
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.answers import metrics
from experiments.answers.answer_files import Answer
from experiments.answers.scoring import score_file
from experiments.cost.predict import describe
from experiments.display import plots
from experiments.display.cells import NO_VALUE, milliseconds, number, part, percent, times
from experiments.display.lines import say
from experiments.display.tables import json_text, print_in_parts, stdout, write
from experiments.reporting.figures import compare
from experiments.running import methods
from experiments.running.runner import Result
from experiments.running.settings import Settings
from specmq_jax import formats
from specmq_jax.decoding.sampling import Greedy, Sampling
from specmq_jax.words import count

_LABEL_WIDTH, _BAR_COLUMN_WIDTH = 33, 16
"""Of the table's columns with bars in them, borders included."""

Summary = Mapping[str, Any]


def report(settings: Settings, results: Sequence[Result], console: Console | None = None) -> None:
    """Prints the table to stdout and writes summary.json and plot.png into the output directory."""
    console = console or stdout()
    summary = summarise(settings, results)
    write(settings.output_dir / "summary.json", json_text(summary))
    plots.plot(summary, settings.output_dir / "plot.png")
    print_table(summary, console)
    written = [str(settings.answers(result.method)) for result in results]
    written += [str(score_file(settings.answers(result.method))) for result in results if result.score]
    written += [str(settings.output_dir / name) for name in ("summary.json", "plot.png")]
    say(console, f"Wrote {', '.join(written)}")


def summarise(settings: Settings, results: Sequence[Result]) -> dict[str, Any]:
    """What summary.json holds: the run's machine and settings, and each method's figures.

    Tokens/s are those of `metrics.speed`, averaged over questions. Times are in seconds, bandwidths in bytes a second; the
    device's was measured right behind the method's answers. The histogram counts, at index i, rounds that accepted i + 1
    tokens; the depth acceptance is, at index i, the share of the rounds which accepted i drafts that accepted another (a
    round whose drafts ended there counts as one that did not). Turns are compared with the baseline's while their prompts
    are the same. Figures relative to the baseline are None where it did not run, others where they were not measured. Tasks
    are there where the benchmark has some, a score where answers were judged, and what was "chosen" of method auto.
    """
    base = next((result for result in results if result.method == "baseline"), None)
    expanded = settings.models.drafter is None and results[0].measured["device"].startswith("CPU")
    measured = results[0].measured
    return {
        "device": measured["device"], "jax": measured["jax"],
        "python": platform.python_version(), "model": settings.models.target_name, "precision": measured["precision"],
        "reproducible": settings.reproducible, "max_length": measured["max_length"], "slots": settings.slots,
        "prefill_tokens": measured.get("phase_prompt_tokens"), "max_new_tokens": settings.max_new_tokens,
        "sampling": _words(settings.sampling), "benchmark": settings.benchmark.title, "questions": len(results[0].answers),
        "turns": sum(len(answer.new_tokens) for answer in results[0].answers),
        "question_file": settings.question_file.name,
        "methods": {result.method: _figures(result, base, _chosen(settings, result.method)) | {
            "tasks": _tasks(result, base, settings.benchmark.task) if settings.benchmark.task else {},
            "expanded_drafter": expanded and methods.METHODS[result.method].small_model} for result in results},
    }


def print_table(summary: Summary, console: Console) -> None:
    """One column a method, one row a figure, acceptance by length and by depth below; several tables where one is too wide."""
    say(console, f"{summary['device']} | jax {summary['jax']}, Python {summary['python']}\n{summary['model']} at "
        f"{summary['precision']}, cache of {summary['max_length']} tokens | {count(summary['questions'], 'question')}, "
        f"{count(summary['turns'], 'turn')} of {count(summary['max_new_tokens'], 'token')} at most "
        f"({summary['question_file']}), {summary['sampling']}"
        + (f" | {summary['slots']} questions side by side: tokens/s of all together" if summary["slots"] > 1 else ""))
    figures = summary["methods"]
    bars = _LABEL_WIDTH + _BAR_COLUMN_WIDTH * len(figures) <= console.width
    rows = _rows(summary, bars)
    print_in_parts(lambda shown: _table(figures, rows, shown), list(figures), console)
    for line in _remarks(summary):
        say(console, line, wrap=True)


def _rows(summary: Summary, bars: bool) -> list[dict[str, Callable[[Summary], str]]]:
    """The table's sections: what each row shows of a method. Rows without a value are left out."""
    figures = list(summary["methods"].values())
    single = {name.format(**summary): show for name, show in _ROWS.items()
              if any(show(method) != NO_VALUE for method in figures)}
    kind, shown = _TASK_ROWS[any(method["speedup"] is not None for method in figures)]
    tasks = {f"{kind}, {task}": (lambda method, task=task: shown(method["tasks"][task])) for task in figures[0]["tasks"]}
    longest = max(len(method["accept_histogram"]) for method in figures)
    lengths = {f"rounds accepting {count(length, 'token')}": (lambda method, length=length: _share(method, length, bars))
               for length in range(1, longest + 1)}
    depths = {f"draft {depth} accepted" + (f" where {depth - 1} was" if depth > 1 else ""): (
        lambda method, depth=depth: _depth_share(method, depth)) for depth in range(1, longest)}
    return [single, tasks, lengths, depths]


def _table(figures: Summary, sections: Sequence[Mapping[str, Callable[[Summary], str]]], shown: Sequence[str]) -> Table:
    table = Table()
    table.add_column("", no_wrap=True)
    for method in shown:
        chosen = figures[method]["chosen"]
        table.add_column(escape(f"{method}:\n{chosen['method']}" if chosen else method), justify="right", no_wrap=True)
    for section in sections:
        for name, show in section.items():
            table.add_row(escape(name), *(escape(show(figures[method])) for method in shown))
        table.add_section()
    return table


def _remarks(summary: Summary) -> list[str]:
    """What has to be known of the figures."""
    figures, lines = summary["methods"], []
    for method, figure in figures.items():
        if figure["chosen"]:
            predicted = figure["chosen"]["predicted_tokens_per_second"]
            lines.append(f"{method} is {figure['chosen']['flags']}" + (
                "" if predicted is None else f", predicted to make {number(predicted, 1)} tokens/s"))
        if figure["cut"]:
            lines.append(f"{method}: {count(figure['cut'], 'question ends', 'questions end')} early, later turns did not fit "
                         "into the cache (\"cut\" in the answers tells which)")
        if figure["stray_differences"]:
            lines.append(f"{method}: {figure['stray_differences']} of {count(figure['differences'], 'difference')} "
                         f"{'is' if figure['stray_differences'] == 1 else 'are'} not between the target's two best tokens "
                         "(\"differences\" in the method's .settings.json lists them)")
    fast = [method for method, figure in figures.items() if (_copy_share(figure) or 0) >= 1.005]
    if fast:
        most = max(figures[method]["bytes_per_round"] for method in fast)
        lines.append(f"{' and '.join(fast)}: more is read than the device copies in the same time. A round reads "
                     f"{most / 1e6:.1f} MB at most; what caches hold needs no memory, and reading may be faster than copying.")
    parted = any(figure["identical_share"] not in (None, 1) for figure in figures.values())
    if parted and formats.get(summary["precision"]).activation_bits == 8 and not summary["reproducible"]:
        lines.append(f"At {summary['precision']} a last bit that differs becomes a whole code of an activation; with "
                     "--reproducible no last bit depends on how many rows a method verifies at once.")
    slow = [method for method, figure in figures.items()
            if figure["expanded_drafter"] and figure["speedup"] is not None and figure["speedup"] < 1]
    if slow:
        lines.append(f"On a CPU, low-bit weights are expanded to f32: a token that the small model of {' and '.join(slow)} "
                     "makes costs as much as one of the target, so no speedup can be expected there.")
    return lines


def _chosen(settings: Settings, method: str) -> dict[str, Any] | None:
    """What method auto stands for; None for other methods."""
    choice = settings.models.auto
    if method != methods.AUTO or choice is None:
        return None
    tree = {"depth": choice.tree.depth, "top_k": choice.tree.top_k, "size": choice.tree.size}
    hierarchy = {"tree": tree, "min_draft_length": choice.min_draft_length}
    of_method = {"baseline": {}, "spec": {"draft_length": choice.draft_length}, "hier": hierarchy}
    kept: dict[str, Any] = of_method.get(choice.method, {"tree": tree})
    return {"method": choice.method, **kept, "flags": describe(choice), "predicted_tokens_per_second": choice.predicted}


def _figures(result: Result, base: Result | None, chosen: Mapping[str, Any] | None) -> dict[str, Any]:
    found, measured = result.answers, result.measured
    beside = compare(found, base.answers if base else found)
    accepted = [length for answer in found for length in answer.accept_lengths]
    inner = [length for answer in found for length in answer.draft_accept_lengths]
    seconds = sum(sum(answer.wall_time) for answer in found)
    histogram = metrics.accept_histogram(accepted).tolist()
    differences = measured.get("differences", ()) if base else ()
    drafts = (chosen["method"] if chosen else result.method) != "baseline"
    speed, speedup = beside.tokens_per_second, beside.speedup
    if "throughput" in measured:
        speed, speedup = measured["throughput"], metrics.ratio(measured["throughput"], base and base.measured["throughput"])
    traffic = measured.get("bytes_per_round")
    return {
        "chosen": chosen, "tokens_per_second": speed, "speedup": speedup if base else None,
        "mean_accept_length": beside.accept_length,
        "mean_draft_accept_length": metrics.mean_accept_length(inner) if inner else None,
        "accept_histogram": histogram, "depth_acceptance": _depth_acceptance(histogram),
        "turns": beside.turns, "comparable_turns": beside.compared_turns if base else None,
        "identical_share": beside.identical_share if base else None, "differences": len(differences),
        "largest_gap": max((entry["gap"] for entry in differences), default=None),
        "stray_differences": sum(not entry["top_two"] for entry in differences),
        "prefill_time": measured.get("prefill"), "draft_time": measured.get("draft") if drafts else None,
        "verify_time": measured.get("verify"), "round_time": measured.get("round"), "bytes_per_round": traffic,
        "achieved_bandwidth": traffic * len(accepted) / seconds if traffic and accepted and seconds else None,
        "device_bandwidth": measured.get("device_bandwidth"),
        "new_tokens": sum(sum(answer.new_tokens) for answer in found), "wall_time": seconds,
        "categories": {category: metrics.mean_speed(answer.speed for answer in group)
                       for category, group in by_category(found).items()},
        "cut": sum(answer.cut is not None for answer in found),
        "score": result.score.figures if result.score else None,
    }


def _tasks(result: Result, base: Result | None, task: Callable[[str], str]) -> dict[str, dict[str, Any]]:
    grouped, bases = by_category(result.answers, task), by_category(base.answers, task) if base else {}
    beside = {name: compare(group, bases.get(name, group)) for name, group in grouped.items()}
    return {name: {
        "questions": len(group), "tokens_per_second": beside[name].tokens_per_second,
        "speedup": beside[name].speedup if base else None,
        "mean_accept_length": metrics.mean_accept_length([length for answer in group for length in answer.accept_lengths]),
    } for name, group in grouped.items()}


def by_category(found: Sequence[Answer], task: Callable[[str], str] = str) -> dict[str, list[Answer]]:
    """The answers of each category, or of each task that `task` counts categories to, in order of first appearance."""
    groups: dict[str, list[Answer]] = {}
    for answer in found:
        groups.setdefault(task(answer.category), []).append(answer)
    return groups


def _depth_acceptance(histogram: Sequence[int]) -> list[float]:
    reached = [sum(histogram[depth:]) for depth in range(len(histogram))]
    return [further / here for here, further in itertools.pairwise(reached)]


def _share(method: Summary, length: int, bars: bool) -> str:
    counts = method["accept_histogram"]
    total = sum(counts)
    if length > len(counts) or not total:
        return NO_VALUE
    bar = f"{'█' * round(8 * counts[length - 1] / total):<8} " if bars else ""
    return f"{bar}{percent(counts[length - 1] / total):>4}"


def _depth_share(method: Summary, depth: int) -> str:
    shares = method["depth_acceptance"]
    return percent(shares[depth - 1]) if depth <= len(shares) else NO_VALUE


def _copy_share(method: Summary) -> float | None:
    return metrics.ratio(method["achieved_bandwidth"], method["device_bandwidth"])


def _words(sampling: Greedy | Sampling) -> str:
    if isinstance(sampling, Greedy):
        return "greedy"
    return f"temperature {sampling.temperature}, top_k {sampling.top_k}, top_p {sampling.top_p}"


def identical(share: float | None) -> str:
    """With a decimal where there is one; 100% is all and 0% is none."""
    return percent(share, 1).replace(".0%", "%")


def _comparable(method: Summary) -> str:
    found, turns = method["comparable_turns"], method["turns"]
    return NO_VALUE if found in (None, turns) else f"{found}/{turns}"


def _setting(method: Summary) -> str:
    """A tree is written depth/top-k/size, as in the papers."""
    chosen = method["chosen"] or {}
    tree = chosen.get("tree")
    parts = [f"{tree['depth']}/{tree['top_k']}/{tree['size']}"] if tree else []
    parts += [count(chosen[name], "token") for name in ("draft_length", "min_draft_length") if name in chosen]
    return ", ".join(parts) or NO_VALUE


def _scored(metric: str) -> Callable[[Summary], str]:
    def show(method: Summary) -> str:
        score = method["score"]
        return percent(score["share"], 1) if score and score["metric"] == metric else NO_VALUE

    return show


def _value(key: str, digits: int, scale: float = 1.0) -> Callable[[Summary], str]:
    return lambda method: number(None if method[key] is None else scale * method[key], digits)


def _phase(key: str) -> Callable[[Summary], str]:
    return lambda method: milliseconds(method[key])


_TASK_ROWS: Mapping[bool, tuple[str, Callable[[Summary], str]]] = {
    True: ("speedup", lambda figures: times(figures["speedup"])),
    False: ("tokens/s", lambda figures: number(figures["tokens_per_second"], 1))}
"""What is shown of each task, with a baseline and without."""

_ROWS: Mapping[str, Callable[[Summary], str]] = {
    "chosen tree or draft length": _setting,
    "accuracy": _scored("accuracy"),
    "pass@1": _scored("pass@1"),
    "tokens/s": _value("tokens_per_second", 1),
    "predicted tokens/s": lambda method: number((method["chosen"] or {}).get("predicted_tokens_per_second"), 1),
    "speedup": lambda method: times(method["speedup"]),
    "mean accept length": _value("mean_accept_length", 2),
    "accept length inside drafter": _value("mean_draft_accept_length", 2),
    "answers identical to baseline": lambda method: identical(method["identical_share"]),
    "turns comparable with it": _comparable,
    "largest gap at a difference": lambda method: (
        NO_VALUE if method["largest_gap"] is None else f"{method['largest_gap']:.2g}"),
    "prefill of {prefill_tokens} tokens, ms": _phase("prefill_time"),
    "draft, ms a round": _phase("draft_time"),
    "verify, ms a round": _phase("verify_time"),
    "weights and cache read, GB/s": _value("achieved_bandwidth", 1, 1e-9),
    "copy measured after it, GB/s": _value("device_bandwidth", 1, 1e-9),
    "of the device's copy speed": lambda method: part(_copy_share(method)),
}
