"""The runs in answer files: a file that several runs were appended to holds several.

A line is of the run that its `model_id` names, which tells model, precision and method. A question that comes again under one
`model_id` begins another run: one run answers each question once, also where it was killed and went on.
"""

import collections
import dataclasses
import pathlib
from collections.abc import Callable, Sequence

from experiments.answers import answer_files
from experiments.answers.answer_files import Answer
from experiments.running import methods
from specmq_jax import formats
from specmq_jax.errors import UserError
from specmq_jax.words import count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One run's answers in a file.

    Attributes:
      path: the file.
      number: which of its runs, counted from 1 in order of their first lines.
      alone: the file holds no other.
      model_id: of every answer; empty in files of programs that don't say.
      answers: in the file's order.
    """

    path: pathlib.Path
    number: int
    alone: bool
    model_id: str
    answers: tuple[Answer, ...]

    @property
    def address(self) -> str:
        """What names the run on a command line, as `find` reads it."""
        return str(self.path) if self.alone else f"{self.path}#{self.number}"

    def by_task(self, task: Callable[[str], str]) -> "Run":
        """The run with each answer's category replaced by its task."""
        return dataclasses.replace(self, answers=tuple(dataclasses.replace(answer, category=task(answer.category))
                                                       for answer in self.answers))

    @property
    def method(self) -> str | None:
        """The method at the end of the `model_id`, None where there is none."""
        method = self.model_id.rpartition("-")[2]
        return method if method in methods.METHODS else None

    @property
    def precision(self) -> str | None:
        """The weight format before it, None where there is none."""
        parts = self.model_id.split("-")[:-1] if self.method else []
        return next(filter(_is_precision, ("-".join(parts[start:]) for start in range(len(parts)))), None)

    @property
    def target(self) -> str:
        """The model's name before these two; the whole `model_id` where it does not end in them."""
        if self.precision is None:
            return self.model_id
        return self.model_id.removesuffix(f"-{self.method}").removesuffix(self.precision).removesuffix("-")


def read(path: pathlib.Path, *, unfinished: bool = False) -> list[Run]:
    """All runs of a file; arguments and errors as in `answer_files.read`.
    """
    groups: list[dict[int | str, Answer]] = []
    current: dict[str, dict[int | str, Answer]] = {}
    for answer in answer_files.read(path, unfinished=unfinished):
        if answer.question_id in current.setdefault(answer.model_id, {}):
            current[answer.model_id] = {}
        group = current[answer.model_id]
        if not group:
            groups.append(group)
        group[answer.question_id] = answer
    return [Run(path=path, number=number, alone=len(groups) == 1, model_id=next(iter(group.values())).model_id,
                answers=tuple(group.values())) for number, group in enumerate(groups, start=1)]


def find(address: str, *, unfinished: bool = False) -> list[Run]:
    """The runs of FILE, or run N alone of FILE#N; `unfinished` as in `answer_files.read`.

    Raises:
      UserError: as `read`, or there is no such run.
    """
    name, mark, number = address.rpartition("#")
    if not mark or not number.isdecimal() or pathlib.Path(address).exists():
        return read(pathlib.Path(address), unfinished=unfinished)
    found = read(pathlib.Path(name), unfinished=unfinished)
    if not 1 <= int(number) <= len(found):
        raise UserError(f"{address}: {name} holds {count(len(found), 'run')}, numbered from 1")
    return [found[int(number) - 1]]


def find_one(address: str, *, unfinished: bool = False) -> Run:
    """The run of FILE or FILE#N; `unfinished` as in `answer_files.read`.

    Raises:
      UserError: as `find`, or there are several.
    """
    found = find(address, unfinished=unfinished)
    if len(found) > 1:
        listed = ", ".join(f"{run.address} is {run.model_id or 'without model_id'}" for run in found)
        raise UserError(f"{address} holds {len(found)} runs; choose one: {listed}")
    return found[0]


def labels(runs: Sequence[Run]) -> list[str]:
    """A name for each run: the file's, or the `model_id` where the file holds several; with folder and number, or the whole
    address, where these are not all different."""
    forms = [[run.path.stem if run.alone else run.model_id or f"{run.path.stem}#{run.number}" for run in runs],
             [f"{run.path.parent.name}/{run.path.stem}" if run.alone else f"{run.model_id or run.path.stem}#{run.number}"
              for run in runs],
             [run.address for run in runs]]
    chosen = forms[0]
    for form in forms[1:]:
        counts = collections.Counter(chosen)
        chosen = [longer if counts[name] > 1 else name for name, longer in zip(chosen, form, strict=True)]
    return chosen


def _is_precision(name: str) -> bool:
    try:
        formats.get(name)
    except UserError:
        return False
    return True
