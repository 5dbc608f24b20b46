"""The HTTP side of `experiments.serve`: OpenAI's paths over a queue for one model."""

import asyncio
import secrets
import socket
import sys
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from typing import Any, Protocol

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from experiments import chat_protocol as protocol
from experiments.answer_text import AnswerText
from experiments.chat_protocol import ChatRequest, Json, RequestError
from experiments.model_queue import ModelQueue, QueueFullError
from experiments.request_sampling import RequestKey
from specmq_jax.errors import UserError

MOST_BODY_BYTES = 4 * 2**20
_CLIENT_CLOSED_REQUEST = 499


class Answerer(Protocol):
    """The model as the server sees it.

    Attributes:
      name: as clients name it; fingerprint: of what answers, OpenAI's system_fingerprint.
      max_length: tokens of prompt and answer that the cache holds.
      temperature, top_p: where a request doesn't say.
    """

    name: str
    fingerprint: str
    max_length: int
    temperature: float
    top_p: float

    def encode(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a dialogue; a template that refuses it raises a `UserError`."""

    def answer_text(self, stop_strings: Sequence[str]) -> AnswerText: ...

    def stream(self, prompt: Sequence[int], max_new_tokens: int | None, key: RequestKey) -> Iterator[list[int]]:
        """Token ids a round."""


class Server:
    """The application, and a line for each answer to `log`."""

    def __init__(self, model: Answerer, queue: ModelQueue, log: Callable[[str], None]) -> None:
        self._model, self._queue, self._log, self._created = model, queue, log, int(time.time())
        self.application = Starlette(
            routes=[Route("/v1/chat/completions", self._chat, methods=["POST"]),
                    Route("/v1/models", self._models), Route("/v1/models/{name:path}", self._one_model),
                    Route("/health", self._health)],
            exception_handlers={RequestError: _refused, HTTPException: _refused_by_path, QueueFullError: _refused_by_queue,
                                ClientDisconnect: _gone, UserError: _failed, Exception: _failed})

    async def _health(self, request: Request) -> Response:
        del request
        answering, waiting = self._queue.depth()
        return JSONResponse({"status": "ok", "model": self._model.name, "answering": answering, "waiting": waiting})

    async def _models(self, request: Request) -> Response:
        del request
        return JSONResponse({"object": "list", "data": [self._card]})

    async def _one_model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._card)

    @property
    def _card(self) -> Json:
        return {"id": self._model.name, "object": "model", "created": self._created, "owned_by": "specmq-jax",
                "max_model_len": self._model.max_length}

    def _check_model(self, name: str) -> None:
        if name != self._model.name:
            raise RequestError(f"the model {name!r} does not exist here; this server has {self._model.name!r}", status=404,
                               parameter="model", code="model_not_found")

    async def _chat(self, request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError("the Content-Type must be application/json", status=415)
        asked = protocol.parse(await _body(request))
        self._check_model(asked.model)
        answer = _Answer(self._model, self._queue, asked, self._log)
        if asked.stream:
            return _Events(answer)
        whole = await _unless_disconnected(request, answer.whole())
        return Response(status_code=_CLIENT_CLOSED_REQUEST) if whole is None else JSONResponse(whole)


class _Events(StreamingResponse):
    """An answer as server-sent events, closed even where the client goes away between two of them."""

    def __init__(self, answer: "_Answer") -> None:
        super().__init__(answer.events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()


class _Answer:
    """One answer, its place in the queue taken."""

    def __init__(self, model: Answerer, queue: ModelQueue, asked: ChatRequest, log: Callable[[str], None]) -> None:
        """Raises a `RequestError` for a dialogue that the template refuses or the cache can't hold, and a `QueueFullError`."""
        self._asked, self._log = asked, log
        try:
            prompt = model.encode([message.plain() for message in asked.messages])
        except UserError as error:
            raise RequestError(str(error), parameter="messages") from None
        if not prompt or len(prompt) >= model.max_length:
            raise RequestError(f"the messages have {len(prompt)} tokens, and this server's cache holds {model.max_length} with "
                               "at least one of the answer; shorten them", parameter="messages",
                               code="context_length_exceeded")
        self._about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model.name,
                       "system_fingerprint": model.fingerprint}
        self._prompt_tokens, self._text = len(prompt), model.answer_text(asked.stop_strings)
        key = RequestKey.of(
            seed=secrets.randbits(32) if asked.seed is None else asked.seed,
            temperature=model.temperature if asked.temperature is None else asked.temperature,
            top_p=model.top_p if asked.top_p is None else asked.top_p)
        self._ticket = queue.submit(lambda: model.stream(prompt, asked.most_tokens, key))
        self._start, self._rounds, self._outcome = time.perf_counter(), 0, "given up by the client"

    async def whole(self) -> Json:
        """The completion object."""
        try:
            parts = [part async for part in self._parts()]
            return protocol.completion(self._about, "".join(parts), self._finish_reason, self._usage)
        finally:
            self.close()

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
            traceback.print_exception(error, file=sys.stderr)
            yield protocol.event(_failure(error).body)

    def close(self) -> None:
        """Frees the model, behind the round on its way, and the place in the queue; to be called however the answer ended."""
        self._ticket.cancel()
        made, seconds = max(self._text.tokens - 1, 0), time.perf_counter() - self._start
        speed = f", {made / seconds:.1f} tokens/s, {made / self._rounds:.2f} a round" if self._rounds else ""
        self._log(f"{self._prompt_tokens} + {self._text.tokens} tokens, {self._outcome}{speed}")

    async def _parts(self) -> AsyncIterator[str]:
        """The answer's text, a round's at a time."""
        try:
            async for tokens in self._ticket:
                if not self._text.tokens:
                    self._start = time.perf_counter()  # the first token comes with the prompt, not with a round
                else:
                    self._rounds += 1
                yield self._text.add(tokens)
                if self._text.ended:
                    self._ticket.cancel()
                    break
            yield self._text.rest()
            self._outcome = f"ended by {self._finish_reason}"
        except Exception:
            self._outcome = "ended by an error"
            raise

    @property
    def _finish_reason(self) -> str:
        return "stop" if self._text.ended else "length"

    @property
    def _usage(self) -> Json:
        return protocol.usage(self._prompt_tokens, self._text.tokens)


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_BODY_BYTES:
            raise RequestError(f"the body is longer than {MOST_BODY_BYTES} bytes", status=413)
    return bytes(body)


async def _unless_disconnected(request: Request, answer: Coroutine[Any, Any, Json]) -> Json | None:
    """What `answer` returns; None, and `answer` is cancelled, where the client goes away before."""
    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, gone = asyncio.ensure_future(answer), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


def _failure(error: Exception) -> RequestError:
    """What a client is told of an error; one that isn't the client's is told of in full by the server's log alone."""
    if isinstance(error, UserError):
        return RequestError(str(error))
    return RequestError("the model failed; the server's log says why", status=500, code="internal_error")


def _respond(error: RequestError, **headers: str) -> Response:
    return JSONResponse(error.body, status_code=error.status, headers=headers)


async def _refused(request: Request, error: Exception) -> Response:
    del request
    return _respond(error)


async def _refused_by_path(request: Request, error: Exception) -> Response:
    return _respond(RequestError(f"{request.method} {request.url.path}: {error.detail.lower()}", status=error.status_code))


async def _refused_by_queue(request: Request, error: Exception) -> Response:
    del request
    return _respond(RequestError(str(error), status=429, code="queue_full"), **{"Retry-After": str(error.retry_after)})


async def _gone(request: Request, error: Exception) -> Response:
    del request, error
    return Response(status_code=_CLIENT_CLOSED_REQUEST)


async def _failed(request: Request, error: Exception) -> Response:
    del request
    return _respond(_failure(error))


def uvicorn_server(model: Answerer, queue: ModelQueue, log: Callable[[str], None]) -> uvicorn.Server:
    """Ready to `run` on listening sockets; when it ends, answers under way have three seconds to end, too.

    It logs as the process does: uvicorn's own settings would close the handlers that there are.
    """
    return uvicorn.Server(uvicorn.Config(Server(model, queue, log).application, log_config=None, log_level="warning",
                                         access_log=False, timeout_graceful_shutdown=3))


def serve(model: Answerer, listening: socket.socket, *, waiting: int, log: Callable[[str], None]) -> None:
    """Serves until SIGINT or SIGTERM.

    Args:
      model: what answers.
      listening: where clients come in.
      waiting: requests that may wait beside the one that is answered.
      log: takes a line for each answer.
    """
    queue = ModelQueue(waiting)
    try:
        uvicorn_server(model, queue, log).run(sockets=[listening])
    finally:
        queue.close(timeout=10)
