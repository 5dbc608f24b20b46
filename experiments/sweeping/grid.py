"""What a sweep combines, from flags or a YAML file: methods, each with the settings that it uses."""

import dataclasses
import difflib
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from absl import flags

from experiments.running import methods
from experiments.running.methods import Models
from specmq_jax.decoding.config import TreeConfig
from specmq_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """What to combine; each field lists values, and a method is combined only with those of settings that it uses.

    Attributes:
      targets, precisions: as in `Models`.
      methods: names.
      tree_depths, tree_top_ks, tree_sizes: of an EAGLE head's trees.
      cut_sizes: a tree that is larger than all its candidates is cut to these; else it is left out.
      draft_lengths: tokens that method spec drafts a round.
      min_draft_lengths: tokens that method hier drafts at least.
    """

    targets: tuple[str | None, ...]
    precisions: tuple[str | None, ...]
    methods: tuple[str, ...]
    tree_depths: tuple[int, ...]
    tree_top_ks: tuple[int, ...]
    tree_sizes: tuple[int, ...]
    cut_sizes: bool = False
    draft_lengths: tuple[int, ...]
    min_draft_lengths: tuple[int, ...]

    def variants(self, method: str) -> tuple[list["Variant"], list[str]]:
        """The method's variants, and why some combinations are left out: trees that are larger than all their candidates."""
        used = methods.METHODS[method].settings
        trees: list[TreeConfig | None] = [None]
        left_out = []
        if "tree" in used:
            trees = []
            for depth, top_k, size in itertools.product(self.tree_depths, self.tree_top_ks, self.tree_sizes):
                tree = TreeConfig.fitting(depth, top_k, size)
                if tree.size == size or self.cut_sizes:
                    trees.append(tree)
                else:
                    left_out.append(f"{method}: a tree of depth {depth} and top_k {top_k} has at most {tree.size} nodes, not "
                                    f"{size}")
        lengths = self.draft_lengths if "draft_length" in used else (None,)
        least = self.min_draft_lengths if "min_draft_length" in used else (None,)
        found = [Variant(method=method, tree=tree, draft_length=length, min_draft_length=shortest)
                 for tree, length, shortest in itertools.product(trees, lengths, least)]
        return found, left_out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A method and its settings; None for those that it does not use."""

    method: str
    tree: TreeConfig | None = None
    draft_length: int | None = None
    min_draft_length: int | None = None

    @property
    def settings(self) -> dict[str, int]:
        """Those that it uses, by the names that tables give them."""
        tree = self.tree
        found = {"depth": tree and tree.depth, "top_k": tree and tree.top_k, "size": tree and tree.size,
                 "length": self.draft_length, "min_length": self.min_draft_length}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def name(self) -> str:
        """Of its answer file, without suffix: for example eagle2-depth3-top_k2-size4."""
        return "-".join([self.method, *(f"{name}{value}" for name, value in self.settings.items())])

    def applied(self, models: Models) -> Models:
        """The models with these settings."""
        chosen = {"tree": self.tree, "draft_length": self.draft_length, "min_draft_length": self.min_draft_length}
        return dataclasses.replace(models, **{name: value for name, value in chosen.items() if value is not None})


class WholeNumbers(flags.ListParser):
    """Reads a flag's comma-separated whole numbers above 0."""

    def parse(self, argument: str | list[Any]) -> list[int]:
        found = [str(item).strip() for item in super().parse(argument)]
        if not all(item.isdecimal() and int(item) > 0 for item in found):
            raise ValueError(f"expected whole numbers above 0, found {', '.join(found)}")
        return list(dict.fromkeys(map(int, found)))


def apply_file(path: pathlib.Path, given: flags.FlagValues, known: Sequence[str]) -> None:
    """Sets flags from a YAML file whose keys are their names; those on the command line win.

    Args:
      path: the file; a flag that takes several values takes a list or a single one.
      given: the parsed flags.
      known: names of the flags that the file may set.

    Raises:
      UserError: the file can't be read or is no YAML mapping, or a key's name or value is wrong; the message names it.
    """
    for key, value in _mapping(path).items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise UserError(f"{path}: {key!r} is no key of a grid; " + (f"did you mean {near[0]!r}? " if near else "")
                            + "Keys are the names of flags, which --help lists")
        flag = given[key]
        values = value if isinstance(value, list) else [value]
        if isinstance(value, list) and not isinstance(flag.parser, flags.ListParser):
            raise UserError(f"{path}: {key!r} takes one value; found a list")
        if not values or not all(isinstance(item, str | int | float) for item in values):
            raise UserError(f"{path}: {key!r} takes texts or numbers; found {value!r}")
        if flag.present:
            continue
        try:
            flag.parse(",".join(map(_as_typed, values)))
        except flags.IllegalFlagValueError as error:
            reason = str(error).partition(": ")[2]
            raise UserError(f"{path}: {key!r} has a wrong value {value!r}: {reason}") from None


def _as_typed(value: str | int | float) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _mapping(path: pathlib.Path) -> Mapping[Any, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"the grid {path} can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"the grid {path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{place}: not valid YAML ({getattr(error, 'problem', None) or error})") from None
    if not isinstance(found, dict):
        raise UserError(f"the grid {path} must map keys to values, for example precisions: [fp16, w4a16]; found "
                        f"{type(found).__name__}")
    return found
