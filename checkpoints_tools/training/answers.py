"""The target's own answers to a file of prompts, made once and kept on disk."""

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32
from rich.console import Console

from checkpoints_tools import records
from checkpoints_tools.records import Record
from checkpoints_tools.training.answer_parts import Row, find_parts, next_part, read_part, write_part
from checkpoints_tools.training.sampler import Completion, Request, Sampler
from specmq_jax import locks, words
from specmq_jax import tokenizer as tk
from specmq_jax.errors import UserError
from specmq_jax.files import put_text
from specmq_jax.kept_settings import changes, read_settings, write_settings
from specmq_jax.loading.model import Params

PART = 1024
"""Answers in one file."""

_SETTINGS = "settings.json"

Turns = tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sequences:
    """Prompts with their answers.

    Attributes:
      tokens: i32[n] of each, prompt and answer.
      prompts: i32[N], how many of them are the prompt's.
      dialogues: i32[N], number of the dialogue each belongs to.
    """

    tokens: list[Int32[np.ndarray, "n"]]
    prompts: Int32[np.ndarray, "N"]
    dialogues: Int32[np.ndarray, "N"]


def read_prompts(path: pathlib.Path) -> list[Turns]:
    """What the user says in each dialogue of a file: {"turns": [text, ...]} or {"prompt": text} a record.

    Raises:
      UserError: as in `records.read`, a record of another form, an empty text; the line is named.
    """
    dialogues = list(map(_turns, records.read(path, "prompt file")))
    if not dialogues:
        raise UserError(f"{path} holds no prompts; expected one JSON object a line")
    return dialogues


def _turns(record: Record) -> Turns:
    if not record.values.keys() & {"turns", "prompt"}:
        raise UserError(f'{record.place}: expected {{"turns": [text, ...]}} or {{"prompt": text}}')
    turns = record.values["turns"] if "turns" in record.values else [record.values["prompt"]]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
        raise UserError(f"{record.place}: expected a list of at least one text")
    if not all(turn.strip() for turn in turns):
        raise UserError(f"{record.place}: a prompt is empty; remove it")
    return tuple(turns)


_GOES_ON = "the answers it holds are kept, and the same command goes on behind them"


class AnswerStore:
    """A directory of answers that a run appends to, `PART` at a time; a killed run goes on where it stopped."""

    def __init__(self, directory: pathlib.Path, settings: Mapping[str, Any]) -> None:
        """
        Args:
          directory: made where it is missing.
          settings: what decides the answers, JSON values.

        Raises:
          UserError: answers found there were made with other settings, or the directory can't be written.
        """
        self.directory = directory
        self._parts = check_kept(directory, settings, whole=True)
        self._waiting: list[Row] = []
        if not self._parts:
            write_settings(directory / _SETTINGS, settings)

    def found(self) -> Iterator[Row]:
        """Dialogue, turn, prompt length and all tokens of every answer kept so far, in order of dialogue and turn.

        An answer whose dialogue lacks an earlier one is left out: a part of the store was removed.

        Raises:
          UserError: a part is damaged.
        """
        rows = {row[:2]: row for path in self._parts for row in read_part(path)}
        following = {}
        for dialogue, turn in sorted(rows):
            if turn == following.get(dialogue, 0):
                following[dialogue] = turn + 1
                yield rows[dialogue, turn]

    def add(self, dialogue: int, turn: int, completion: Completion) -> None:
        """Keeps an answer; it is on the disk once `PART` have come, or after `flush`."""
        prompt = np.asarray(completion.request.prompt, np.int32)
        self._waiting.append((dialogue, turn, len(prompt), np.concatenate([prompt, completion.tokens])))
        if len(self._waiting) >= PART:
            self.flush()

    def flush(self) -> None:
        """Writes what waits."""
        if not self._waiting:
            return
        path = next_part(self.directory, self._parts)
        write_part(path, self._waiting, _GOES_ON)
        self._parts.append(path)
        self._waiting = []


def check_kept(directory: pathlib.Path, settings: Mapping[str, Any], *, whole: bool = False) -> list[pathlib.Path]:
    """The parts of a store, which may not be there yet.

    Args:
      directory: the store's.
      settings: what decides the answers, or those of them that are known before the prompts are.
      whole: they are all.

    Raises:
      UserError: answers found there were made otherwise.
    """
    parts, place = find_parts(directory), directory / _SETTINGS
    if not parts:
        return parts
    before = read_settings(place, "give another --answers")
    if before is None:
        raise UserError(f"{directory} holds answers, and {_SETTINGS}, which tells how they were made, is missing; give another "
                        "--answers")
    if found := changes({key: value for key, value in before.items() if whole or key in settings}, settings):
        raise UserError(f"{directory} holds answers made otherwise ({'; '.join(found)}); give another --answers")
    return parts


def claimed(directory: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """Keeps other runs from making answers in a store; errors as in `locks.claimed`."""
    return locks.claimed(directory, ".answers.lock", "another run is making answers", "give another --answers")


class _Progress:
    """A line now and then: answers, tokens, tokens a second."""

    SECONDS = 10

    def __init__(self, console: Console) -> None:
        self._console, self._start = console, time.perf_counter()
        self._told, self._answers, self._tokens = self._start, 0, 0

    def answered(self, tokens: int) -> None:
        self._answers, self._tokens = self._answers + 1, self._tokens + tokens
        if time.perf_counter() - self._told > self.SECONDS:
            self._told = time.perf_counter()
            self.tell()

    def tell(self) -> None:
        seconds = time.perf_counter() - self._start
        made = f"{words.count(self._answers, 'answer')} of {words.count(self._tokens, 'token')}"
        self._console.print(f"answering: {made} in {seconds:.0f} s, {self._tokens / seconds:.0f} tokens/s of all dialogues "
                            "together, prefills counted", highlight=False, soft_wrap=True)


def settings(content: str, precision: str, sampler: Sampler) -> dict[str, Any]:
    """What decides the answers to a prompt, `content` being the model's digest."""
    return {"model content": content, "precision": precision, "max_new_tokens": sampler.max_new_tokens,
            "max_len": sampler.max_len}


def own_prompts(path: pathlib.Path, sampler: Sampler, params: Params, tokenizer: Any, count: int, seed: int,
                console: Console) -> list[Turns]:
    """Prompts that the target writes itself: it continues an empty user turn (Magpie, arXiv 2406.08464).

    Args:
      path: JSON lines, where they are kept and taken from on the next run.
      sampler, params, tokenizer: the target's.
      count: how many it tries; those that repeat or do not end are left out.
      seed: of the drawing.
      console: where progress is told.

    Raises:
      UserError: the tokenizer has no chat template to begin from, or the file can't be written.
    """
    if path.exists():
        return read_prompts(path)
    if not tokenizer.chat_template:
        raise UserError("--self_prompts needs a model whose tokenizer has a chat template; give --prompts=FILE")
    text = tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True)
    prefix = tuple(tokenizer.encode(text.split(_MARK)[0], add_special_tokens=False))
    drawn = dataclasses.replace(sampler, temperature=_OWN_TEMPERATURE, max_new_tokens=_OWN_LENGTH)
    console.print(f"writing {words.count(count, 'prompt')}", highlight=False)
    requests = (Request(key=number, prompt=prefix) for number in range(count))
    ended = [c for c in drawn.run(params, requests, seed=seed) if c.tokens[-1] in sampler.stop_tokens]
    texts = (tk.decode(tokenizer, c.tokens).strip() for c in sorted(ended, key=lambda c: c.request.key))
    prompts = [text for text in dict.fromkeys(texts) if text]
    put_text(path, "".join(json.dumps({"prompt": text}) + "\n" for text in prompts), parents=True)
    return [(text,) for text in prompts]


_MARK = "\N{WHITE SQUARE}"
_OWN_TEMPERATURE, _OWN_LENGTH = 0.8, 200


def make(store: AnswerStore, sampler: Sampler, params: Params, tokenizer: Any, dialogues: Sequence[Turns],
         console: Console) -> None:
    """Answers each dialogue turn by turn, those that `store` has already apart.

    A dialogue ends before the turn whose prompt fills more than half of a slot.
    """
    def request(dialogue: int, answers: Sequence[Sequence[int]]) -> Request | None:
        """The prompt of the turn behind these answers, None where there is none or it is too long."""
        if len(answers) == len(dialogues[dialogue]):
            return None
        messages = []
        for said, answer in zip(dialogues[dialogue], [*answers, None], strict=False):
            messages.append({"role": "user", "content": said})
            if answer is not None:
                messages.append({"role": "assistant", "content": tk.decode(tokenizer, answer).strip()})
        prompt = tuple(tk.encode_chat(tokenizer, messages))
        return Request(key=(dialogue, tuple(answers)), prompt=prompt) if 2 * len(prompt) <= sampler.max_len else None

    too_long = sum(request(dialogue, ()) is None for dialogue in range(len(dialogues)))
    if too_long:
        console.print(f"answering: {words.count(too_long, 'dialogue is', 'dialogues are')} left out, which begin with "
                      f"more than {sampler.max_len // 2} tokens",
                      highlight=False, soft_wrap=True)
    made: dict[int, list[tuple[int, ...]]] = {}
    for dialogue, turn, length, tokens in store.found():
        if dialogue >= len(dialogues) or turn >= len(dialogues[dialogue]):
            raise UserError(f"{store.directory} holds an answer to turn {turn} of dialogue {dialogue}, which the prompts lack; "
                            "give another --answers")
        made.setdefault(dialogue, []).append(tuple(tokens[length:].tolist()))
    pending = (request(dialogue, made.get(dialogue, ())) for dialogue in range(len(dialogues)))
    waiting = [found for found in pending if found is not None]
    if not waiting:
        return
    found = words.count(sum(map(len, made.values())), "answer")
    console.print(f"answering: {words.count(len(dialogues), 'dialogue')}, {found} found in "
                  f"{store.directory}", highlight=False, soft_wrap=True)

    def follow_up(completion: Completion) -> Request | None:
        dialogue, answers = completion.request.key
        return request(dialogue, (*answers, tuple(completion.tokens.tolist())))

    report = _Progress(console)
    try:
        for completion in sampler.run(params, waiting, follow_up=follow_up):
            dialogue, answers = completion.request.key
            store.add(dialogue, len(answers), completion)
            report.answered(len(completion.tokens))
    finally:
        store.flush()
    report.tell()


def sequences(store: AnswerStore) -> Sequences:
    """All answers kept, in order of dialogue and turn."""
    rows = list(store.found())
    return Sequences(tokens=[row[3] for row in rows], prompts=np.int32([row[2] for row in rows]),
                     dialogues=np.int32([row[0] for row in rows]))
