"""Measures configs of the kernels on this machine's GPU: python -m experiments.tune

The best of each problem goes into OP/tuned/DEVICE.json as soon as it is known, so that a stopped run keeps what it has.
Kernels read these tables and measure nothing themselves. The times of w4a16 hold one launch more, which adds the partial
sums up, as whatever reads them in a model does.
"""

import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from experiments.kernels import problems
from experiments.kernels.problems import Problem
from experiments.kernels.search import NoYardstickError, OutOfTimeError, Result, Search, best
from experiments.timing import bench_flags
from experiments.timing.sizes import SHAPES
from pallas_kernels import launch
from pallas_kernels.w4a16.api import GROUP_SIZES
from specmq_jax.commands import entry
from specmq_jax.errors import UserError
from specmq_jax.files import put_text
from specmq_jax.words import count

_ELSEWHERE = "name another place with --output=DIR"


class Tables:
    """The tuned tables of this machine's device: read from the package, written there or below another directory.

    Raises:
      UserError: a table that is no JSON object.
    """

    def __init__(self, output: pathlib.Path | None):
        self._output = output

    def path(self, op: str) -> pathlib.Path:
        """Where the table of `op` is written."""
        own = launch.table_path(op)
        return own if self._output is None else self._output / op / "tuned" / own.name

    def read(self, op: str) -> dict[str, dict[str, Any]]:
        """What is known of `op`: the package's table, and over it that of the output directory."""
        known = {}
        for path in dict.fromkeys((launch.table_path(op), self.path(op))):
            if path.exists():
                try:
                    known |= json.loads(path.read_text(encoding="utf-8"))
                except (ValueError, TypeError) as error:
                    raise UserError(f"{path} is no JSON object ({error}); mend or delete it") from error
        return known

    def write(self, problem: Problem, config: Any) -> None:
        """Adds the config of a problem to the table of its op, which is never seen half written."""
        table = self.read(problem.op) | dict.fromkeys(problem.keys, dataclasses.asdict(config))
        lines = (f"  {json.dumps(key)}: {json.dumps(table[key])}" for key in sorted(table))
        put_text(self.path(problem.op), "{\n" + ",\n".join(lines) + "\n}\n", advice=_ELSEWHERE)

    def prepare(self, op: str) -> None:
        """Makes the directory of a table. Raises UserError where it can't be written to."""
        directory = self.path(op).parent
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{directory} can't be made ({error.strerror}); {_ELSEWHERE}") from error
        if not os.access(directory, os.W_OK):
            raise UserError(f"{directory} can't be written to; {_ELSEWHERE}")


def run(found: Sequence[Problem], tables: Tables, search: Search, *, retune: bool = False) -> None:
    """Decides the problems one after the other and prints a line of each.

    Args:
      found: the problems; what the tables hold already is left out, unless `retune`.
      tables: where results go, each as soon as it is known.
      search: how to look. A problem that it has no time for is left undecided, like those behind it.

    Raises:
      UserError: a table that can't be read or written.
    """
    known = {op: tables.read(op) for op in dict.fromkeys(problem.op for problem in found)}
    pending = [problem for problem in found if retune or not known[problem.op].keys() >= set(problem.keys)]
    if len(pending) < len(found):
        print(f"{len(found) - len(pending)} of {count(len(found), 'problem')} skipped: in the tables already (--nomissing "
              "tunes again)", flush=True)
    for op in dict.fromkeys(problem.op for problem in pending):
        tables.prepare(op)
    for done, problem in enumerate(pending):
        start = time.monotonic()
        try:
            result = best(problem, search)
        except OutOfTimeError:
            left = count(len(pending) - done, "problem is", "problems are")
            print(f"{problem.op} {problem.keys[0]}: the time is up; {left} left for a further run", flush=True)
            return
        except NoYardstickError as error:
            print(f"{problem.op} {problem.keys[0]}: not tuned, {error}", flush=True)
            continue
        tables.write(problem, result.config)
        print(f"{problem.op} {problem.keys[0]}: {_told(result)} in {time.monotonic() - start:.0f} s", flush=True)


def _told(result: Result) -> str:
    times = ", ".join(f"{1e6 * before:.2f} -> {1e6 * after:.2f} us"
                      for before, after in zip(result.heuristic_seconds, result.seconds, strict=True))
    failed = f", {len(result.failed)} failed ({result.failed[0]})" if result.failed else ""
    wrong = f", {result.wrong} gave another result" if result.wrong else ""
    return f"{times} with {result.config}; {count(result.tried, 'config')}{failed}{wrong}"


def main(argv: Sequence[str]) -> None:
    """Reads the flags and tunes."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; options are spelled --name=value (--help lists them)")
    given = flags.FLAGS
    ops = bench_flags.chosen("ops", problems.OPS)
    models = [SHAPES[name] for name in bench_flags.chosen("shapes", SHAPES)]
    rows = bench_flags.counts("rows")
    group_sizes = list(map(int, bench_flags.chosen("group_sizes", list(map(str, GROUP_SIZES)))))
    if jax.default_backend() != "gpu":
        raise UserError(f"tables are tuned on a GPU, and JAX sees none here (its device is {jax.devices()[0].device_kind}); "
                        "install specmq-jax[cuda12] or [cuda13] on a machine with one")
    found = [problem for op in ops for problem in problems.find(op, models, rows, group_sizes)]
    tables = Tables(pathlib.Path(given.output) if given.output else None)
    places = ", ".join(str(tables.path(op)) for op in ops)
    print(f"{jax.devices()[0].device_kind}: {count(len(found), 'problem')}, into {places}", flush=True)
    deadline = time.monotonic() + given.budget_s if given.budget_s else None
    run(found, tables, Search(most=given.candidates, deadline=deadline), retune=not given.missing)


def declare_flags() -> None:
    """Declares the command's flags; not at import, where they would clash with those of other commands."""
    flags.DEFINE_list("ops", list(problems.OPS), "Ops to tune.")
    flags.DEFINE_list("shapes", ["llama3-8b", "llama3-70b", "demo"],
                      f"Models to tune for, of {', '.join(SHAPES)}.")
    flags.DEFINE_list("rows", ["1", "2", "4", "8", "16", "32", "64"],
                      "Tokens of a decoding step to tune for; products with packed weights take up to 512. top_k, nucleus and "
                      "norm have rows of their own.")
    flags.DEFINE_list("group_sizes", ["128"], "Rows of a 4-bit weight that share a scale; -1 is all.")
    flags.DEFINE_string("output", None, "Write DIR/OP/tuned/DEVICE.json, with what the package's table has in it. Default: the "
                        "package's tables themselves.")
    flags.DEFINE_bool("missing", True, "Tune what the tables lack; --nomissing tunes all again.")
    flags.DEFINE_integer("candidates", 200, "Configs to try of a problem at most: where there are more, a random third, then "
                         "neighbours of the best.", lower_bound=1)
    flags.DEFINE_float("budget_s", None, "Seconds to spend; a problem that they do not suffice for is left. Default: no limit.",
                       lower_bound=0)


if __name__ == "__main__":
    declare_flags()
    entry.run(main)
