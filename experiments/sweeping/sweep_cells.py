"""Which cells a sweep has, from its flags: what runs in each, where its answers go, and which are done."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags as absl_flags

from experiments.answers import answer_files
from experiments.answers.answer_files import AnswerFile
from experiments.benchmarks import human_eval
from experiments.benchmarks.benchmark import Benchmark
from experiments.benchmarks.registry import BENCHMARKS
from experiments.inputs.questions import Question
from experiments.running import flags, methods, runner
from experiments.running.contents import Contents
from experiments.running.settings import Settings
from experiments.sweeping.grid import Grid, Variant, WholeNumbers
from experiments.sweeping.isolated import Tell
from experiments.timing import device
from specmq_jax import formats
from specmq_jax.errors import UserError

_SINGULAR = {"models": "model", "precisions": "precision", "tree_depths": "tree_depth", "tree_top_ks": "tree_top_k",
             "tree_sizes": "tree_size", "draft_lengths": "draft_length", "min_draft_lengths": "min_draft_length"}
"""An axis's flag, and the one of all experiments that gives it a single value."""
_MODULES = (__name__, flags.__name__, human_eval.__name__)
"""Whose flags a sweep has."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One field of the grid.

    Attributes:
      group: cells with the same target at the same precision.
      variant: the method and its settings.
      settings: of its run; one method, with an answer file of its own.
      asked: ids of the questions.
      identity: what its answers are recorded with.
    """

    group: str
    variant: Variant
    settings: Settings
    asked: tuple[int | str, ...]
    identity: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.group}/{self.variant.name}"

    @property
    def traceback(self) -> pathlib.Path:
        """Where the traceback of a fault goes."""
        return self.settings.answers(self.variant.method).with_suffix(".traceback.txt")

    def answers(self, *, resume: bool = True) -> AnswerFile:
        """What is answered and measured so far.

        Raises:
          UserError: answers made with other settings lie there.
        """
        return AnswerFile(self.settings.answers(self.variant.method), self.identity, resume=resume, asked=self.asked)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A sweep that can begin.

    Attributes:
      device: in words.
      output_dir: where tables and figures go.
      questions: how many each cell answers.
      cells: group by group.
      left_out: why some combinations are no cells.
      finished: names of the cells that former runs finished.
      answered: how many questions each cell has answered.
      lost: names of the cells that had finished, and whose answers are gone in part.
    """

    device: str
    output_dir: pathlib.Path
    questions: int
    cells: tuple[Cell, ...]
    left_out: tuple[str, ...]
    finished: frozenset[str]
    answered: Mapping[str, int]
    lost: tuple[str, ...] = ()

    @property
    def benchmark(self) -> Benchmark:
        """What every cell runs."""
        return self.cells[0].settings.benchmark

    @property
    def slots(self) -> int:
        """How many questions every cell answers side by side."""
        return self.cells[0].settings.slots


def prepare(arguments: Sequence[str], tell: Tell) -> None:
    """Tells the `Prepared` sweep of these flags; in a process of its own, for it opens the device.

    Raises:
      UserError: as `prepared`.
    """
    declare_flags()
    absl_flags.FLAGS(["sweep", *arguments])
    tell(prepared(absl_flags.FLAGS))


def prepared(given: absl_flags.FlagValues) -> Prepared:
    """Reads the parsed flags and looks at what former runs left.

    Raises:
      UserError: flags that contradict one another or name what is not there, unreadable questions, or answers in the output
        directory that were made with other settings.
    """
    for axis, single in _SINGULAR.items():
        if given[axis].value and given[single].present:
            raise UserError(f"--{axis} and --{single} were both given; choose one")
    if given.answer_file:
        raise UserError("--answer_file takes the answers of one run, and a sweep has many; give --output_dir=DIR")
    if methods.AUTO in (given.method, *(given.methods or ())):
        raise UserError(f"method {methods.AUTO} chooses by itself what a sweep measures; name the methods, and run it with the "
                        f"benchmark, python -m experiments.{given.benchmark} --method={methods.AUTO}")
    if given.models:
        given.model = given.models[0]
    base = flags.settings(f"sweep-{given.benchmark}", benchmark=BENCHMARKS[given.benchmark])
    asked = base.questions()
    answer_files.check_directory(base.output_dir)
    axes = grid_of(given, base)
    variants, left_out = [], []
    for method in axes.methods:
        found, impossible = axes.variants(method)
        if not found:
            raise UserError(f"no tree of the grid is possible: {impossible[0]}")
        variants += found
        left_out += impossible
    cells = tuple(_cell(base, target, precision, variant, asked, several=len(axes.targets) > 1)
                  for target in axes.targets for precision in axes.precisions for variant in variants)
    _check_names(cells)
    cells = _identified(cells, asked)
    files = {cell.name: cell.answers(resume=base.resume) for cell in cells}
    return Prepared(
        device=device.device_name(), output_dir=base.output_dir, questions=len(asked), cells=cells, left_out=tuple(left_out),
        finished=frozenset(name for name, file in files.items() if file.measured),
        answered={name: len(file.found) for name, file in files.items()},
        lost=tuple(name for name, file in files.items() if file.lost))


def grid_of(given: absl_flags.FlagValues, base: Settings) -> Grid:
    """The axes; one without a flag has the single value of the settings."""
    models = base.models

    def axis(name: str, single: Any) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(given[name].value or [single]))

    precisions = axis("precisions", models.precision)
    return Grid(
        targets=axis("models", models.target), methods=base.methods,
        precisions=tuple(dict.fromkeys(name and formats.get(name).name for name in precisions)),
        tree_depths=axis("tree_depths", models.tree.depth), tree_top_ks=axis("tree_top_ks", models.tree.top_k),
        tree_sizes=axis("tree_sizes", models.tree.size), cut_sizes=not (given.tree_sizes or given.tree_size),
        draft_lengths=axis("draft_lengths", models.draft_length),
        min_draft_lengths=axis("min_draft_lengths", models.min_draft_length))


def _cell(base: Settings, target: str | None, precision: str | None, variant: Variant, asked: Sequence[Question], *,
          several: bool) -> Cell:
    models = variant.applied(dataclasses.replace(base.models, target=target, precision=precision))
    group = "-".join([*([models.target_name] if several else []), precision or "stored"])
    settings = dataclasses.replace(base, models=models, methods=(variant.method,),
                                   answer_file=base.output_dir / group / f"{variant.name}.jsonl")
    return Cell(group=group, variant=variant, settings=settings, asked=tuple(question.id for question in asked))


def _identified(cells: Sequence[Cell], asked: Sequence[Question]) -> tuple[Cell, ...]:
    contents = Contents()
    return tuple(dataclasses.replace(cell, identity=runner.identity(cell.settings, cell.variant.method, asked, contents))
                 for cell in cells)


def _check_names(cells: Sequence[Cell]) -> None:
    places: dict[str, str | None] = {}
    for cell in cells:
        target = cell.settings.models.target
        if places.setdefault(cell.name, target) != target:
            raise UserError(f"--models names {places[cell.name]} and {target}, which bear one name; rename one of them")


def declare_flags() -> None:
    """Declares the command's flags; not at import, where they would clash with those of other commands."""
    numbers, serializer = WholeNumbers(), absl_flags.ListSerializer(",")
    absl_flags.adopt_module_key_flags(flags)
    for name in ("allow_code_execution", "allow_file_reading"):
        absl_flags.declare_key_flag(name)

    def axis(name: str, text: str) -> None:
        absl_flags.DEFINE(numbers, name, None, f"{text} Default: --{_SINGULAR[name]}.", serializer=serializer)

    absl_flags.DEFINE_string("grid", None, "YAML file whose keys are names of flags, for example precisions: [fp16, w4a16]; "
                             "flags on the command line win.")
    absl_flags.DEFINE_enum("benchmark", "mt_bench", list(BENCHMARKS), "What to run in every cell.")
    absl_flags.DEFINE_list("models", None, "Targets, each given like --model. Default: --model.")
    absl_flags.DEFINE_list("precisions", None, "Weight formats of the target. Default: --precision.")
    axis("tree_depths", "Levels of tokens that an EAGLE head drafts.")
    axis("tree_top_ks", "Candidates of each node, and nodes kept of each level.")
    axis("tree_sizes", "Nodes of the tree that are verified, the root counted.")
    axis("draft_lengths", "Tokens that method spec drafts a round.")
    axis("min_draft_lengths", "Tokens that method hier drafts at least.")


def key_flags() -> list[str]:
    """Names of the flags that a grid may set."""
    by_module = absl_flags.FLAGS.flags_by_module_dict()
    return [flag.name for module in _MODULES for flag in by_module[module] if flag.name != "grid"]
