"""One answer of the server: its prompt, its place in the queue, and its text as an object or as events."""

import asyncio
import secrets
import sys
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from experiments.answers import metrics
from experiments.display.cells import number
from experiments.serving import chat_protocol as protocol
from experiments.serving.answer_text import AnswerText
from experiments.serving.chat_protocol import ChatRequest, Json, RequestError
from experiments.serving.model_queue import ModelQueue, QueueStoppedError
from specmq_jax.decoding.request_sampling import RequestKey
from specmq_jax.errors import NotFiniteError, UserError
from specmq_jax.words import count

_Result = TypeVar("_Result")
_TOLD = (UserError, QueueStoppedError)
"""Errors that a client is told of in full; the server's log alone says more of others."""


class Answerer(Protocol):
    """The model as the server sees it.

    Attributes:
      name: as clients name it; fingerprint: of what answers, OpenAI's system_fingerprint.
      max_length: tokens of prompt and answer that the cache holds.
      temperature, top_p: where a request doesn't say; top_k: of every request.
    """

    name: str
    fingerprint: str
    max_length: int
    temperature: float
    top_p: float
    top_k: int

    def encode(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a dialogue; a template that refuses it raises a `UserError`."""

    def answer_text(self, stop_strings: Sequence[str]) -> AnswerText: ...

    def stream(self, prompt: Sequence[int], max_new_tokens: int | None, key: RequestKey) -> Iterator[list[int]]:
        """Token ids a round."""


def read_prompt(model: Answerer, asked: ChatRequest) -> list[int]:
    """The token ids of the request's dialogue.

    Raises:
      RequestError: the template refuses it, or the cache can't hold it.
    """
    try:
        prompt = model.encode([message.plain() for message in asked.messages])
    except UserError as error:
        raise RequestError(str(error), parameter="messages") from None
    if not prompt:
        raise RequestError("the messages have no token; say something", parameter="messages", code="invalid_value")
    if len(prompt) >= model.max_length:
        raise RequestError(f"the messages have {len(prompt)} tokens, and this server's cache holds {model.max_length} with "
                           "at least one of the answer; shorten them", parameter="messages", code="context_length_exceeded")
    return prompt


class Answer:
    """One answer, its place in the queue taken."""

    def __init__(self, model: Answerer, queue: ModelQueue, asked: ChatRequest, prompt: Sequence[int],
                 log: Callable[[str], None]) -> None:
        """Raises a `QueueFullError` or `QueueStoppedError`."""
        self._asked, self._log = asked, log
        self._about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model.name,
                       "system_fingerprint": model.fingerprint}
        self._prompt_tokens, self._text = len(prompt), model.answer_text(asked.stop_strings)
        self._ticket = queue.submit(lambda: model.stream(prompt, asked.most_tokens, _key(model, asked)))
        self._first = self._last = 0.0  # when the first tokens came, and the newest
        self._outcome = "given up by the client"

    async def whole(self) -> Json:
        """The completion object. `close` must follow."""
        parts = [part async for part in self._parts()]
        return protocol.completion(self._about, "".join(parts), self._finish_reason, self._usage)

    async def events(self) -> AsyncIterator[bytes]:
        """The chunks as server-sent events; an error behind the first of them is one, too. `close` must follow."""
        more = {"usage": None} if self._asked.streams_usage else {}
        try:
            yield protocol.event(protocol.chunk(self._about, {"role": "assistant", "content": ""}) | more)
            async for part in self._parts():
                if part:
                    yield protocol.event(protocol.chunk(self._about, {"content": part}) | more)
            yield protocol.event(protocol.chunk(self._about, {}, self._finish_reason) | more)
            if self._asked.streams_usage:
                yield protocol.event(protocol.usage_chunk(self._about, self._usage))
            yield protocol.LAST_EVENT
        except Exception as error:  # the status is sent already
            if not isinstance(error, _TOLD):
                traceback.print_exception(error, file=sys.stderr)
            yield protocol.event(failure(error).body)

    def close(self) -> None:
        """Frees the model, behind the round on its way, and the place in the queue; to be called however the answer ended."""
        self._ticket.cancel()
        made = metrics.speed([self._text.tokens], [self._last - self._first])
        speed = "" if made is None else f", {number(made, 1)} tokens/s"
        self._log(f"{self._prompt_tokens} + {count(self._text.tokens, 'token')}, {self._outcome}{speed}")

    async def _parts(self) -> AsyncIterator[str]:
        """The answer's text, a round's at a time."""
        try:
            async for tokens in self._ticket:
                self._last = time.perf_counter()
                if not self._text.tokens:
                    self._first = self._last  # what came before was waiting and the prefill
                yield self._text.add(tokens)
                if self._text.ended:
                    self._ticket.cancel()
                    break
            yield self._text.rest()
            self._outcome = f"ended by {self._finish_reason}"
        except Exception as error:
            self._outcome = "ended as the server stops" if isinstance(error, QueueStoppedError) else "ended by an error"
            raise

    @property
    def _finish_reason(self) -> str:
        return "stop" if self._text.ended else "length"

    @property
    def _usage(self) -> Json:
        return protocol.usage(self._prompt_tokens, self._text.tokens)


class Events(StreamingResponse):
    """An answer as server-sent events, closed even where the client goes away between two of them."""

    def __init__(self, answer: "Answer", is_stopping: Callable[[], bool]) -> None:
        super().__init__(answer.events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._answer, self._is_stopping = answer, is_stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # not the inherited one, which looks for the client's going away by the server's version, and may raise it
        try:
            await unless(self.stream_response(send), disconnected(receive))
        except OSError:  # sent to a client that is gone
            pass
        except asyncio.CancelledError:  # a client that doesn't read has its time once the server stops
            if not self._is_stopping():
                raise
        finally:
            self._answer.close()


def _key(model: Answerer, asked: ChatRequest) -> RequestKey:
    return RequestKey.of(seed=secrets.randbits(32) if asked.seed is None else asked.seed,
                         temperature=model.temperature if asked.temperature is None else asked.temperature,
                         top_p=model.top_p if asked.top_p is None else asked.top_p, top_k=model.top_k)


async def disconnected(receive: Receive) -> None:
    """Returns once the client has gone away; to be called when the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless(work: Coroutine[Any, Any, _Result], event: Coroutine[Any, Any, Any]) -> _Result | None:
    """What `work` returns; None, and `work` is cancelled, where `event` ends before."""
    working, waiting = asyncio.ensure_future(work), asyncio.ensure_future(event)
    try:
        await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, waiting):
            task.cancel()
        await asyncio.gather(working, waiting, return_exceptions=True)


def failure(error: Exception) -> RequestError:
    """What a client is told of an error behind the reading of its request."""
    if isinstance(error, NotFiniteError):  # the model's fault, and the client has a use for the token
        return RequestError(str(error), status=500, code="not_finite")
    if isinstance(error, _TOLD):
        return RequestError(str(error), status=503 if isinstance(error, QueueStoppedError) else 400)
    return RequestError("the model failed; the server's log says why", status=500, code="internal_error")
