"""Times decoding at real sizes with random weights: python -m experiments.decode_bench --shape=llama3-8b

T_v(n), the target's pass over n rows of a draft tree (T_v(1) is plain decoding's T_t), then each method's drafting,
verification and whole rounds, and prefill. Whole rounds run as users run them, inside the jitted loop. Times are medians over
runs; what starting a loop takes is told apart, as that of a call, and where it can't be, the time is an upper bound, "<=". The
floor of a time is what its bytes, each counted once a pass, take at the speed of a large copy right behind it.

Some flags are those of the other experiments, with defaults of their own here: --methods is baseline,eagle2; --precision is
w4a16, and takes several names, separated by commas; --draft_precision is w4a16; trees are the papers' 6/10/60 and
--min_draft_length is 6, on a CPU too.
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

from experiments.display import tables
from experiments.display.cells import milliseconds, number, part
from experiments.display.lines import say
from experiments.running import flags, methods
from experiments.timing import bench_flags, device, step_times
from experiments.timing.sizes import shape, small_shape
from experiments.timing.step_times import PARTS, PREFILL_RUNS, Measure, Settings
from specmq_jax.commands import entry
from specmq_jax.decoding.config import TreeConfig
from specmq_jax.errors import UserError
from specmq_jax.words import count


def main(argv: Sequence[str]) -> None:
    """Reads the flags, measures and prints."""
    flags.no_arguments(argv)
    given = absl_flags.FLAGS
    settings = _settings()
    file = pathlib.Path(given.json) if given.json else None
    if file:
        tables.check_file(file, "json")
    run(settings, {"shape": given.shape, "draft_shape": given.draft_shape or small_shape(given.shape)},
        bandwidth=1e9 * given.bandwidth if given.bandwidth else None, file=file)


def run(settings: Settings, about: Mapping[str, Any], *, bandwidth: float | None = None, file: pathlib.Path | None = None,
        console: Console | None = None, progress: Console | None = None) -> list[Measure]:
    """Measures and prints the tables, of what there is where an error ends it.

    Args:
      settings: what to measure.
      about: more to be said in the JSON.
      bandwidth: bytes a second of the floor; by default those of a large copy, measured again behind every figure.
      file: JSON, written again behind every figure.
      console, progress: where tables and progress go; by default stdout and stderr.

    Raises:
      UserError: as in `step_times.measure`.
    """
    console, progress = console or tables.stdout(), progress or Console(stderr=True)
    about = {"device": device.device_name(), "bandwidth": bandwidth,
             "bandwidth_source": "given" if bandwidth else "copy", "jax": jax.__version__, "jaxlib": jaxlib.__version__,
             "python": platform.python_version(), **about, "settings": dataclasses.asdict(settings)}
    measures: list[Measure] = []
    try:
        for measure in step_times.measure(settings):
            measure = dataclasses.replace(measure, bandwidth=bandwidth or device.device_bandwidth())
            measures.append(measure)
            say(progress, f"{measure.precision}, {measure.name}" + (f" at {measure.context}" if measure.context else "")
                + f": {_median(measure)} ms, first call {measure.timing.first_call:.1f} s")
            if file:
                tables.write(file, tables.json_text(about | {"measures": [_entry(measure) for measure in measures]}))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"the device ran out of memory: {str(error).splitlines()[0]}; choose a lower precision, shorter "
                        "--contexts or fewer --parts") from None
    finally:
        if measures:
            _print(about, measures, console)
    return measures


def _print(about: Mapping[str, Any], measures: Sequence[Measure], console: Console) -> None:
    settings = about["settings"]
    say(console, f"{about['device']}, {_speeds(about, measures)} | jax {about['jax']}, Python {about['python']} | medians and "
        f"10th to 90th percentiles of {count(settings['runs'], 'run')} ({PREFILL_RUNS} of a prefill)")
    for precision in dict.fromkeys(measure.precision for measure in measures):
        mine = [measure for measure in measures if measure.precision == precision]
        peaks = [measure.peak for measure in mine if measure.peak]
        head = f", lm_head at {settings['head_precision']}" if settings["head_precision"] else ""
        held = max(measure.held for measure in mine)
        say(console, f"\n{about['shape']} at {precision}{head}: weights and caches of {held / 1e9:.1f} GB"
            + (f", at most {max(peaks) / 1e9:.1f} GB in use" if peaks else ""))
        for context in sorted({measure.context for measure in mine}):
            tables.show(_COLUMNS, [measure for measure in mine if measure.context == context], console, texts=1,
                        title=f"behind {count(context, 'token')}" if context else "prefill")
    if any(measure.floor and measure.floor >= 1.005 * measure.median for measure in measures):
        say(console, "A floor above the time: caches hold part of what is read, or reading is faster here than copying.")


def _speeds(about: Mapping[str, Any], measures: Sequence[Measure]) -> str:
    """The bandwidth that floors were reckoned with, in words."""
    if about["bandwidth"]:
        return f"given as {number(about['bandwidth'] / 1e9, 0)} GB/s"
    found = sorted(measure.bandwidth for measure in measures if measure.bandwidth)
    if not found:
        return "copies not measured"
    slowest, fastest = (number(bandwidth / 1e9, 0) for bandwidth in (found[0], found[-1]))
    return f"copies {slowest} GB/s" if slowest == fastest else f"copies {slowest} to {fastest} GB/s"


def _median(measure: Measure) -> str:
    return ("<=" if measure.timing.is_bound else "") + milliseconds(measure.median, 3)


_COLUMNS: Mapping[str, Callable[[Measure], str]] = {
    "": lambda measure: measure.name,
    "ms": _median,
    "spread": lambda measure: "-".join(milliseconds(bound, 3) for bound in measure.spread),
    "tokens/s": lambda measure: number(measure.tokens_per_second, 0),
    "MB": lambda measure: number(measure.moved / 1e6, 0),
    "GB/s": lambda measure: number(measure.moved / measure.median / 1e9, 0),
    "floor\nms": lambda measure: milliseconds(measure.floor, 3),
    "floor\n/time": lambda measure: part(measure.floor and measure.floor / measure.median),
    "tokens\na round": lambda measure: number(measure.accept_length, 2),
    "inner\nrounds": lambda measure: number(measure.inner_rounds, 1),
    "a call\nms": lambda measure: milliseconds(measure.timing.call, 1),
    "first\ncall, s": lambda measure: number(measure.timing.first_call, 1)}


def _entry(measure: Measure) -> dict[str, Any]:
    """Times in seconds, sizes in bytes, speeds in bytes a second."""
    low, high = measure.spread
    tokens = {"tokens_per_second": measure.tokens_per_second} if measure.part == "prefill" else {}
    return {
        "part": measure.part, "name": measure.name, "precision": measure.precision, "formats": measure.formats,
        "method": measure.method, "context": measure.context, "rows": measure.rows,
        "median": measure.median, "p10": low, "p90": high, **tokens,
        "bytes": measure.moved, "achieved_bandwidth": measure.moved / measure.median,
        "bandwidth": measure.bandwidth, "floor": measure.floor,
        "share_of_floor": measure.floor and measure.floor / measure.median, "is_bound": measure.timing.is_bound,
        "accept_length": measure.accept_length, "inner_rounds": measure.inner_rounds,
        "call": measure.timing.call, "first_call": measure.timing.first_call,
        "held_bytes": measure.held, "peak_bytes": measure.peak,
        "steps_per_run": measure.timing.steps, "runs": list(measure.timing.seconds)}


def _settings() -> Settings:
    given = absl_flags.FLAGS
    return Settings(
        config=shape(given.shape), precisions=bench_flags.precisions(), head_precision=bench_flags.head_precision(),
        methods=bench_flags.methods(methods.NAMES, "baseline", "eagle2"), drafting=bench_flags.drafting(TreeConfig()),
        parts=bench_flags.chosen("parts", PARTS), contexts=bench_flags.counts("contexts"), rows=bench_flags.counts("rows"),
        prefill=bench_flags.counts("prefill"), runs=given.runs, reproducible=given.reproducible)


def declare_flags() -> None:
    """Declares the command's flags; not at import, where they would clash with those of other commands."""
    bench_flags.declare_flags()
    absl_flags.adopt_module_key_flags(bench_flags)
    absl_flags.DEFINE_list("parts", list(PARTS), "What to measure: verify, T_v(n); draft, each method's drafting; step, its "
                           "verification and its whole rounds; prefill, tokens a second of prompts.")
    absl_flags.DEFINE_list("contexts", ["512", "4096", "16384"], "Tokens in the cache before a step. One cache serves all.")
    absl_flags.DEFINE_list("rows", "1,2,4,8,10,16,24,30,32,48,60,64".split(","), "n of T_v(n), the rows of a verification.")
    absl_flags.DEFINE_list("prefill", ["128", "512", "2048", "8192"], "Tokens of the prompts whose prefill is timed, "
                           f"{PREFILL_RUNS} runs each.")
    absl_flags.DEFINE_integer("runs", 30, "Runs of each loop, of about 40 ms and at most 64 steps each; at least 30 make the "
                              "spread mean something.", lower_bound=1)
    absl_flags.DEFINE_float("bandwidth", None, "Memory bandwidth of the floor, in GB/s, 1e9 bytes a second. Default: that of a "
                            "large copy behind each figure, bytes read and written.", lower_bound=1e-3)
    absl_flags.DEFINE_string("json", None, "Also write all figures, and the times of every run, into this file, again behind "
                             "each figure: times in seconds, sizes in bytes.")


if __name__ == "__main__":
    declare_flags()
    entry.run(main, unused="models and heads are random, and of the shape that --shape names")
