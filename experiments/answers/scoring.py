"""Judges answers and keeps the verdicts beside the answer file, which stays as it is."""

import concurrent.futures
import dataclasses
import pathlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from experiments.answers.answer_files import Answer
from experiments.inputs.questions import Question
from specmq_jax.errors import UserError
from specmq_jax.files import put_json
from specmq_jax.loading.contents import json_digest
from specmq_jax.words import count

_WORKERS = 4
"""As many as the published harness of HumanEval runs: more would eat into the time that each program has."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a judge says of one answer.

    Attributes:
      right: it counts.
      detail: what was found in the answer, or what went wrong, in one line.
    """

    right: bool
    detail: str


def _none() -> None:
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scorer:
    """How a benchmark judges answers.

    Attributes:
      metric: name of the share of right answers, for example "accuracy".
      judge: one answer's verdict, by its question and its text.
      obstacle: why nothing can be judged, in one line with what to do; None where nothing stands in the way. Raises a
        `UserError` where judging was asked for and this machine can't do it.
    """

    metric: str
    judge: Callable[[Question, str], Verdict]
    obstacle: Callable[[], str | None] = _none


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """The verdicts on a run.

    Attributes:
      metric: what `share` is called.
      verdicts: by question id, in the order of the answers.
      questions: how many were asked, answered or not.
      judged: digest of the answers and of what they were judged by.
    """

    metric: str
    verdicts: dict[int | str, Verdict]
    questions: int
    judged: str = ""

    @property
    def right(self) -> int:
        return sum(verdict.right for verdict in self.verdicts.values())

    @property
    def share(self) -> float:
        """Right answers over answers."""
        return self.right / len(self.verdicts)

    @property
    def figures(self) -> dict[str, Any]:
        """What files say of it, as JSON values."""
        return {"metric": self.metric, "share": self.share, "right": self.right, "answered": len(self.verdicts)}


def score(scorer: Scorer, found: Sequence[Answer], asked: Sequence[Question]) -> Score:
    """Judges the first turn of each answer, several at a time.

    Raises:
      UserError: an answer is to none of the questions, or holds no text.
    """
    by_id = {question.id: question for question in asked}
    for answer in found:
        if answer.question_id not in by_id:
            raise UserError(f"question {answer.question_id!r} was answered and is not among the "
                            f"{count(len(asked), 'question')} to score by; give the questions that were asked with "
                            "--question_file=FILE")
        if not answer.texts:
            raise UserError(f"the answer to question {answer.question_id!r} holds no text to score")
    judged = json_digest([[answer.question_id, answer.texts[0], repr(by_id[answer.question_id].reference)] for answer in found])
    # what Python warns of in programs that are judged is nothing to their reader
    with warnings.catch_warnings(action="ignore"), concurrent.futures.ThreadPoolExecutor(_WORKERS) as pool:
        verdicts = pool.map(lambda answer: scorer.judge(by_id[answer.question_id], answer.texts[0]), found)
        return Score(metric=scorer.metric, questions=len(asked), judged=judged,
                     verdicts=dict(zip((answer.question_id for answer in found), verdicts, strict=True)))


def score_file(answer_file: pathlib.Path) -> pathlib.Path:
    """Where the scores of an answer file are kept."""
    return answer_file.with_suffix(".scores.json")


def write(answer_file: pathlib.Path, scores: Sequence[tuple[str, Score]]) -> pathlib.Path:
    """Writes the scores of a file's runs, each with its model_id, beside the file, replacing earlier ones.

    Raises:
      UserError: the place can't be written to.
    """
    path = score_file(answer_file)
    put_json(path, [_record(model_id, score) for model_id, score in scores],
             advice="copy the answer file to another place and score it there with --score=FILE")
    return path


def _record(model_id: str, score: Score) -> dict[str, Any]:
    return {"model_id": model_id, **score.figures, "questions": score.questions, "judged": score.judged,
            "verdicts": [{"question_id": ident, "right": verdict.right, "detail": verdict.detail}
                         for ident, verdict in score.verdicts.items()]}
