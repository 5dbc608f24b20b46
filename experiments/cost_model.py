"""Predicts the fastest settings on this machine: python -m experiments.cost_model

Measures T_t, T_d and T_v(n), sees in one run what drafts the target accepts, and computes the time a token takes,
T_avg = (d T_d + T_v(n)) / tau(n, d), for every depth and size of trees, for every chain and for the hierarchy. The method
`auto` of the other experiments takes what is best. Every time is that of several runs: the median is reckoned with, the fastest
and the slowest are told. T_v(n) and T_d never fall: what was measured to is set to the nearest curve that doesn't.

Without --methods it looks at all that fit the models. Acceptance is seen on the first turns of the questions. --tree_top_k
holds for all trees. Of --tree_depth, --tree_size, --draft_length and --min_draft_length, whole rounds are timed, and the
others' times follow from theirs.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import flags as absl_flags
from rich.console import Console
from rich.table import Table

from experiments.answers import metrics
from experiments.answers.answer_files import check_directory
from experiments.cost import cost_plots, predict
from experiments.cost.cost_search import Prediction
from experiments.cost.cost_study import Bounds, Findings
from experiments.display import tables
from experiments.display.cells import NO_VALUE, change, milliseconds, number, times
from experiments.display.lines import say
from experiments.running import claims, flags, methods, runner
from experiments.running.contents import Contents
from experiments.running.methods import Workbench
from experiments.running.settings import Settings
from experiments.timing import device
from specmq_jax import formats
from specmq_jax.commands import entry
from specmq_jax.errors import UserError
from specmq_jax.words import count

_USED = ("model", "method", "methods", "drafter", "precision", "draft_precision", "draft_length", "eagle", "tree_depth",
         "tree_top_k", "tree_size", "vocabulary", "vocabulary_size", "min_draft_length", "draft_model_start", "question_file",
         "question_begin", "question_end", "max_new_tokens", "max_length", "temperature", "top_k", "top_p", "seed",
         "reproducible", "output_dir")


def table(findings: Findings, real: Mapping[str, float | None]) -> Table:
    """Each method's best setting; `real` holds measured tokens/s by method, where they were measured."""
    return tables.table(_columns(findings, real), [findings.best(method) for method in findings.methods], texts=1)


def _columns(findings: Findings, real: Mapping[str, float | None]) -> tables.Cells:
    def off(prediction: Prediction) -> float | None:
        ratio = metrics.ratio(findings.tokens_per_second(prediction), real.get(prediction.choice.method))
        return None if ratio is None else ratio - 1

    def real_speedup(prediction: Prediction) -> float | None:
        return metrics.ratio(real.get(prediction.choice.method), real.get("baseline"))

    def speedup_off(prediction: Prediction) -> float | None:
        ratio = metrics.ratio(prediction.speedup, real_speedup(prediction))
        return None if ratio is None else ratio - 1

    return {
        "": lambda best: best.choice.method,
        "tokens/s": lambda best: number(findings.tokens_per_second(best), 1),
        "speedup": lambda best: times(best.speedup),
        "tau": lambda best: number(best.accept_length, 2),
        "inner\ntau": lambda best: number(best.inner_accept_length, 2),
        "round\nms": lambda best: milliseconds(best.seconds),
        "fastest to\nslowest run": lambda best: " to ".join(map(milliseconds, best.spread)) if best.spread else NO_VALUE,
        "measured\ntokens/s": lambda best: number(real.get(best.choice.method), 1),
        "tokens/s\noff by": lambda best: change(off(best)),
        "measured\nspeedup": lambda best: times(real_speedup(best)),
        "speedup\noff by": lambda best: change(speedup_off(best)),
    }


def summary(settings: Settings, bench: Workbench, findings: Findings, real: Mapping[str, float | None]) -> dict[str, Any]:
    """Everything that was found, as JSON values: seconds, tokens a round, tokens/s."""
    return {
        "device": device.device_name(), "jax": jax.__version__, "model": settings.models.target_name,
        "precision": bench.precision, "benchmark": settings.benchmark.title,
        "answers": findings.answers, "tokens": findings.tokens,
        "sampling": repr(settings.sampling), "top_k": settings.models.tree.top_k,
        "verify": {name: dict(zip(map(str, curve.at), curve.seconds, strict=True)) for name, curve in findings.verify.items()},
        "verify_spread": {name: {str(at): [span.fastest, span.slowest] for at, span in zip(curve.at, curve.spans, strict=True)}
                          for name, curve in findings.verify.items() if curve.spans},
        "best": dataclasses.asdict(findings.best().choice), "measured_tokens_per_second": dict(real),
        "predictions": [
            {**dataclasses.asdict(p), "tokens_per_second": findings.tokens_per_second(p)} for p in findings.predictions]}


def main(argv: Sequence[str]) -> None:
    """Reads the flags, measures, predicts and prints."""
    flags.no_arguments(argv)
    given, console, progress = absl_flags.FLAGS, tables.stdout(), Console(stderr=True)
    settings = flags.settings("cost_model", default=flags.all_methods())
    if methods.AUTO in settings.methods:
        raise UserError("the cost model is what chooses for method auto; leave it out of --methods")
    precisions = [formats.get(name).name for name in given.precisions]
    check_directory(settings.output_dir)
    limits = predict.bounds(nodes=given.most_nodes, depth=given.most_depth, draft_tokens=given.most_draft_tokens,
                            runs=given.runs)
    limits.check()
    with claims.reported(settings.output_dir):
        _run(settings, limits, precisions, console, progress)


def _run(settings: Settings, limits: Bounds, precisions: Sequence[str], console: Console, progress: Console) -> None:
    contents = Contents()
    held = {method: contents.of_method(settings.models, method) for method in settings.methods}
    settings = dataclasses.replace(settings, models=contents.placed(settings.models))
    memory = runner.plan(settings, settings.methods)
    say(progress, memory.describe())
    memory.check()
    bench = runner.load(settings)
    findings = predict.study(settings, bench, limits, functools.partial(say, progress), precisions)
    real: dict[str, float | None] = {}
    if absl_flags.FLAGS.check:
        say(progress, "running each method's best setting")
        real = predict.measured(settings, bench, [findings.best(method).choice for method in findings.methods])
    found = {**summary(settings, bench, findings, real), "contents": held}
    _write(settings.output_dir, found, findings)
    say(console, f"{found['device']} | {found['model']} at {found['precision']} | {count(found['answers'], 'answer')}, "
        f"{count(found['tokens'], 'token')}")
    tables.show(_columns(findings, real), [findings.best(method) for method in findings.methods], console, texts=1)
    say(console, f"Fastest: {predict.describe(findings.best().choice)}\nWrote {settings.output_dir / 'cost_model.json'}, "
        f"{settings.output_dir / 'cost_model.png'}")


def _write(directory: pathlib.Path, found: Mapping[str, Any], findings: Findings) -> None:
    tables.write(directory / "cost_model.json", tables.json_text(found))
    cost_plots.plot(findings, f"{found['model']} on {found['device']}\n{found['benchmark']}, "
                    f"{count(found['answers'], 'answer')}", directory / "cost_model.png")


def declare_flags() -> None:
    """Declares the command's flags; not at import, where they would clash with those of other commands."""
    for name in _USED:
        absl_flags.declare_key_flag(name)
    absl_flags.DEFINE_integer("most_nodes", None, "Nodes of the largest tree that is looked at, the root counted. Default: "
                              f"{predict.CPU_ROWS[-1]} on a CPU, {predict.GPU_ROWS[-1]} on a GPU.", lower_bound=2)
    absl_flags.DEFINE_integer("most_depth", None, "Levels of the deepest tree. Default: 5 on a CPU, 8 on a GPU.",
                              lower_bound=1)
    absl_flags.DEFINE_integer("most_draft_tokens", None, "Largest --draft_length and --min_draft_length that are looked at. "
                              "Default: 5 on a CPU, 10 on a GPU.", lower_bound=1)
    absl_flags.DEFINE_integer("runs", 10, "Runs of each timed loop, of about 40 ms each.", lower_bound=1)
    absl_flags.DEFINE_list("precisions", [], "Further precisions of the target whose T_v(n) is measured and drawn.")
    absl_flags.DEFINE_bool("check", False, "Also run each method's best setting, and say how far off the predictions "
                           "of tokens/s and speedup were.")


if __name__ == "__main__":
    declare_flags()
    entry.run(main, unused="the cost model writes no answers")
