"""A chat in the terminal: python -m experiments.chat

Answers come as they are made. What the drafter found is shown in another shade than the model's own tokens; tokens/s and the
accept length stand below. /help lists the commands; Ctrl-C stops an answer. Works in a pipe, too: a line is a message, answers
go to stdout and all else to stderr.
"""

import contextlib
import io
import pathlib
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Protocol

from rich.console import Console
from rich.text import Text

import specmq_jax as sm
from experiments.running import flags
from experiments.serving import assistant
from experiments.serving.answer_text import AnswerText
from experiments.serving.answer_view import AnswerView
from experiments.serving.assistant import Assistant
from experiments.timing import device
from specmq_jax.commands import entry
from specmq_jax.errors import UserError
from specmq_jax.files import put_json
from specmq_jax.words import count

_PROMPT = "> "
_SURROGATE = re.compile("[\ud800-\udfff]")
_HELP = """/save FILE    write the dialogue to a JSON file
/reset        begin a new dialogue
/method       list the methods; /method NAME answers with another one from here on
/help         this list
/quit         leave, as does Ctrl-D
Ctrl-C stops an answer; what has come of it stays part of the dialogue."""


class Answerer(Protocol):
    """The part of `assistant.Assistant` that a chat uses."""

    max_length: int
    methods: tuple[str, ...]
    name: str

    def encode(self, messages: Sequence[dict[str, str]]) -> list[int]: ...

    def answer_text(self) -> AnswerText: ...

    def ready(self, method: str) -> sm.Decoder: ...


class Chat:
    """A dialogue and the commands that steer it.

    Attributes:
      messages: of the dialogue so far, as chat templates take them.
      method: that answers.
    """

    def __init__(self, model: Answerer, method: str, *, seed: int, console: Console, aside: Console) -> None:
        """Prepares the method.

        Args:
          model: what answers.
          method: to begin with.
          seed: of sampling; each answer has one of its own.
          console: where answers go.
          aside: where all else goes.

        Raises:
          UserError: what the method drafts with can't be loaded.
        """
        self._model, self._seed, self._console, self._aside = model, seed, console, aside
        self.messages: list[dict[str, str]] = []
        self._saved: set[pathlib.Path] = set()
        self._answers = 0
        self._use(method)

    def run(self, read: Callable[[], str]) -> None:
        """Until /quit or the end of the input; `read` returns a line, or raises EOFError or, for Ctrl-C, KeyboardInterrupt."""
        while True:
            try:
                line = read().strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self._say("(/quit or Ctrl-D leaves)")
                continue
            if line == "/quit":
                return
            try:
                self.take(line)
            except UserError as error:
                self._say(f"error: {error}")
            except KeyboardInterrupt:
                self._say("(interrupted)")

    def take(self, line: str) -> None:
        """A message or a command.

        Raises:
          UserError: an unknown command, or one that can't be followed; what is no text; a dialogue that no longer fits.
            Nothing has changed then.
        """
        if _SURROGATE.search(line):
            raise UserError("the line is not text in the terminal's encoding; type it again, or set PYTHONIOENCODING to the "
                            "encoding that the terminal has")
        command, _, argument = line.partition(" ")
        if not line.startswith("/"):
            if line:
                self._answer(line)
        elif command in _COMMANDS:
            _COMMANDS[command](self, argument.strip())
        else:
            raise UserError(f"{command} is not a command; /help lists them")

    def _answer(self, question: str) -> None:
        asked = [*self.messages, {"role": "user", "content": question}]
        prompt = self._model.encode(asked)
        if len(prompt) >= self._model.max_length:
            raise UserError(f"the dialogue has {count(len(prompt), 'token')} with this message, and the cache holds "
                            f"{self._model.max_length}; /save FILE keeps it, /reset begins a new one, and a larger "
                            "--max_length, up to the model's own limit, holds more")
        text, said = self._model.answer_text(), []
        self._answers += 1
        rounds = self._decoder.stream(prompt, seed=self._seed + self._answers, rounds=1)
        with _stoppable() as stopped, AnswerView(self._console, self._aside) as view, contextlib.closing(rounds):
            for tokens in rounds:
                view.committed(len(tokens))
                for place, token in enumerate(tokens, start=1):
                    said.append(text.add([token]))
                    view.add(said[-1], drafted=place < len(tokens))
                if stopped.is_set():
                    break
            said.append(text.rest())
            view.add(said[-1], drafted=False)
        self.messages = [*asked, {"role": "assistant", "content": "".join(said)}]
        if stopped.is_set():
            self._say("(stopped)")
        elif not text.ended:
            self._say(f"(the cache of {self._model.max_length} tokens is full: /save FILE keeps the dialogue, /reset begins a "
                      "new one)")

    def _use(self, method: str) -> None:
        with self._aside.status(f"preparing {method}"):
            self._decoder = self._model.ready(method)
        self.method = method

    def _change_method(self, name: str) -> None:
        if name:
            self._use(name)
        self._say(", ".join(f"[{name}]" if name == self.method else name for name in self._model.methods))

    def _reset(self, argument: str) -> None:
        del argument
        self.messages = []
        self._say("(a new dialogue)")

    def _save(self, name: str) -> None:
        if not name:
            raise UserError("/save needs the name of a file: /save FILE")
        try:
            path = pathlib.Path(name).expanduser()
            if path.exists() and path.resolve() not in self._saved:
                raise UserError(f"{path} exists; choose another name")
            put_json(path, {"model": self._model.name, "method": self.method, "messages": self.messages},
                     advice="choose another name")
        except (OSError, ValueError, RuntimeError) as error:  # the latter two of a name that no file can have
            raise UserError(f"{name} can't be written: {getattr(error, 'strerror', None) or error}; choose another name"
                            ) from None
        self._saved.add(path.resolve())
        self._say(f"(saved {count(len(self.messages), 'message')} to {path})")

    def _help(self, argument: str) -> None:
        del argument
        self._say(_HELP)

    def _say(self, text: str) -> None:
        self._aside.print(Text(text), soft_wrap=True)


_COMMANDS: dict[str, Callable[[Chat, str], None]] = {
    "/save": Chat._save, "/reset": Chat._reset, "/method": Chat._change_method, "/help": Chat._help}


@contextlib.contextmanager
def _stoppable() -> Iterator[threading.Event]:
    """Within, Ctrl-C sets the event; a second one, which finds it set, interrupts as ever."""
    stopped = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        if stopped.is_set():
            signal.default_int_handler(number, frame)
        stopped.set()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def _reader() -> Callable[[], str]:
    """Lines of a terminal, with editing and history, or of a pipe."""
    if not sys.stdin.isatty():
        def next_line() -> str:
            if not (line := sys.stdin.readline()):
                raise EOFError
            return line

        return next_line
    with contextlib.suppress(ImportError):  # not everywhere; input() uses it once it is imported
        import readline  # noqa: F401
    return lambda: input(_PROMPT)


def main(argv: Sequence[str]) -> None:
    """Reads the flags, loads and chats."""
    flags.no_arguments(argv)
    if isinstance(sys.stdin, io.TextIOWrapper):  # what is no text there becomes surrogates, which `Chat` refuses
        sys.stdin.reconfigure(errors="surrogateescape")
    settings = assistant.settings("chat")
    console = Console()
    aside = console if console.is_terminal else Console(stderr=True)
    model = Assistant.load(settings, aside)
    chat = Chat(model, settings.methods[0], seed=settings.seed, console=console, aside=aside)
    aside.print(Text(f"{model.name} at {model.bench.precision} with {chat.method} on {device.device_name()}; /help lists the "
                     "commands"), soft_wrap=True)
    chat.run(_reader())


if __name__ == "__main__":
    assistant.declare_flags()
    entry.run(main, unused=assistant.UNUSED)
