"""The HTTP side of `experiments.serve`: OpenAI's paths over a queue for one model."""

import asyncio
import socket
import time
from collections.abc import Callable

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from experiments.serving import chat_protocol as protocol
from experiments.serving.chat_protocol import ChatRequest, Json, RequestError
from experiments.serving.model_queue import ModelQueue, QueueFullError, QueueStoppedError
from experiments.serving.served_answer import Answer, Answerer, Events, disconnected, failure, read_prompt, unless
from specmq_jax.errors import UserError
from specmq_jax.json_files import shown

MOST_BODY_BYTES = 4 * 2**20
_CLIENT_CLOSED_REQUEST = 499


class Server:
    """The application, and a line for each answer to `log`."""

    def __init__(self, model: Answerer, queue: ModelQueue, log: Callable[[str], None]) -> None:
        self._model, self._queue, self._log, self._created = model, queue, log, int(time.time())
        self._reading: set[asyncio.Future[None]] = set()
        self.application = Starlette(
            routes=[Route("/v1/chat/completions", self._chat, methods=["POST"]),
                    Route("/v1/models", self._models), Route("/v1/models/{name:path}", self._one_model),
                    Route("/health", self._health)],
            exception_handlers={RequestError: _refused, HTTPException: _refused_by_path, QueueFullError: _refused_by_queue,
                                ClientDisconnect: _gone, UserError: _failed, QueueStoppedError: _failed, Exception: _failed})
        self.application.router.redirect_slashes = False  # a redirect would repeat whatever host the client named

    def stop(self) -> None:
        """Ends each answer, and what waits or comes later, with an error that says so; to be called in the event loop."""
        self._queue.stop()
        for reading in self._reading:
            if not reading.done():
                reading.set_result(None)

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
            raise RequestError(f"the model '{shown(name)}' does not exist here; this server has {self._model.name!r}",
                               status=404, parameter="model", code="model_not_found")

    async def _chat(self, request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError("the Content-Type must be application/json", status=415)
        prepared = await unless(self._prepare(request), self._stopped())
        if prepared is None:
            raise QueueStoppedError
        asked, prompt = prepared
        answer = Answer(self._model, self._queue, asked, prompt, self._log)
        if asked.stream:
            return Events(answer, lambda: self._queue.stopped)
        try:
            whole = await unless(answer.whole(), disconnected(request.receive))
        finally:
            answer.close()
        return Response(status_code=_CLIENT_CLOSED_REQUEST) if whole is None else JSONResponse(whole)

    async def _stopped(self) -> None:
        """Returns once the server stops."""
        reading = asyncio.get_running_loop().create_future()
        self._reading.add(reading)
        try:
            if not self._queue.stopped:
                await reading
        finally:
            self._reading.remove(reading)

    async def _prepare(self, request: Request) -> tuple[ChatRequest, list[int]]:
        """The request and its prompt's token ids; what takes long for a long request runs beside the event loop."""
        asked = await asyncio.to_thread(protocol.parse, await _body(request))
        self._check_model(asked.model)
        return asked, await asyncio.to_thread(read_prompt, self._model, asked)


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_BODY_BYTES:
            raise RequestError(f"the body is longer than {MOST_BODY_BYTES} bytes", status=413)
    return bytes(body)


def _respond(error: RequestError, **headers: str) -> Response:
    return JSONResponse(error.body, status_code=error.status, headers=headers)


async def _refused(request: Request, error: Exception) -> Response:
    del request
    return _respond(error)


async def _refused_by_path(request: Request, error: Exception) -> Response:
    refusal = RequestError(f"{request.method} {shown(request.scope['path'])}: {error.detail.lower()}", status=error.status_code)
    return _respond(refusal, **(error.headers or {}))


async def _refused_by_queue(request: Request, error: Exception) -> Response:
    del request
    return _respond(RequestError(str(error), status=429, code="queue_full"), **{"Retry-After": str(error.retry_after)})


async def _gone(request: Request, error: Exception) -> Response:
    del request, error
    return Response(status_code=_CLIENT_CLOSED_REQUEST)


async def _failed(request: Request, error: Exception) -> Response:
    del request
    return _respond(failure(error))


class _StoppingServer(uvicorn.Server):
    """Ends answers as soon as it is to stop, instead of waiting for them and then breaking them off."""

    def __init__(self, config: uvicorn.Config, stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._stop = stop

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._stop()
        await super().shutdown(sockets)


def uvicorn_server(model: Answerer, queue: ModelQueue, log: Callable[[str], None]) -> uvicorn.Server:
    """Ready to `run` on listening sockets; when it ends, answers under way end with an error behind their round.

    Clients that don't read it have three seconds. It logs as the process does: uvicorn's own settings would close the handlers
    that there are.
    """
    server = Server(model, queue, log)
    config = uvicorn.Config(server.application, log_config=None, log_level="warning", access_log=False,
                            timeout_graceful_shutdown=3)
    return _StoppingServer(config, server.stop)


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
