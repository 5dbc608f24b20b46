"""Times every kernel at the sizes of real models: python -m experiments.kernel_bench

Weights and caches are read cold, launch gaps are counted. A table of each model and op, printed as soon as it is measured.
"""

import concurrent.futures
import dataclasses
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
from absl import flags as absl_flags
from rich.console import Console

from experiments.answers import metrics
from experiments.display import tables
from experiments.display.cells import NO_VALUE, number, significant, times
from experiments.display.lines import say
from experiments.kernels import cases, timing
from experiments.kernels.cases import Case, linears
from experiments.kernels.timing import Loop, Plan, Timing
from experiments.running import flags
from experiments.timing import bench_flags, device
from experiments.timing.sizes import SHAPES
from pallas_kernels.w4a16.api import GROUP_SIZES
from specmq_jax import words
from specmq_jax.commands import entry
from specmq_jax.network.config import LlamaConfig

_LOOP_SECONDS = 2e-2
_CONTEXTS = (512, 4096, 16384)
_ROUNDED = "w4a8-qqq"  # whose partial sums the rounded ops add up
_CUTS = (0, 0.9), (20, 0.95), (50, 1.0), (0, 1.0)  # top_k and top_p
_DRAFTED, _RANKED_VOCABULARY = 10, 32768  # candidates of a node of the papers' trees, and a frequency-ranked vocabulary
_MARLIN: Mapping[str, Sequence[float]] = json.loads(
    (pathlib.Path(__file__).parent / "data" / "marlin_h200.json").read_text(encoding="utf-8"))
"""SpecMQuant's own W4A16 product in groups of 128 (Marlin) on an H200: "rows", and by "KxN" microseconds at these rows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """A call to measure.

    Attributes:
      shape: its sizes in words.
      case: the call.
      xla: what it is compared with, a call and its implementation; None compares it with nothing.
      marlin: seconds that the peer's kernel takes on an H200, where they are known.
    """

    shape: str
    case: Case
    xla: tuple[Case, str | None] | None = None
    marlin: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """A row of the table. Times are in seconds, traffic in bytes (each read or written once), bandwidths in bytes/s.

    `error` is what the kernel said where it failed to compile or run; its times are None then.
    """

    op: str
    model: str
    shape: str
    rows: int
    seconds: float | None
    spread: float | None
    traffic: int
    bandwidth: float | None
    xla_seconds: float | None
    marlin_seconds: float | None
    error: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """What to measure.

    Attributes:
      rows: tokens of a step; None is each op's own choice.
      group_size: of the 4-bit weights.
      runs: of each loop.
    """

    rows: tuple[int, ...] | None = None
    group_size: int = 128
    runs: int = 30

    def items(self, op: str, model: LlamaConfig) -> list[Item]:
        """What is measured of an op."""
        default, find = OPS[op]
        return list(find(self, model, self.rows or default))

    def measure(self, op: str, name: str, compared: dict[tuple, Timing]) -> list[Line]:
        """Measures one op at the sizes of the model `name`; `compared` keeps XLA's times for the ops behind."""
        items = self.items(op, SHAPES[name])
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            futures = [pool.submit(_compile, item.case, None) for item in items]
        lines = []
        for item, future in zip(items, futures, strict=True):
            ours = error = None
            try:
                ours = self._time(item.case, future.result())
            except Exception as fault:  # one kernel that fails must not cost the figures of the others
                error = (str(fault).strip() or repr(fault)).splitlines()[0]
            lines.append(Line(
                op=op, model=name, shape=item.shape, rows=item.case.rows, seconds=ours and ours.median,
                spread=ours and ours.spread, traffic=item.case.traffic, bandwidth=ours and item.case.traffic / ours.median,
                xla_seconds=self._xla(item, compared), marlin_seconds=item.marlin, error=error))
        return lines

    def _xla(self, item: Item, compared: dict[tuple, Timing]) -> float | None:
        if item.xla is None:
            return None
        case, implementation = item.xla
        key = case.label, case.rows, implementation
        if key not in compared:
            compared[key] = self._time(case, _compile(case, implementation))
        return compared[key].median

    def _time(self, case: Case, loop: Loop) -> Timing:
        return timing.median_time(loop, case.operands(_plan(case).copies), self.runs)


def _plan(case: Case) -> Plan:
    return Plan.of(cold_bytes=case.cold_bytes, traffic=case.traffic, seconds=_LOOP_SECONDS)


def _compile(case: Case, implementation: str | None) -> Loop:
    plan = _plan(case)
    return timing.compile_loop(case.step(None, implementation), case.abstract_operands(plan.copies), plan,
                               carried=case.carried)


Find = Callable[[Bench, LlamaConfig, Sequence[int]], Iterable[Item]]
"""Finds what is measured of an op at a model's sizes and these rows."""


def _products(make: Callable[[Bench, int, int, int], Case], *, head: bool = False, marlin: bool = False) -> Find:
    """Products of the model's linear layers by `make(bench, rows, K, N)`, and lm_head's where `head` says so."""
    def find(bench: Bench, model: LlamaConfig, rows: Sequence[int]) -> Iterable[Item]:
        sizes = {**linears(model), **({"lm_head": (model.hidden_size, model.vocab_size)} if head else {})}
        for (name, (inner, columns)), count in itertools.product(sizes.items(), rows):
            case = make(bench, count, inner, columns)
            yield Item(shape=f"{name} {case.label}", case=case, xla=(cases.dense_product(count, inner, columns), None),
                       marlin=_marlin(inner, columns, count) if marlin and bench.group_size == 128 else None)
    return find


def _w4a16(result: str) -> Find:
    return _products(lambda bench, *sizes: cases.product(*sizes, bench.group_size, result=result), marlin=True)


def _integer_products(kind: str) -> Find:
    return _products(lambda bench, *sizes: cases.integer_product(*sizes, kind, result="partials"))


def _steps(make: Callable[[Bench, LlamaConfig, int], Case], *, compared: bool = True) -> Find:
    """Calls by `make(bench, model, rows)`; those that are `compared` are so with their op in plain jnp."""
    def find(bench: Bench, model: LlamaConfig, rows: Sequence[int]) -> Iterable[Item]:
        for count in rows:
            case = make(bench, model, count)
            yield Item(shape=case.label, case=case, xla=(case, "reference") if compared else None)
    return find


def _marlin(inner: int, columns: int, rows: int) -> float | None:
    microseconds = _MARLIN.get(f"{inner}x{columns}")
    if microseconds is None or rows not in _MARLIN["rows"] or "H200" not in device.device_name():
        return None
    return 1e-6 * microseconds[_MARLIN["rows"].index(rows)]


def _splits(bench: Bench, model: LlamaConfig, linear: str, rows: int, kind: str | None = None) -> int:
    """The partial sums that the op behind a product of the model has to add, one of `kind` or W4A16's."""
    sizes = linears(model)[linear]
    case = (cases.integer_product(rows, *sizes, kind, result="partials") if kind else
            cases.product(rows, *sizes, bench.group_size, result="partials"))
    [partials] = jax.eval_shape(case.step(None, None), *case.abstract_operands(1)[0])
    return partials.shape[0]


def _attention(bench: Bench, model: LlamaConfig, rows: Sequence[int]) -> Iterable[Item]:
    for context, count in itertools.product(_CONTEXTS, rows):
        case = cases.tree_attention(count, model, context)
        yield Item(shape=case.label, case=case)


def _top_k(bench: Bench, model: LlamaConfig, rows: Sequence[int]) -> Iterable[Item]:
    for vocab, count in itertools.product(sorted({model.vocab_size, min(model.vocab_size, _RANKED_VOCABULARY)}), rows):
        case = cases.best_of_vocabulary(count, vocab, _DRAFTED)
        yield Item(shape=case.label, case=case, xla=(case, "reference"))


def _nucleus(bench: Bench, model: LlamaConfig, rows: Sequence[int]) -> Iterable[Item]:
    for (k, p), count in itertools.product(_CUTS, rows):
        case = cases.cut_of_vocabulary(count, model.vocab_size, k, p)
        yield Item(shape=case.label, case=case, xla=(case, "reference"))


_TREE_ROWS = (1, 10, 30, 60)
_SLOTS = (1, 8, 64)
OPS: Mapping[str, tuple[tuple[int, ...], Find]] = {
    "w4a16": (tuple(_MARLIN["rows"]), _w4a16("partials")), "w4a16_product": (tuple(_MARLIN["rows"]), _w4a16("product")),
    "dense": (_TREE_ROWS, _products(lambda bench, *sizes: cases.split_dense_product(*sizes))),
    "w8a16": (_TREE_ROWS, _products(lambda bench, *sizes: cases.weight_only_product(*sizes, result="partials"), head=True)),
    **{kind: (_TREE_ROWS, _integer_products(kind)) for kind in cases.INTEGER_KINDS},
    "attention": (_TREE_ROWS, _attention),
    "norm": (_TREE_ROWS, _steps(lambda bench, model, rows: cases.add_norm(
        rows, model.hidden_size, _splits(bench, model, "down", rows)))),
    "rope": (_TREE_ROWS, _steps(lambda bench, model, rows: cases.rope_append(
        rows, model, _splits(bench, model, "qkv", rows)))),
    "keep": (_SLOTS, _steps(lambda bench, model, rows: cases.keep_path(rows, model))),
    "silu_mul": (_TREE_ROWS, _steps(lambda bench, model, rows: cases.silu_mul(
        rows, model.intermediate_size, _splits(bench, model, "gate_up", rows)), compared=False)),
    "rounded_norm": (_TREE_ROWS, _steps(lambda bench, model, rows: cases.rounded_add_norm(
        rows, model.hidden_size, _splits(bench, model, "down", rows, _ROUNDED)))),
    "rounded_silu_mul": (_TREE_ROWS, _steps(lambda bench, model, rows: cases.rounded_silu_mul(
        rows, model.intermediate_size, _splits(bench, model, "gate_up", rows, _ROUNDED)))),
    "top_k": ((1, 10), _top_k), "nucleus": ((1, 8, 60), _nucleus)}
"""Each op's rows where none are asked for, and what is measured of it. w4a16 leaves partial sums to the op behind it, as in
a model; w4a16_product and dense add them up. Products of 8-bit activations leave out the rounding: the rounded ops have it.
The rows of keep are sequences."""


def run(bench: Bench, ops: Sequence[str], models: Sequence[str], json_file: pathlib.Path | None = None,
        console: Console | None = None) -> list[Line]:
    """Measures and prints; the JSON file is written again behind every table, so that a stopped run leaves one."""
    console = console or tables.stdout()
    about = {"device": device.device_name(), "device_bandwidth": device.device_bandwidth(), "jax": jax.__version__,
             "runs": bench.runs}
    copies = about["device_bandwidth"]
    speed = f", copies {number(copies / 1e9, 0)} GB/s at the start" if copies else ""
    say(console, f"{about['device']}{speed} | jax {about['jax']} | medians of {words.count(bench.runs, 'run')}\nXLA: the dense "
        "f16 product for products, plain jnp for other ops; \"of\" is our time over theirs")
    lines: list[Line] = []
    for model in models:
        compared: dict[tuple, Timing] = {}
        for op in ops:
            measured = bench.measure(op, model, compared)
            lines += measured
            tables.show(_COLUMNS, measured, console, texts=1, keys=2, title=f"{op}, {model}")
            for line in measured:
                if line.error:
                    say(console, f"{line.shape}, {words.count(line.rows, 'row')}: {line.error}", wrap=True)
            if json_file:
                tables.write(json_file, tables.json_text(about | {"lines": [dataclasses.asdict(line) for line in lines]}))
    return lines


def _microseconds(seconds: float | None, digits: int = 2) -> str:
    return NO_VALUE if seconds is None else number(1e6 * seconds, digits)


_COLUMNS: Mapping[str, Callable[[Line], str]] = {
    "shape": lambda line: line.shape, "rows": lambda line: str(line.rows),
    "us": lambda line: _microseconds(line.seconds),
    "spread": lambda line: _microseconds(line.spread),
    "MB": lambda line: significant(line.traffic / 1e6),
    "GB/s": lambda line: NO_VALUE if line.bandwidth is None else significant(line.bandwidth / 1e9),
    "XLA\nus": lambda line: _microseconds(line.xla_seconds),
    "of\nXLA": lambda line: times(metrics.ratio(line.seconds, line.xla_seconds)),
    "Marlin\nus": lambda line: _microseconds(line.marlin_seconds, 1),
    "of\nMarlin": lambda line: times(metrics.ratio(line.seconds, line.marlin_seconds))}


def main(argv: Sequence[str]) -> None:
    """Reads the flags and measures."""
    flags.no_arguments(argv)
    given = absl_flags.FLAGS
    default = ["demo"] if jax.default_backend() == "cpu" else ["llama3-8b", "llama3-70b"]
    ops, models = bench_flags.chosen("ops", OPS), bench_flags.chosen("shapes", SHAPES, given.shapes or default)
    rows = bench_flags.counts("rows") if given.rows else None
    json_file = pathlib.Path(given.json) if given.json else None
    if json_file:
        tables.check_file(json_file, "json")
    run(Bench(rows=rows, group_size=int(given.group_size), runs=given.runs), ops, models, json_file)


def declare_flags() -> None:
    """Declares the command's flags; not at import, where they would clash with those of other commands."""
    absl_flags.DEFINE_list("ops", list(OPS), "Ops to time.")
    absl_flags.DEFINE_list("shapes", None, f"Models whose sizes to time at, of {', '.join(SHAPES)}. Default: demo on a "
                           "CPU, llama3-8b,llama3-70b on a GPU.")
    absl_flags.DEFINE_list("rows", None, "Tokens of a step; of keep, sequences. Default: 1,8,16,32,48,60,64 for w4a16, 1,10 "
                           "for top_k, 1,8,60 for nucleus, 1,8,64 for keep, 1,10,30,60 for others.")
    absl_flags.DEFINE_enum("group_size", "128", [str(size) for size in GROUP_SIZES],
                           "Rows of a 4-bit weight that share a scale; -1 is all.")
    absl_flags.DEFINE_integer("runs", 30, "Runs of a loop of about 20 ms, of which the median counts.", lower_bound=1)
    absl_flags.DEFINE_string("json", None, "Also write the figures into this file: times in seconds, traffic in bytes.")


if __name__ == "__main__":
    declare_flags()
    entry.run(main)
