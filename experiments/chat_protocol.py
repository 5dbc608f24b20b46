"""Chat completions as OpenAI's clients ask for them and read them: requests, answers, chunks and errors.

The fields are those of https://platform.openai.com/docs/api-reference/chat.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Json = dict[str, Any]

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,), "logprobs": (False,), "top_logprobs": (0,), "frequency_penalty": (0,), "presence_penalty": (0,),
    "logit_bias": ({},), "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "modalities": (["text"],)}
"""Fields that change an answer in ways this server can't, with the values that ask for nothing; so does null."""
_IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
            "parallel_tool_calls", "reasoning_effort", "verbosity")
"""Fields without a bearing on what this server answers."""


class RequestError(Exception):
    """A request that can't be served: the HTTP status, and OpenAI's error object in `body`."""

    def __init__(self, message: str, *, status: int = 400, parameter: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = {429: "rate_limit_error"}.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.body: Json = {"error": {"message": message, "type": kind, "param": parameter, "code": code}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TextPart(_Strict):
    """A part of a message; pictures and sound are refused."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One message; `name` and the empty fields that clients send back with an assistant's message are ignored."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None
    refusal: None = None
    audio: None = None
    annotations: list[Any] | None = None
    function_call: None = None
    tool_calls: None = None

    def plain(self) -> dict[str, str]:
        """As chat templates know it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


_Count = Annotated[int, Field(ge=1)]
_StopString = Annotated[str, Field(min_length=1)]


class ChatRequest(_Strict):
    """A request's fields that matter; None is the server's default. At most four stop strings, as OpenAI has it."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: _Count | None = None
    max_completion_tokens: _Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int | None = None
    stop: _StopString | Annotated[list[_StopString], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def most_tokens(self) -> int | None:
        """`max_tokens` is the older name."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def streams_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


def parse(body: bytes) -> ChatRequest:
    """Reads a request's body.

    Raises:
      RequestError: it is no JSON object, a field is missing, malformed or unknown, or asks for what can't be done.
    """
    try:
        found = json.loads(body)
    except ValueError as error:
        raise RequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise RequestError(f"the body must be a JSON object; found a {type(found).__name__}")
    for name, neutral in _NEUTRAL.items():
        if found.get(name) is not None and found[name] not in neutral:
            raise RequestError(f"{name} = {json.dumps(found[name])[:80]} is not supported; leave it out or give "
                               f"{json.dumps(neutral[0])}", parameter=name, code="unsupported_value")
    fields = {name: value for name, value in found.items() if name not in _NEUTRAL and name not in _IGNORED}
    try:
        request = ChatRequest.model_validate(fields)
    except ValidationError as error:
        raise _refusal(error) from None
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options needs stream = true", parameter="stream_options")
    return request


def _refusal(error: ValidationError) -> RequestError:
    # a field of several types has one error for each: what came deepest, or was of the right type, tells most
    fault = max(error.errors(include_url=False, include_context=False),
                key=lambda fault: (len(fault["loc"]), not fault["type"].endswith("_type")))
    # the type's name is no part of the field's place
    path = [part for part in fault["loc"] if isinstance(part, int) or part in _FIELDS]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".") or str(fault["loc"][0])
    if fault["type"] == "extra_forbidden":
        place = ".".join(str(part) for part in fault["loc"])
        return RequestError(f"{place} is not a field that this server knows", parameter=place, code="unknown_parameter")
    if fault["type"] == "missing":
        return RequestError(f"{place} is missing", parameter=place, code="missing_required_parameter")
    return RequestError(f"{place}: {fault['msg'][0].lower()}{fault['msg'][1:]}", parameter=place, code="invalid_value")


_FIELDS = frozenset(name for model in (ChatRequest, Message, TextPart, StreamOptions) for name in model.model_fields)


def usage(prompt_tokens: int, completion_tokens: int) -> Json:
    """OpenAI's usage object."""
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens}


def completion(about: Json, text: str, finish_reason: str, used: Json) -> Json:
    """A whole answer; `about` holds the fields id, created, model and system_fingerprint."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text, "refusal": None}, "logprobs": None,
              "finish_reason": finish_reason}
    return {**about, "object": "chat.completion", "choices": [choice], "usage": used}


def chunk(about: Json, delta: Json, finish_reason: str | None = None) -> Json:
    """A part of a streamed answer."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return {**about, "object": "chat.completion.chunk", "choices": [choice]}


def usage_chunk(about: Json, used: Json) -> Json:
    """What ends a stream that was asked for its usage."""
    return {**about, "object": "chat.completion.chunk", "choices": [], "usage": used}


def event(content: Json) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


LAST_EVENT = b"data: [DONE]\n\n"
