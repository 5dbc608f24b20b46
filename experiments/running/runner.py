"""Runs methods over questions on one loaded target, and resumes where a killed run stopped."""

import dataclasses
import itertools
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import jax
from rich.console import Console

import specmq_jax as sm
from experiments.answers import answer_files, answer_format, comparison
from experiments.answers.answer_files import AnswerFile
from experiments.answers.answer_format import Answer
from experiments.answers.scoring import Score
from experiments.benchmarks.benchmark import MT_BENCH, Bench
from experiments.display.lines import say
from experiments.inputs import questions
from experiments.inputs.questions import Question
from experiments.running import claims, methods
from experiments.running.contents import Contents
from experiments.running.desk import Desk, Dialogue
from experiments.running.progress import ANSWERING, Reporter, progress
from experiments.running.settings import Settings
from experiments.timing import device
from specmq_jax.decoding.costs.traffic import rounds_ahead
from specmq_jax.decoding.sampling import Greedy
from specmq_jax.errors import UserError
from specmq_jax.loading.memory import Plan
from specmq_jax.words import count

Measured = Mapping[str, Any]


class Show(Protocol):
    """How a method's progress is shown, as `progress` does."""

    def __call__(self, console: Console, method: str, *, total: int, done: int) -> AbstractContextManager[Reporter]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What one method did.

    Attributes:
      method: its name.
      answers: one a question.
      measured: what `_measure` returns; where greedy answers differ from the baseline's, also "differences", which
        `comparison.measure` returns.
      score: of the answers; None where they were not scored.
    """

    method: str
    answers: tuple[Answer, ...]
    measured: Measured
    score: Score | None = None


def load(settings: Settings, *, only_outline: bool = False) -> methods.Workbench:
    """The models that the settings name, or their outlines."""
    return methods.load(settings.models, max_length=settings.max_length, sampling=settings.sampling, seed=settings.seed,
                        reproducible=settings.reproducible, only_outline=only_outline)


def plan(settings: Settings, needed: Sequence[str]) -> Plan:
    """The device memory that running the methods `needed` takes, from shapes alone."""
    return load(settings, only_outline=True).plan(needed, settings.slots)


def run(settings: Settings, *, load: Callable[[Settings], Bench] = load,
        plan: Callable[[Settings, Sequence[str]], Plan] = plan, console: Console | None = None, show: Show = progress,
        contents: Contents | None = None) -> list[Result]:
    """Answers every question with every method; each answer is on the disk before the next question begins.

    The device memory that this takes is printed before a model is loaded.

    A turn whose dialogue no longer fits into the cache ends its question: the answer keeps the turns before it and says
    so in "cut". Methods that a former run finished are taken from their files; if all are, no model is loaded.

    Args:
      settings: what to run.
      load: loads the target and makes decoders.
      plan: the device memory that decoders of some methods take.
      console: where progress goes, by default stderr.
      show: how a method's progress is shown there.
      contents: of the models, as far as they have been looked at; None looks at all of them.

    Raises:
      UserError: what is wrong with questions, output directory or answers found there, another run that writes there, or
        too little device memory, before a model is loaded; a first turn longer than the cache, before the first question is
        answered.
    """
    console = console or Console(stderr=True)
    asked = settings.questions()
    kept = {settings.answers(method).parent for method in settings.methods}
    for directory in {settings.output_dir, *kept}:
        answer_files.check_directory(directory)
    with claims.answered(kept):
        return _run(settings, asked, load, plan, console, show, contents or Contents())


def _run(settings: Settings, asked: Sequence[Question], load: Callable[[Settings], Bench],
         plan: Callable[[Settings, Sequence[str]], Plan], console: Console, show: Show, contents: Contents) -> list[Result]:
    files = {method: AnswerFile(
        settings.answers(method), identity(settings, method, asked, contents), resume=settings.resume,
        asked=[question.id for question in asked], places=model_places(settings.models, method)) for method in settings.methods}
    for method, file in files.items():
        if file.found or file.lost:
            say(console, f"{method}: {len(file.found)} of {count(len(asked), 'answer')} found in {file.path}{_hint(file)}")
    if not all(file.measured for file in files.values()) or _differing(settings, files):
        settings = dataclasses.replace(settings, models=contents.placed(settings.models))
        needed = [method for method, file in files.items() if not file.measured] or ["baseline"]
        memory = plan(settings, needed)
        say(console, memory.describe())
        memory.check()
        bench = load(settings)
        desk = Desk(bench=bench, benchmark=settings.benchmark)
        _check_first_turns(asked, desk)
        # every drafter is loaded, and may turn out not to fit, before the first question
        decoders = {method: bench.decoder(method) for method in needed}
        for method, decoder in decoders.items():
            if not files[method].measured:
                answer = _run_method if settings.slots == 1 else _run_side_by_side
                answer(settings, method, decoder, asked, files[method], desk, console, show)
            for file in _differing(settings, files):
                found = comparison.measure(file.found, files["baseline"].found, asked, desk.encode, decoder.next_logits)
                file.finish({**file.measured, "differences": found})
    return [Result(method=method, answers=tuple(file.found), measured=file.measured) for method, file in files.items()]


def _hint(file: AnswerFile) -> str:
    if file.measured:
        return " (--noresume measures again)"
    return ", where a run had finished: the others are gone, and are answered again" if file.lost else ", going on behind them"


def _differing(settings: Settings, files: Mapping[str, AnswerFile]) -> list[AnswerFile]:
    """Finished methods whose differences from a finished baseline are not measured."""
    base = files.get("baseline")
    if base is None or not base.measured or not isinstance(settings.sampling, Greedy):
        return []
    return [file for file in files.values() if file.measured and not comparison.is_measured(
        file.measured.get("differences"), file.found, base.found)]


def _run_method(settings: Settings, method: str, decoder: sm.Decoder, asked: Sequence[Question], file: AnswerFile,
                desk: Desk, console: Console, show: Show) -> None:
    resumed = bool(file.found)
    waiting = [question for question in asked if question.id not in file.answered]
    with show(console, method, total=len(asked), done=len(file.found)) as reporter:
        reporter.doing("compiling")
        _warm_up(decoder, desk, asked, settings.max_new_tokens)
        reporter.doing(ANSWERING)
        _keep(settings, method, file, desk, reporter,
              (desk.converse(decoder, question, settings.max_new_tokens) for question in waiting))
        reporter.doing("timing the phases of a round")
        # how fast the device was while a former run answered is not known
        bandwidth = None if resumed else device.device_bandwidth()
        file.finish(_measure(decoder, desk, asked, file.found, bandwidth))
        reporter.doing("done")


def _run_side_by_side(settings: Settings, method: str, decoder: sm.Decoder, asked: Sequence[Question], file: AnswerFile,
                      desk: Desk, console: Console, show: Show) -> None:
    """Of a batch's method the throughput alone is measured, prompts included, and only where no former run answered a part.
    Every round drafts, even where none would be faster: how a method does is what is asked."""
    resumed = bool(file.found)
    waiting = [question for question in asked if question.id not in file.answered]
    with show(console, method, total=len(asked), done=len(file.found)) as reporter, sm.Engine(
            decoder.target, decoder.drafter, decoder.config, slots=settings.slots, budget=False) as engine:
        reporter.doing("compiling")
        engine.warm_up(draws=not isinstance(settings.sampling, Greedy))
        reporter.doing(ANSWERING)
        start = time.perf_counter()
        _keep(settings, method, file, desk, reporter, desk.converse_side_by_side(engine, waiting, settings.max_new_tokens))
        seconds = time.perf_counter() - start
        made = sum(sum(answer.new_tokens) for answer in file.found)
        file.finish({**_circumstances(desk), "slots": settings.slots, "throughput": None if resumed else made / seconds})
        reporter.doing("done")


def _keep(settings: Settings, method: str, file: AnswerFile, desk: Desk, reporter: Reporter, dialogues: Iterable[Dialogue]
          ) -> None:
    """Writes each answer as soon as it is there."""
    file.start()
    # a model that bears another name by now is the same one
    model_id = file.model_id or f"{settings.models.target_name}-{desk.bench.precision}-{method}"
    for dialogue in dialogues:
        made = answer_format.record(dialogue.question, dialogue.turns, model_id=model_id, cut=dialogue.cut,
                                    slots=settings.slots)
        reporter.answered(file.append(made))
        if dialogue.cut:
            reporter.note(f"question {dialogue.question.id} ends early: {dialogue.cut}")


def _check_first_turns(asked: Sequence[Question], desk: Desk) -> None:
    for question in asked:
        length = len(desk.first_prompt(question))
        if length >= desk.bench.max_length:
            raise UserError(f"the first turn of question {question.id!r} has {length} tokens, the cache holds "
                            f"{desk.bench.max_length} with at least one new token; raise --max_length (at most the model's "
                            "own limit) or leave the question out")


def _warm_up(decoder: sm.Decoder, desk: Desk, asked: Sequence[Question], max_new_tokens: int) -> None:
    """Compiles whatever the questions will need."""
    longest = max(sum(len(desk.encode([{"role": "user", "content": said}])) for said in question.turns)
                  + (len(question.turns) - 1) * max_new_tokens for question in asked)
    prompt = desk.first_prompt(asked[0])
    room = desk.bench.max_length - 2
    for shorter, length in zip((0, *decoder.prefill_chunks), decoder.prefill_chunks, strict=False):
        if shorter < min(longest, room):
            decoder.generate((prompt * length)[:min(length, room)], max_new_tokens=2)


def _measure(decoder: sm.Decoder, desk: Desk, asked: Sequence[Question], found: Sequence[Answer], bandwidth: float | None
             ) -> dict[str, Any]:
    """What a report needs beside the answers: seconds of the phases, bytes of a round, the device and the versions."""
    prompt = desk.first_prompt(asked[0])[:desk.bench.max_length // 2]
    phases = decoder.phase_times(prompt)
    live_length = round(statistics.fmean(length + new / 2 for answer in found
                                         for length, new in zip(answer.prompt_tokens, answer.new_tokens, strict=True)))
    inner = inner_work(found, decoder.drafter) if any(answer.draft_accept_lengths for answer in found) else {}
    return {
        **_circumstances(desk), "device_bandwidth": bandwidth, "phase_prompt_tokens": len(prompt),
        "prefill": phases.prefill, "draft": phases.draft, "verify": phases.verify, "round": phases.round,
        "live_length": live_length, **inner, "bytes_per_round": int(decoder.bytes_per_round(live_length, **inner)),
    }


def _circumstances(desk: Desk) -> dict[str, Any]:
    return {"device": device.device_name(), "jax": jax.__version__, "precision": desk.bench.precision,
            "max_length": desk.bench.max_length}


def inner_work(found: Sequence[Answer], drafter: sm.HierarchicalDrafter) -> dict[str, float]:
    """What the small model of a hierarchy did in a round of the target, on average over the answers: its "inner_rounds", and
    its passes that go a token "ahead"."""
    rounds = inner = ahead = 0
    for answer in found:
        lengths, accepted = iter(answer.draft_accept_lengths), iter(answer.accept_lengths)
        for steps in answer.decoding_steps:  # of a turn, which begins with the small model level with the target
            ahead += rounds_ahead(drafter, list(itertools.islice(accepted, steps)), lengths)
        rounds, inner = rounds + len(answer.accept_lengths), inner + len(answer.draft_accept_lengths)
    return {"inner_rounds": inner / rounds, "ahead": ahead / rounds}


def identity(settings: Settings, method: str, asked: Sequence[Question], contents: Contents) -> dict[str, Any]:
    """What decides a method's answers and their times, for the answer file's sidecar.

    Models, heads and files count by what they hold, and not by where they lie."""
    models = settings.models
    return {
        "method": method, "precision": models.precision or "as stored",
        "questions": f"{settings.question_file.name} {settings.question_begin}:"
                     f"{settings.question_begin + len(asked)} {questions.digest(asked)}",
        "max_new_tokens": settings.max_new_tokens, "max_length": settings.max_length,
        "sampling": repr(settings.sampling), "seed": settings.seed, "device": device.device_name(),
        **({"benchmark": settings.benchmark.name} if settings.benchmark != MT_BENCH else {}),
        "jax": jax.__version__, **({"reproducible": True} if settings.reproducible else {}),
        **({"slots": settings.slots} if settings.slots > 1 else {}),
        **contents.of_method(models, method)}


def model_places(models: methods.Models, method: str) -> dict[str, Any]:
    """Where what a method runs with lies, for who reads the sidecar."""
    chosen = methods.METHODS[method]
    named = {"model": models.target or methods.DEMO_NAME}
    if chosen.versions:
        named["eagle"] = models.head(method)
    named |= {field: getattr(models, field) for field in ("drafter", "vocabulary") if field in chosen.settings}
    return {key: _place(place) for key, place in named.items() if place}


def _place(model: str) -> str:
    """A model's place however the working directory lies; hub names stay."""
    return str(pathlib.Path(model).resolve()) if pathlib.Path(model).exists() else model
