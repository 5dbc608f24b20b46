"""The methods that experiments compare, as decoders over one loaded target."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import specmq_jax as sm
from checkpoints_tools.demo_model import NAME as DEMO_NAME
from specmq_jax import tokenizer as tokens
from specmq_jax.decoding.drafters.vocabulary import cut_vocabulary, read_ranking
from specmq_jax.decoding.planning import plan
from specmq_jax.errors import UserError
from specmq_jax.loading.head import head_version, outline_head
from specmq_jax.loading.memory import Plan
from specmq_jax.loading.model import Outline, outline

AUTO = "auto"
"""The method that stands for the one which the cost model predicts to be the fastest."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """A method with the settings of its drafts; those that it has no use for don't matter.

    Attributes:
      method: its name.
      tree, draft_length, min_draft_length: as in `Models`.
      predicted: tokens/s that the cost model expects of it; None where it made no prediction.
    """

    method: str
    tree: sm.TreeConfig = sm.TreeConfig()
    draft_length: int = 4
    min_draft_length: int = 6
    predicted: float | None = dataclasses.field(default=None, repr=False, compare=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Models:
    """Which models to load.

    Attributes:
      target: a directory, file or hub name; None is the demo model.
      precision: of the target; None is as stored.
      drafter: like `target`; None is the target's own weights.
      draft_precision: None is as stored for a `drafter`, and a 4-bit format for the target's own weights.
      draft_length: tokens that the small model drafts a round.
      eagle: directories of EAGLE heads, one of a version: the target's, or the small model's where that one drafts (hier).
      tree: shape of the head's tree.
      vocabulary, vocabulary_size: a ranked vocabulary, and how many of its tokens the head scores; None scores all.
      min_draft_length, draft_model_start: of the hierarchy, as in `specmq_jax.HierarchicalDrafter`.
      auto: what method auto stands for, once the cost model has chosen.
      places: native checkpoints of models, by the names given here, where they are known already.
    """

    target: str | None = None
    precision: str | None = None
    drafter: str | None = None
    draft_precision: str | None = None
    draft_length: int = 4
    eagle: tuple[str, ...] = ()
    tree: sm.TreeConfig = sm.TreeConfig()
    vocabulary: str | None = None
    vocabulary_size: int = 32768
    min_draft_length: int = 6
    draft_model_start: bool = False
    auto: Choice | None = None
    places: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def place(self, model: str) -> str:
        """Where a model is to be loaded from."""
        return self.places.get(model, model)

    @property
    def target_name(self) -> str:
        return pathlib.Path(self.target).resolve().name if self.target else DEMO_NAME

    def check(self, methods: Sequence[str]) -> None:
        """Raises a `UserError` where a method lacks what it needs, before anything is loaded."""
        for method in methods:
            self.head(method)

    def head(self, method: str) -> str | None:
        """Directory of the head that a method drafts with: the first of its version; None for a method without a head.

        Raises:
          UserError: no head of the method's version was given, two heads of one version, or one that can't be read.
        """
        wanted = METHODS[method].versions
        if not wanted:
            return None
        if not self.eagle:
            raise UserError(f"method {method} drafts with an EAGLE head; give its directory with --eagle=DIR")
        versions = {directory: head_version(directory) for directory in self.eagle}
        if len(set(versions.values())) < len(self.eagle):
            raise UserError(f"--eagle={','.join(self.eagle)} names two heads of one version; give one of each at most")
        fitting = [directory for directory, version in versions.items() if version in wanted]
        if not fitting:
            raise UserError(f"method {method} drafts with an EAGLE-{wanted[0]} head, and --eagle={','.join(self.eagle)} "
                            f"holds an EAGLE-{next(iter(versions.values()))} head; give one's directory with --eagle=DIR")
        return fitting[0]

    @property
    def self_draft_precision(self) -> str:
        """Of the target's own weights as drafter; the demo model's 576 columns are no multiple of 128."""
        return self.draft_precision or ("w4a16" if self.target else "w4a16-g64")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Workbench:
    """A target with its tokenizer: what a runner needs of the models.

    Attributes:
      target: loaded, or an outline, of which no decoder but a plan can be made.
      models: where drafters come from.
      tokenizer: the target's.
      config: of every decoder made here.
    """

    target: sm.Model
    models: Models
    tokenizer: Any
    config: sm.DecodeConfig

    @property
    def max_length(self) -> int:
        return self.config.max_len

    @property
    def precision(self) -> str:
        return self.target.precision

    def encode(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a dialogue in the model's chat template, up to where the assistant answers."""
        return tokens.encode_chat(self.tokenizer, messages)

    def text(self, token_ids: Sequence[int]) -> str:
        """The answer that token ids spell, without the stop token that may end them."""
        ids = list(token_ids)
        return tokens.decode(self.tokenizer, ids[:-1] if ids and ids[-1] in self.config.stop_tokens else ids).strip()

    def decoder(self, method: str) -> sm.Decoder:
        """Loads what the method drafts with, if anything."""
        return sm.Decoder(self.target, drafter=self.drafter(method), config=self.config)

    def drafter(self, method: str, choice: Choice | None = None) -> sm.Drafter:
        """Loads what the method drafts with, if anything; `choice` holds other settings for its drafts than `models`."""
        models = self.models
        if choice is None:
            choice = Choice(method=method, tree=models.tree, draft_length=models.draft_length,
                            min_draft_length=models.min_draft_length)
        return METHODS[method].drafter(self, choice)

    def plan(self, methods: Sequence[str], slots: int = 1) -> Plan:
        """The device memory that the decoders of these methods take together, each of so many sequences.

        Raises:
          UserError: what a method drafts with can't be read, or doesn't fit the target.
        """
        return plan(self.target, [self.drafter(method) for method in methods], self.config, slots=slots)

    @functools.cached_property
    def small_model(self) -> sm.Model:
        """What drafts for methods spec and hier, which share it."""
        if self.models.drafter is None:
            return self.target.with_precision(self.models.self_draft_precision)
        draft = (outline if self._is_outline else sm.load)(self.models.place(self.models.drafter),
                                                           precision=self.models.draft_precision)
        if tokens.load_tokenizer(draft.directory).get_vocab() != self.tokenizer.get_vocab():
            raise UserError(f"the drafter {self.models.drafter} has another tokenizer than {self.models.target_name}; choose "
                            "a draft model of the target's family")
        return draft

    def tree_drafter(self, verifier: sm.Model, method: str, tree: sm.TreeConfig) -> sm.EagleDrafter:
        """An EAGLE drafter for the model that verifies its trees."""
        models = self.models
        head = (outline_head if self._is_outline else sm.load_head)(models.head(method), verifier)
        if models.vocabulary is not None:
            ranked, size = read_ranking(models.vocabulary)
            if size != verifier.config.vocab_size:
                raise UserError(f"{models.vocabulary} ranks {size} tokens, the model has {verifier.config.vocab_size}")
            head = cut_vocabulary(head, ranked, models.vocabulary_size)
        return sm.EagleDrafter(head, tree=tree)

    @property
    def _is_outline(self) -> bool:
        return isinstance(self.target, Outline)


def load(models: Models, *, max_length: int, sampling: sm.Greedy | sm.Sampling, seed: int, reproducible: bool,
         only_outline: bool = False) -> Workbench:
    """Loads the target and its tokenizer; the cache is cut to the model's own limit.

    With `only_outline` no weight is loaded, here or later: the result's use is its plan.

    Raises:
      UserError: as `specmq_jax.load`.
    """
    if models.target is None:
        from checkpoints_tools import demo_model  # not needed for an own model

        source: str | pathlib.Path = demo_model.prepare()
    else:
        source = models.place(models.target)
    target = (outline if only_outline else sm.load)(source, precision=models.precision)
    tokenizer = tokens.load_tokenizer(target.directory)
    config = sm.DecodeConfig(max_len=min(max_length, target.config.max_position), sampling=sampling, seed=seed,
                             stop_tokens=tokens.stop_tokens(tokenizer, target.directory), reproducible=reproducible)
    return Workbench(target=target, models=models, tokenizer=tokenizer, config=config)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """How a method drafts.

    Attributes:
      drafter: makes its drafter.
      settings: the fields of `Models`, beside the target's and the heads, that decide what it does.
      versions: of the EAGLE heads that it can draft with; empty where it needs none.
      small_model: a small model, by default the target's own weights at fewer bits, drafts for the target.
    """

    drafter: Callable[[Workbench, Choice], sm.Drafter]
    settings: tuple[str, ...] = ()
    versions: tuple[int, ...] = ()
    small_model: bool = False


def _plain(bench: Workbench, choice: Choice) -> sm.NoDrafter:
    del bench, choice
    return sm.NoDrafter()


def _chain(bench: Workbench, choice: Choice) -> sm.ChainDrafter:
    return sm.ChainDrafter(bench.small_model, length=choice.draft_length)


def _eagle(bench: Workbench, choice: Choice) -> sm.EagleDrafter:
    return bench.tree_drafter(bench.target, choice.method, choice.tree)


def _hierarchical(bench: Workbench, choice: Choice) -> sm.HierarchicalDrafter:
    inner = bench.tree_drafter(bench.small_model, choice.method, choice.tree)
    return sm.HierarchicalDrafter(bench.small_model, inner, choice.min_draft_length, bench.models.draft_model_start)


def _chosen(bench: Workbench, choice: Choice) -> sm.Drafter:
    del choice
    found = bench.models.auto
    if found is None:
        raise ValueError("method auto needs `Models.auto`, which `experiments.cost.auto` fills in")
    return bench.drafter(found.method, found)


_TREE = ("tree", "vocabulary", "vocabulary_size")
METHODS: Mapping[str, Method] = {
    "baseline": Method(drafter=_plain),
    "spec": Method(drafter=_chain, settings=("drafter", "draft_precision", "draft_length"), small_model=True),
    "eagle2": Method(drafter=_eagle, settings=_TREE, versions=(2,)),
    "eagle3": Method(drafter=_eagle, settings=_TREE, versions=(3,)),
    "hier": Method(drafter=_hierarchical, settings=("drafter", "draft_precision", *_TREE, "min_draft_length",
                                                    "draft_model_start"), versions=(2, 3), small_model=True),
    AUTO: Method(drafter=_chosen, settings=("auto", "eagle", "drafter", "draft_precision", "vocabulary", "vocabulary_size",
                                            "draft_model_start")),
}
NAMES = tuple(name for name in METHODS if name != AUTO)
