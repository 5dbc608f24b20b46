"""Chat completions as OpenAI's clients ask for them and read them: requests, answers, chunks and errors.

The fields are those of https://platform.openai.com/docs/api-reference/chat.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from specmq_jax.json_files import JsonError, Place, parse_json, spelled

Json = dict[str, Any]
_Model = TypeVar("_Model", bound=BaseModel)

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
    content: str | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)] | None
    name: str | None = None
    refusal: None = None
    audio: None = None
    annotations: list[Any] | None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates know it."""
        text = self.content or ""
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


_Count = Annotated[int, Field(ge=1)]
_StopString = Annotated[str, Field(min_length=1)]


class ChatRequest(_Strict):
    """A request's fields that matter; None is the server's default. At most four stop strings, as OpenAI has it."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_tokens: _Count | None = None
    max_completion_tokens: _Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int | None = None
    stop: _StopString | Annotated[list[_StopString], Field(max_length=4, fail_fast=True)] | None = None
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
        found = parse_json(body.decode("utf-8-sig"), "the body")
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not valid JSON: byte {error.start} is not UTF-8") from None
    except JsonError as error:
        raise RequestError(str(error), parameter=error.place) from None
    if not isinstance(found, dict):
        raise RequestError(f"the body must be a JSON object; found a {type(found).__name__}")
    for name, neutral in _NEUTRAL.items():
        if found.get(name) is not None and found[name] not in neutral:
            raise RequestError(f"{name} = {_value(found[name])} is not supported; leave it out or give "
                               f"{json.dumps(neutral[0])}", parameter=name, code="unsupported_value")
    fields = {name: value for name, value in found.items() if name not in _NEUTRAL and name not in _IGNORED}
    _check_names((), fields, ChatRequest)
    if isinstance(options := fields.get("stream_options"), dict):
        _check_names(("stream_options",), options, StreamOptions)
    if isinstance(messages := fields.get("messages"), list):
        # one by one: pydantic lets no other thread run while it validates, and there may be a hundred thousand
        fields["messages"] = [_message(("messages", number), message) for number, message in enumerate(messages)]
    request = _validated((), fields, ChatRequest)
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options needs stream = true", parameter="stream_options")
    return request


def _value(value: Any) -> str:
    try:
        return json.dumps(value)[:80]
    except RecursionError:
        return f"a {type(value).__name__}"


def _message(place: Place, message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    _check_no_tools(place, message)
    _check_names(place, message, Message)
    content, here = message.get("content"), (*place, "content")
    if content is None and "content" in message and message.get("role") != "assistant":
        raise _refused(here, "is null, which only an assistant's may be; give a text")
    if isinstance(content, list):
        message = message | {"content": [_part((*here, number), part) for number, part in enumerate(content)]}
    return _validated(place, message, Message)


def _part(place: Place, part: Any) -> Any:
    if not isinstance(part, dict):
        return part
    if part.get("type") != "text":
        raise _refused((*place, "type"), "must be 'text'; pictures and sound are not supported")
    _check_names(place, part, TextPart)
    return _validated(place, part, TextPart)


def _check_no_tools(place: Place, message: Json) -> None:
    if message.get("role") in ("tool", "function"):
        place = (*place, "role")
    elif asking := next((name for name in ("tool_calls", "function_call") if message.get(name)), None):
        place = (*place, asking)
    else:
        return
    raise _refused(place, "asks for tools, which are not supported; a message's role is 'system', 'developer', 'user' or "
                   "'assistant', and it has no tool_calls", code="unsupported_value")


def _check_names(place: Place, fields: Json, model: type[BaseModel]) -> None:
    """Refuses the first name that is not known; pydantic would list each of however many."""
    unknown = next((name for name in fields if name not in model.model_fields), None)
    if unknown is not None:
        raise _refused((*place, unknown), "is not a field that this server knows", code="unknown_parameter")


def _refused(place: Place, why: str, code: str = "invalid_value") -> RequestError:
    return RequestError(f"{spelled(place)} {why}", parameter=spelled(place), code=code)


def _validated(place: Place, fields: Json, model: type[_Model]) -> _Model:
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _refusal(place, error) from None


def _refusal(place: Place, error: ValidationError) -> RequestError:
    # a field of several types has one error for each: what came deepest, or was of the right type, tells most
    fault = max(error.errors(include_url=False, include_context=False, include_input=False),
                key=lambda fault: (len(fault["loc"]), not fault["type"].endswith("_type")))
    # the type's name is no part of the field's place
    path = spelled((*place, *(part for part in fault["loc"] if isinstance(part, int) or part in _FIELDS)))
    if fault["type"] == "missing":
        return RequestError(f"{path} is missing", parameter=path, code="missing_required_parameter")
    return RequestError(f"{path}: {fault['msg'][0].lower()}{fault['msg'][1:]}", parameter=path, code="invalid_value")


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
