"""What method `auto` stands for: the setting that the cost model predicts to be fastest, kept in the cache directory.

It is measured where it isn't known yet for this device, these models and precisions, and this sampling.
"""

import dataclasses
import gc
import json
import pathlib
from typing import Any

import jax
from rich.console import Console

import specmq_jax as sm
from experiments.benchmarks.benchmark import MT_BENCH
from experiments.cost import predict
from experiments.display.cells import number
from experiments.display.lines import say
from experiments.inputs import questions
from experiments.running import methods, runner
from experiments.running.contents import Contents
from experiments.running.methods import Choice
from experiments.running.settings import Settings
from experiments.timing import device
from specmq_jax.errors import UserError
from specmq_jax.files import cache_directory, put_json
from specmq_jax.loading.contents import json_digest

_LEAST_LENGTH = 512
"""Tokens of the cache that acceptance is seen with; the package's questions and their answers fit."""


def resolved(settings: Settings) -> Settings:
    """The settings with what method auto stands for, where it is one of theirs; errors as in `choose`."""
    if methods.AUTO not in settings.methods:
        return settings
    return dataclasses.replace(settings, models=dataclasses.replace(settings.models, auto=choose(settings)))


def choose(settings: Settings, console: Console | None = None) -> Choice:
    """The fastest of the methods that the models given allow.

    Args:
      settings: whose models, sampling and cache are to be used; their questions don't matter.
      console: where progress goes, by default stderr.

    Raises:
      UserError: a target that can't be loaded, too little device memory.
    """
    console = console or Console(stderr=True)

    def tell(text: str) -> None:
        say(console, f"auto: {text}")

    contents = Contents()
    about = _about(settings, contents)
    settings = dataclasses.replace(settings, models=contents.placed(settings.models))
    path = _file(about)
    choice = _kept(path)
    if choice is None:
        asked = dataclasses.replace(
            settings, methods=_possible(settings, tell), benchmark=MT_BENCH, question_file=questions.SMALL, question_begin=0,
            question_end=None, max_new_tokens=64 if _on_cpu() else 128, max_length=max(settings.max_length, _LEAST_LENGTH))
        choice = Choice(method="baseline")
        if len(asked.methods) > 1:
            tell(f"measuring {', '.join(asked.methods)} once for this device, kept in {path}")
            choice = _measure(asked, tell)
        put_json(path, {"about": about, "choice": dataclasses.asdict(choice)}, indent=1, parents=True,
                 advice="name another cache directory in $SPECMQ_CACHE")
    predicted = "" if choice.predicted is None else f", predicted to make {number(choice.predicted, 1)} tokens/s"
    tell(f"{predict.describe(choice)}{predicted}")
    return choice


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _possible(settings: Settings, tell: predict.Say) -> tuple[str, ...]:
    """Methods whose models are given and fit together, and that can be of use."""
    expanded = _on_cpu() and settings.models.drafter is None
    found = []
    for method in methods.NAMES:
        if expanded and methods.METHODS[method].small_model:
            tell(f"{method} is left out: on a CPU a copy of the target at fewer bits is no faster than the target")
            continue
        try:
            settings.models.check([method])
            runner.plan(settings, [method]).check()
        except UserError as error:
            if method == "baseline":
                raise
            tell(f"{method} is left out: {error}")
        else:
            found.append(method)
    return tuple(found)


def _measure(settings: Settings, tell: predict.Say) -> Choice:
    bench = runner.load(settings)
    try:
        findings = predict.study(settings, bench, predict.bounds(), tell)
        best = findings.best()
        return dataclasses.replace(best.choice, predicted=findings.tokens_per_second(best))
    finally:
        del bench
        jax.clear_caches()  # jitted functions hold on to their decoders, and these to the weights
        gc.collect()


def _about(settings: Settings, contents: Contents) -> dict[str, Any]:
    """What decides which setting is fastest; models and files count by what they hold."""
    models = settings.models
    return {"models": contents.of_method(models, methods.AUTO), "precision": models.precision, "tree": repr(models.tree),
            "draft_length": models.draft_length, "min_draft_length": models.min_draft_length,
            "sampling": repr(settings.sampling), "reproducible": settings.reproducible, "device": device.device_name(),
            "jax": jax.__version__}


def _file(about: dict[str, Any]) -> pathlib.Path:
    return cache_directory() / "cost_model" / f"{json_digest(about)}.json"


def _kept(path: pathlib.Path) -> Choice | None:
    """What an earlier call kept; a damaged file counts as none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["choice"]
        choice = Choice(**(found | {"tree": sm.TreeConfig(**found["tree"])}))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, UserError):
        return None
    return choice if choice.method in methods.NAMES else None
