"""Answer files: one JSON object a question, appended line by line, with the settings that made them beside."""

import contextlib
import json
import os
import pathlib
import uuid
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from experiments.answers.answer_format import Answer, parse
from experiments.answers.answer_sidecar import Sidecar
from specmq_jax.errors import UserError
from specmq_jax.json_files import is_json

_GOES_ON = "the answers it holds are kept, and the same command goes on behind them"
_WAY_OUT = "give another --output_dir, or --noresume to replace them"


def read(path: pathlib.Path, *, unfinished: bool = False) -> list[Answer]:
    """All answers of a file, SpecMQuant's own included.

    Args:
      path: the JSONL file.
      unfinished: a run may have been killed, or be still writing: a last line without its end is passed over.

    Raises:
      UserError: the file can't be read, is empty, or a line is malformed (its number and fault are named).
    """
    lines = _content(path).split(b"\n")
    if unfinished and not is_json(lines[-1]):
        lines.pop()
    found = _parsed(path, lines)
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

    Attributes:
      found: the answers so far.
      measured: what was measured once all were there; None before.
      lost: a run had finished, and some of its answers are gone.
    """

    def __init__(self, path: pathlib.Path, settings: Mapping[str, Any], *, resume: bool,
                 asked: Collection[int | str] | None = None, places: Mapping[str, Any] | None = None) -> None:
        """Changes nothing on the disk.

        Args:
          path: the JSONL file.
          settings: what decides the answers and their times; JSON values.
          resume: keep the answers found there; else `start` removes them.
          asked: ids of the questions that the run asks; None asks those that are answered.
          places: where the models lie, for the reader of the sidecar.

        Raises:
          UserError: the answers found there were made with other settings, answer other questions, are of two runs, or
            can't be read.
        """
        self.path = path
        self._sidecar = Sidecar(path=path.with_suffix(".settings.json"), settings=dict(settings), places=dict(places or {}))
        self.measured: dict[str, Any] | None = None
        self.found: list[Answer] = []
        self.lost = False
        self._end = 0  # of the whole lines
        if not resume:
            return
        if path.exists():
            self._take(_content(path))
        if self.found:
            self.measured = self._sidecar.read_measured(path, _WAY_OUT)
            self._check_one_run()
            self._check_asked(asked)
        missing = not self.found or asked is not None and len(self.found) < len(asked)
        if missing and (self.measured if self.found else self._sidecar.had_finished()):
            self.lost, self.measured = True, None

    @property
    def answered(self) -> set[int | str]:
        """Ids of the questions answered."""
        return {answer.question_id for answer in self.found}

    @property
    def model_id(self) -> str | None:
        """Of the answers so far."""
        return self.found[0].model_id if self.found else None

    def start(self) -> None:
        """Makes ready for `append`: answers that are not to be kept go with their scores, half a line at the end goes, and
        the settings are written."""
        with self._writing(self.path):
            if not self.found:
                self.path.write_bytes(b"")
                self.path.with_suffix(".scores.json").unlink(missing_ok=True)
            elif self.path.stat().st_size > self._end:
                os.truncate(self.path, self._end)
            elif not _content(self.path).endswith(b"\n"):
                with self.path.open("ab") as file:
                    file.write(b"\n")
        if not self.found or self.lost:
            self._write_sidecar()

    def append(self, answer: Mapping[str, Any]) -> Answer:
        """Writes one answer to the disk and returns it as read."""
        # a text that UTF-8 can't hold becomes JSON's own escape of it
        line = json.dumps(answer, ensure_ascii=False).encode("utf-8", "backslashreplace")
        with self._writing(self.path), self.path.open("ab") as file:
            file.write(line + b"\n")
        self.found.append(parse(line, str(self.path)))
        return self.found[-1]

    def finish(self, measured: Mapping[str, Any]) -> None:
        """Keeps what was measured beside the answers."""
        self.measured = dict(measured)
        self._write_sidecar()

    def _take(self, content: bytes) -> None:
        """Whole lines, and a last one that lacks nothing but its end; a shorter one counts as the beginning of an answer."""
        *lines, last = content.split(b"\n")
        whole = _is_answer(last) or not _is_beginning(last)
        try:
            self.found = _parsed(self.path, [*lines, last] if whole else lines)
        except UserError as error:
            raise UserError(f"{error}; mend or remove that line, {_WAY_OUT}") from None
        self._end = len(content) - (0 if whole else len(last))

    def _check_one_run(self) -> None:
        seen: set[int | str] = set()
        for answer in self.found:
            if answer.question_id in seen:
                raise UserError(f"{self.path} answers question {answer.question_id!r} twice, so that two runs were appended to "
                                f"it; {_WAY_OUT}")
            if answer.model_id != self.model_id:
                raise UserError(f"{self.path} holds answers by {self.model_id!r} and by {answer.model_id!r}, so that two runs "
                                f"were appended to it; {_WAY_OUT}")
            if not (answer.texts and answer.token_ids and answer.prompt_tokens):
                raise UserError(f"{self.path} answers question {answer.question_id!r} without its texts, tokens or the lengths "
                                f"of its prompts, which another program wrote; {_WAY_OUT}")
            seen.add(answer.question_id)

    def _check_asked(self, asked: Collection[int | str] | None) -> None:
        if asked is not None and (others := [ident for ident in self.answered if ident not in asked]):
            raise UserError(f"{self.path} answers question {others[0]!r}, which is not among the {len(asked)} to be asked; "
                            f"{_WAY_OUT}")

    def _write_sidecar(self) -> None:
        self._sidecar.write(self.measured, _GOES_ON)

    @contextlib.contextmanager
    def _writing(self, path: pathlib.Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{path} can't be written: {error.strerror}; {_GOES_ON}") from None


def _content(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"the answer file {path} can't be read: {error.strerror}") from None


def _parsed(path: pathlib.Path, lines: list[bytes]) -> list[Answer]:
    return [parse(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]


def _is_answer(line: bytes) -> bool:
    try:
        parse(line, "")
    except UserError:
        return False
    return True


def _is_beginning(line: bytes) -> bool:
    """Whether a killed run, or a full disk, may have left this of an answer."""
    line = line.rstrip(b"\0")  # a file system that lost power fills up with zeros
    if not line:
        return True
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return line.startswith(b"{") and error.msg != "Extra data"
    except (ValueError, RecursionError):
        pass
    return line.startswith(b"{")
