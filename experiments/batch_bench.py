"""Times many sequences in one loop at real sizes with random weights: python -m experiments.batch_bench --shape=llama3-8b

First a request for each slot, all of one length, through `specmq_jax.Engine`: tokens a second of decoding alone, of all
sequences and of a user's one. Then requests of unequal lengths that come and go, three for each slot and at least six: tokens a
second with the time that prompts take, while every slot is taken. With random weights drafts are never right: --accept_length
makes the target draw what was drafted as often as that mean asks for, at the full cost of its pass. As many calls draft as pay,
unless --nobudget has all do; then short requests go first, from which the engine learns what drafts are worth.

Some flags are those of the other experiments, with defaults of their own here: --methods is baseline; --precision is w4a16, and
takes several names, separated by commas; an EAGLE head's tree is 5/4/16.
"""

import dataclasses
import pathlib
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jaxlib
from absl import flags as absl_flags
from rich.console import Console

from experiments.display import plots, tables
from experiments.display.cells import number, part
from experiments.running import flags, methods
from experiments.timing import batches, bench_flags, device
from experiments.timing.batches import Measure, Settings
from experiments.timing.sizes import shape
from specmq_jax.commands import entry
from specmq_jax.decoding.config import TreeConfig
from specmq_jax.errors import UserError

_TREE = TreeConfig(depth=5, top_k=4, size=16)


def main(argv: Sequence[str]) -> None:
    """Reads the flags, measures and prints."""
    flags.no_arguments(argv)
    given = absl_flags.FLAGS
    settings = _settings()
    file, picture = (pathlib.Path(name) if name else None for name in (given.json, given.plot))
    if file:
        tables.check_file(file, "json")
    if picture:
        tables.check_file(picture, "png")
    about = {"device": device.device_name(), "jax": jax.__version__, "jaxlib": jaxlib.__version__,
             "python": platform.python_version(), "shape": given.shape, "settings": dataclasses.asdict(settings)}
    run(settings, about, file=file, picture=picture)


def run(settings: Settings, about: Mapping[str, Any], *, file: pathlib.Path | None = None, picture: pathlib.Path | None = None,
        console: Console | None = None) -> list[Measure]:
    """Measures, prints the table, and writes what was asked for, of what there is where an error ends it."""
    console, progress = console or tables.stdout(), Console(stderr=True)
    measures: list[Measure] = []
    bandwidth = device.device_bandwidth()
    try:
        for measure in batches.measure(settings):
            measures.append(measure)
            progress.print(f"{measure.precision}, {measure.method}, batch {measure.batch}: "
                           f"{number(measure.tokens_per_second, 0)} tokens/s, warm-up {measure.warm_up:.0f} s",
                           highlight=False, markup=False, soft_wrap=True)
            if file:
                tables.write(file, tables.json_text({**about, "bandwidth": bandwidth,
                                                     "measures": [_entry(measure) for measure in measures]}))
    finally:
        if measures:
            speed = f"copies {number(bandwidth / 1e9, 0)} GB/s" if bandwidth else "copies not measured"
            console.print(f"{about['device']}, {speed} | jax {about['jax']}, Python {about['python']} | {about['shape']}",
                          highlight=False, markup=False, soft_wrap=True)
            tables.show(_COLUMNS, measures, console, texts=2)
            if picture:
                plots.plot_throughput(_curves(measures), picture, title=f"{about['shape']} on {about['device']}")
    return measures


_COLUMNS: Mapping[str, Callable[[Measure], str]] = {
    "precision": lambda measure: measure.precision,
    "method": lambda measure: measure.method,
    "batch": lambda measure: number(measure.batch, 0),
    "context": lambda measure: number(measure.context, 0),
    "tokens/s": lambda measure: number(measure.tokens_per_second, 0),
    "tokens/s\ndecoding": lambda measure: number(measure.decoding_tokens_per_second, 0),
    "tokens/s\na user": lambda measure: number(measure.tokens_per_second_of_a_user, 1),
    "tokens\na round": lambda measure: number(measure.accept_length, 2),
    "drafted": lambda measure: part(measure.drafted),
    "host": lambda measure: part(measure.host),
    "warm-up\ns": lambda measure: number(measure.warm_up, 0)}


def _curves(measures: Sequence[Measure]) -> dict[str, list[tuple[float, float]]]:
    """Of each precision and method, tokens/s of a user and of all, by batch."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for measure in measures:
        if measure.decoding_tokens_per_second and measure.tokens_per_second_of_a_user:
            name = f"{measure.precision} {measure.method}, context {measure.context}"
            curves.setdefault(name, []).append((measure.tokens_per_second_of_a_user, measure.decoding_tokens_per_second))
    return curves


def _entry(measure: Measure) -> dict[str, Any]:
    """Times in seconds, sizes in bytes."""
    return {**dataclasses.asdict(measure), "drafted": measure.drafted, "tokens_per_second": measure.tokens_per_second,
            "decoding_tokens_per_second": measure.decoding_tokens_per_second,
            "tokens_per_second_of_a_user": measure.tokens_per_second_of_a_user}


def _settings() -> Settings:
    given = absl_flags.FLAGS
    tokens = bench_flags.counts("tokens")
    if len(tokens) > 2 or tokens[0] > tokens[-1]:
        raise UserError(f"--tokens={','.join(given.tokens)} must be the least and the most that a request asks for")
    return Settings(
        config=shape(given.shape), precisions=bench_flags.precisions(), head_precision=bench_flags.head_precision(),
        methods=bench_flags.methods(methods.NAMES, "baseline"), drafting=bench_flags.drafting(_TREE),
        batches=bench_flags.counts("batches"), contexts=bench_flags.counts("contexts"), tokens=(tokens[0], tokens[-1]),
        accept_length=given.accept_length, reproducible=given.reproducible, budget=given.budget)


def declare_flags() -> None:
    """Declares the command's flags; not at import, where they would clash with those of other commands."""
    bench_flags.declare_flags()
    absl_flags.adopt_module_key_flags(bench_flags)
    absl_flags.DEFINE_list("batches", "1,2,4,8,16,32,64".split(","), "Numbers of sequences that are decoded at once.")
    absl_flags.DEFINE_list("contexts", ["64"], "Tokens of the prompts.")
    absl_flags.DEFINE_list("tokens", ["64", "512"], "The least and the most new tokens of a request; each draws its own.")
    absl_flags.DEFINE_float("accept_length", None, "Mean tokens that a round commits, the bonus token counted. Default: what "
                            "random weights give, which is 1.", lower_bound=1)
    absl_flags.DEFINE_bool("budget", True, "Draft as much as pays with so many sequences; --nobudget drafts in every round.")
    absl_flags.DEFINE_string("json", None, "Also write all figures into this file, again behind each.")
    absl_flags.DEFINE_string("plot", None, "Also draw throughput against a user's speed into this .png file.")


if __name__ == "__main__":
    declare_flags()
    entry.run(main, unused="models and heads are random, and of the shape that --shape names")
