"""Answer files: one JSON object a question, appended line by line, with the settings that made them beside."""

import contextlib
import dataclasses
import json
import os
import pathlib
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import specmq_jax as sm
from experiments.questions import Question
from specmq_jax import metrics
from specmq_jax.errors import UserError
from specmq_jax.files import put_json

_GOES_ON = "the answers it holds are kept, and the same command goes on behind them"
_WAY_OUT = "give another --output_dir, or --noresume to replace them"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What a report needs of one line of an answer file.

    Attributes:
      question_id, category: of the question.
      prompt_tokens: of each turn; empty in files of other programs.
      texts: each turn's answer; empty in files of other programs.
      token_ids: the same as token ids; empty in files of other programs.
      new_tokens: of each turn, the first and a stop token counted.
      wall_time: seconds of each turn's decode loop.
      prefill_time: seconds of each turn's prefill; empty in files of other programs.
      accept_lengths: of all rounds of all turns.
      draft_accept_lengths: of the rounds inside a hierarchical drafter; empty for others and in files of other programs.
      cut: why turns are missing, None where none is.
      decoding_steps: rounds of each turn; empty in files of other programs.
      model_id: what answered; empty in files of programs that don't say.
    """

    question_id: int | str
    category: str
    prompt_tokens: tuple[int, ...]
    texts: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    new_tokens: tuple[int, ...]
    wall_time: tuple[float, ...]
    prefill_time: tuple[float, ...]
    accept_lengths: tuple[int, ...]
    draft_accept_lengths: tuple[int, ...]
    cut: str | None
    decoding_steps: tuple[int, ...] = ()
    model_id: str = ""

    @property
    def speed(self) -> float | None:
        """Tokens/s, as `metrics.speed` has it."""
        return metrics.speed(self.new_tokens, self.wall_time)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """One decoded turn: its prompt's length, what came of it, and the text it spells."""

    prompt_tokens: int
    generation: sm.Generation
    text: str


def record(question: Question, turns: Sequence[Turn], *, model_id: str, cut: str | None) -> dict[str, Any]:
    """The JSON object of one question; each list has one entry a turn, but for the accept lengths, which join them."""
    made = [turn.generation for turn in turns]
    new_tokens = [len(g.tokens) for g in made]
    choice = {
        "index": 0,
        "turns": [turn.text for turn in turns],
        "token_ids": [[int(token) for token in g.tokens] for g in made],
        "prompt_tokens": [turn.prompt_tokens for turn in turns],
        "decoding_steps": [len(g.accept_lengths) for g in made],
        "new_tokens": new_tokens,
        "wall_time": [g.seconds for g in made],
        "accept_lengths": [int(length) for g in made for length in g.accept_lengths],
        "draft_accept_lengths": [int(length) for g in made for length in g.draft_accept_lengths],
        "generate_speed": [metrics.speed([count], [g.seconds]) for count, g in zip(new_tokens, made, strict=True)],
        "prefill_time": [g.prefill_seconds for g in made],
        "draft_prefill_time": [g.draft_prefill_seconds for g in made],
        "cut": cut,
    }
    return {"question_id": question.id, "category": question.category, "answer_id": uuid.uuid4().hex,
            "model_id": model_id, "tstamp": time.time(), "choices": [choice]}


def read(path: pathlib.Path, *, unfinished: bool = False) -> list[Answer]:
    """All answers of a file, SpecMQuant's own included.

    Args:
      path: the JSONL file.
      unfinished: a run may have been killed, or be still writing: a last line without its end is passed over.

    Raises:
      UserError: the file can't be read, is empty, or a line is malformed (its number and fault are named).
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the answer file {path} can't be read: {getattr(error, 'strerror', None) or error}") from None
    if unfinished and not _is_json(lines[-1]):
        lines.pop()
    found = [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise UserError(f"the answer file {path} holds no answers")
    return found


def check_directory(directory: pathlib.Path) -> None:
    """Makes the directory where needed; one that can't be written to is a `UserError`."""
    probe = directory / f".{uuid.uuid4().hex}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"the output directory {directory} can't be written to: {error.strerror}; choose another with "
                        "--output_dir") from None


class AnswerFile:
    """An answer file that a run appends to, and its sidecar `<name>.settings.json`.

    The sidecar holds the settings, compared before a run goes on, and what was measured once a method was done.
    """

    def __init__(self, path: pathlib.Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        """Changes nothing on the disk, but drops a last line that a killed run left unfinished.

        Args:
          path: the JSONL file.
          settings: what decides the answers and their times; JSON values.
          resume: keep the answers found there; else `start` removes them.

        Raises:
          UserError: the answers found there were made with other settings, are of two runs, or can't be read.
        """
        self.path = path
        self.sidecar = path.with_suffix(".settings.json")
        self.settings = dict(settings)
        self.measured: dict[str, Any] | None = None
        self.found: list[Answer] = []
        if resume and path.exists():
            _drop_unfinished_line(path)
            self.found = read(path) if path.stat().st_size else []
        if self.found:
            self._check_settings()
            self._check_one_run()

    @property
    def answered(self) -> set[int | str]:
        """Ids of the questions answered."""
        return {answer.question_id for answer in self.found}

    def start(self) -> None:
        """Makes ready for `append`: answers that are not to be kept go, and the settings are written."""
        if not self.found:
            with _writing(self.path):
                self.path.write_bytes(b"")
            self._write_sidecar()

    def append(self, answer: Mapping[str, Any]) -> Answer:
        """Writes one answer to the disk and returns it as read."""
        line = json.dumps(answer, ensure_ascii=False)
        with _writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self.found.append(_parse(line, str(self.path)))
        return self.found[-1]

    def finish(self, measured: Mapping[str, Any]) -> None:
        """Keeps what was measured beside the answers."""
        self.measured = dict(measured)
        self._write_sidecar()

    def _check_one_run(self) -> None:
        seen: set[int | str] = set()
        for answer in self.found:
            if answer.question_id in seen:
                raise UserError(f"{self.path} answers question {answer.question_id!r} twice, so that two runs were appended to "
                                f"it; {_WAY_OUT}")
            seen.add(answer.question_id)

    def _check_settings(self) -> None:
        try:
            kept = json.loads(self.sidecar.read_text(encoding="utf-8"))
            before, self.measured = kept["settings"], kept["measured"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{self.path} holds answers, and {self.sidecar.name}, which tells how they were made, is "
                            f"missing or damaged; {_WAY_OUT}") from None
        changes = [f"{key} {before.get(key)!r} there and {self.settings.get(key)!r} here"
                   for key in dict.fromkeys([*before, *self.settings]) if before.get(key) != self.settings.get(key)]
        if changes:
            raise UserError(f"{self.path} holds answers made with other settings ({'; '.join(changes)}); {_WAY_OUT}")

    def _write_sidecar(self) -> None:
        put_json(self.sidecar, {"settings": self.settings, "measured": self.measured}, advice=_GOES_ON)


@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}; {_GOES_ON}") from None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _drop_unfinished_line(path: pathlib.Path) -> None:
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with _writing(path):
            os.truncate(path, whole)


def _parse(line: str, place: str) -> Answer:
    try:
        found = json.loads(line)
        choice = found["choices"][0]
        answer = Answer(
            question_id=found["question_id"], category=found["category"],
            prompt_tokens=tuple(choice.get("prompt_tokens", ())), texts=tuple(choice.get("turns", ())),
            token_ids=tuple(tuple(ids) for ids in choice.get("token_ids", ())), new_tokens=tuple(choice["new_tokens"]),
            wall_time=tuple(choice["wall_time"]), prefill_time=tuple(choice.get("prefill_time", ())),
            accept_lengths=tuple(choice["accept_lengths"]),
            draft_accept_lengths=tuple(choice.get("draft_accept_lengths", ())), cut=choice.get("cut"),
            decoding_steps=tuple(choice.get("decoding_steps", ())), model_id=str(found.get("model_id", "")))
    except KeyError as error:
        raise UserError(f"{place}: no answer of this format, {error.args[0]!r} is missing") from None
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{place}: no answer of this format ({error})") from None
    if not answer.new_tokens or len(answer.new_tokens) != len(answer.wall_time) or not (
            sum(answer.wall_time) > 0 or max(answer.new_tokens) <= 1):
        raise UserError(f"{place}: new_tokens and wall_time need one entry a turn, and time must have passed where a turn has "
                        "more than one token")
    return answer
