"""Serves a model to OpenAI's clients: python -m experiments.serve, then base_url="http://127.0.0.1:8000/v1"

`/v1/chat/completions`, streamed or not, `/v1/models` and `/health`. One request is answered at a time, speculatively; others
wait in a bounded queue, and those who find it full get status 429. Temperature, top_p and seed are a request's own; where it
says nothing, --temperature and --top_p hold. --top_k holds for all. Nobody is asked for a key: the server listens to this
machine alone unless --host says otherwise. Needs the extra `serve`: pip install 'specmq-jax[serve]'.
"""

import dataclasses
import functools
import importlib.util
import socket
from collections.abc import Iterator, Sequence

from absl import flags as absl_flags
from rich.console import Console

from experiments.display.lines import say
from experiments.running import flags
from experiments.serving import assistant
from experiments.serving.answer_text import AnswerText
from experiments.serving.assistant import Assistant
from experiments.timing import device
from specmq_jax.commands import entry
from specmq_jax.decoding.request_sampling import RequestKey, RequestSampling
from specmq_jax.errors import UserError

_NEEDED = ("pydantic", "starlette", "uvicorn")


class ServedModel:
    """The model as `served_answer.Answerer` describes it."""

    def __init__(self, loaded: Assistant, *, temperature: float, top_p: float, top_k: int) -> None:
        """The assistant's sampling must be a `RequestSampling`."""
        (method,) = loaded.settings.methods
        self._assistant, self._decoder = loaded, loaded.decoder(method)
        self.name, self.fingerprint = loaded.name, f"specmq-jax-{loaded.bench.precision}-{method}"
        self.max_length, self.temperature, self.top_p, self.top_k = loaded.max_length, temperature, top_p, top_k

    def encode(self, messages: Sequence[dict[str, str]]) -> list[int]:
        return self._assistant.encode(messages)

    def answer_text(self, stop_strings: Sequence[str]) -> AnswerText:
        return self._assistant.answer_text(stop_strings)

    def stream(self, prompt: Sequence[int], max_new_tokens: int | None, key: RequestKey) -> Iterator[list[int]]:
        return self._decoder.stream(prompt, max_new_tokens, key=key)

    def compile(self) -> None:
        """Compiles what requests will need."""
        # a key of its own for each, as it is consumed
        self._assistant.compile(self._decoder, lambda prompt, most: self.stream(
            prompt, most, RequestKey.of(seed=0)))


def main(argv: Sequence[str]) -> None:
    """Reads the flags, loads, and serves until interrupted."""
    flags.no_arguments(argv)
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"the server needs {', '.join(missing)}: pip install 'specmq-jax[serve]'")
    from experiments.serving import http_server  # imports what is needed

    given, console = absl_flags.FLAGS, Console(stderr=True)
    with listen(given.host, given.port) as listening:  # a port that is taken is found before anything is loaded
        settings = assistant.settings("serve")
        loaded = Assistant.load(dataclasses.replace(settings, sampling=RequestSampling()), console)
        model = ServedModel(loaded, temperature=given.temperature, top_p=given.top_p, top_k=given.top_k)
        with console.status("compiling"):
            model.compile()
        say(console, f"{model.name} at {loaded.bench.precision} with {settings.methods[0]} on {device.device_name()}: "
            f"{url(listening)}")
        http_server.serve(model, listening, waiting=given.queue, log=functools.partial(say, console))


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at a name or address; port 0 is any free one.

    Raises:
      UserError: the address is not this machine's, or the port is taken.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=128)
    except OSError as error:
        raise UserError(f"can't listen at {host}, port {port}: {error.strerror}; choose another --port or --host") from None


def url(listening: socket.socket) -> str:
    """What clients take as their base_url."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def declare_flags() -> None:
    """Declares the command's flags; not at import, where they would clash with those of other commands."""
    assistant.declare_flags()
    absl_flags.DEFINE_string("host", "127.0.0.1", "Address or name to listen at. By default only this machine's programs reach "
                             "the server; 0.0.0.0 lets in whoever reaches the machine, without a key.")
    absl_flags.DEFINE_integer("port", 8000, "Port to listen at; 0 is any free one.", 0, 65535)
    absl_flags.DEFINE_integer("queue", 8, "Requests that may wait beside the one that is answered; more are refused with "
                              "status 429 and a Retry-After.", lower_bound=0)


if __name__ == "__main__":
    declare_flags()
    entry.run(main, unused=assistant.UNUSED)
