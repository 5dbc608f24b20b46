"""The command that all benchmarks are: run and report, or score answer files that are there."""

import dataclasses
import functools
import json
import pathlib
import re
import sys
import types
from collections.abc import Sequence
from typing import Any

from absl import flags as absl_flags
from rich.console import Console

from experiments.answers import answer_files, scoring
from experiments.answers.scoring import Score, Scorer
from experiments.benchmarks.benchmark import Benchmark
from experiments.cost import auto
from experiments.display.cells import percent
from experiments.display.lines import say
from experiments.inputs import questions
from experiments.inputs.questions import Question
from experiments.reporting import answer_runs, report
from experiments.running import claims, flags, runner
from experiments.running.runner import Result
from experiments.running.settings import Settings
from specmq_jax.commands import entry
from specmq_jax.errors import UserError
from specmq_jax.words import count

_SCORE = absl_flags.DEFINE_list(
    "score", None, "Answer files (JSONL) to score, finished or not, instead of a run: FILE, or FILE#N for the Nth run in it. "
    "The scores go into FILE's .scores.json beside it. Goes with --question_file, if the answers are not the sample's.")
_ASKED = re.compile(r" (\d+):(\d+) ([0-9a-f]{16})$")
"""The end of what `runner.identity` records of questions."""


def main(benchmark: Benchmark, *others: types.ModuleType) -> None:
    """Runs the benchmark as the program's command, which has the flags of all experiments, --score and those of `others`."""
    given = absl_flags.FLAGS
    for module in (flags.__name__, __name__, *(other.__name__ for other in others)):
        for flag in given.get_key_flags_for_module(module):
            given.register_key_flag_for_module(sys.argv[0], flag)
    entry.run(functools.partial(run, benchmark))


def run(benchmark: Benchmark, argv: Sequence[str]) -> None:
    """Does what the flags say.

    Raises:
      UserError: as `runner.run`; a file to score can't be read or answers other questions, or nothing can be scored.
    """
    flags.no_arguments(argv)
    if _SCORE.value:
        score_files(benchmark, _SCORE.value, absl_flags.FLAGS.question_file, report.stdout())
        return
    settings = auto.resolved(flags.settings(benchmark.name, benchmark=benchmark))
    # before any answer, since it may find that the machine can't do what was asked for
    obstacle = benchmark.scorer.obstacle() if benchmark.scorer else None
    settings.questions()  # a mistake in them makes no directory
    answer_files.check_directory(settings.output_dir)
    with claims.reported(settings.output_dir):
        _run_and_report(benchmark, settings, obstacle)


def _run_and_report(benchmark: Benchmark, settings: Settings, obstacle: str | None) -> None:
    results = runner.run(settings)
    if benchmark.scorer and obstacle is None:
        results = [scored(settings, benchmark.scorer, result) for result in results]
    report.report(settings, results)
    if obstacle:
        files = ",".join(str(settings.answers(result.method)) for result in results)
        say(report.stdout(), f"Not scored: {obstacle}; --score={files} scores these answers")


def scored(settings: Settings, scorer: Scorer, result: Result) -> Result:
    """The result with its score, which is kept beside the answers, too."""
    score = scoring.score(scorer, result.answers, settings.questions())
    scoring.write(settings.answers(result.method), [(result.answers[0].model_id, score)])
    return dataclasses.replace(result, score=score)


def score_files(benchmark: Benchmark, addresses: Sequence[str], question_file: str | None, console: Console) -> None:
    """Scores the runs of each answer file, keeps the scores beside it and prints a line a run.

    Args:
      benchmark: of the answers.
      addresses: FILE, or FILE#N for the Nth run in it.
      question_file: as `Benchmark.question_file` takes it.
      console: where the lines go.

    Raises:
      UserError: the benchmark has no score or it can't be had now, a file can't be read, or it answers other questions.
    """
    if benchmark.scorer is None:
        raise UserError(f"{benchmark.name} measures speed alone, and --score={','.join(addresses)} asks for a score; "
                        "experiments.speedup compares answer files")
    if obstacle := benchmark.scorer.obstacle():
        raise UserError(f"{obstacle}; nothing was scored")
    asked = questions.load(benchmark.question_file(question_file), parse=benchmark.parse)
    for address in addresses:
        runs = answer_runs.find(address, unfinished=True)
        path = runs[0].path
        scores = [(run, scoring.score(benchmark.scorer, run.answers, _of_file(path, asked))) for run in runs]
        for run, score in scores:
            say(console, f"{run.address}: {_in_words(score)}")
        written = scoring.write(path, [(run.model_id, score) for run, score in scores])
        say(console, f"Wrote {written}")


def _in_words(score: Score) -> str:
    return (f"{score.metric} {percent(score.share, 1)}, {score.right} of {count(len(score.verdicts), 'answer')} right; "
            f"{len(score.verdicts)} of {count(score.questions, 'question')} answered")


def _of_file(path: pathlib.Path, asked: Sequence[Question]) -> Sequence[Question]:
    """The questions that a file answers, by the settings beside it; without settings, all.

    Raises:
      UserError: the settings tell of other questions.
    """
    match = _ASKED.search(str(_settings(path).get("questions", "")))
    if not match:
        return asked
    found = asked[int(match[1]):int(match[2])]
    if questions.digest(found) != match[3]:
        raise UserError(f"{path} answers other questions than these (\"questions\" in its .settings.json tells which); give "
                        "those that were asked with --question_file=FILE")
    return found


def _settings(path: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.with_suffix(".settings.json").read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
