"""Whatever a client sends, it gets an answer or a reason in OpenAI's form, and the server goes on."""

import asyncio
import json
import pathlib
import string

import pytest
from fuzzing import lengths, searching
from hypothesis import given
from hypothesis import strategies as st
from served import USER, FakeModel

from experiments.serving import http_server
from experiments.serving.model_queue import ModelQueue
from specmq_jax.tokenizer import encode_chat, load_tokenizer

CHECKPOINT = pathlib.Path(__file__).parents[2] / "data" / "checkpoints" / "fp16"
BODY = {"model": "fake", "messages": [{"role": "system", "content": "Be brief."}, *USER], "max_tokens": 3, "temperature": 0.5,
        "top_p": 0.9, "seed": 7, "stop": ["x"], "stream": False, "user": "me", "metadata": {"a": "b"}, "n": 1}
JSON_HEADER = [(b"content-type", b"application/json")]


@pytest.fixture
def application():
    queue = ModelQueue(4)
    yield http_server.Server(FakeModel("one two"), queue, lambda _: None).application
    queue.close(10)


def call(application, body=b"", *, method="POST", path="/v1/chat/completions", headers=JSON_HEADER, chunks=1):
    """Status, headers and body of a request that the application gets as a server hands it over."""
    size = max(1, -(-len(body) // chunks))
    parts = [body[start:start + size] for start in range(0, len(body), size)] or [b""]
    sent = []

    async def receive():
        if not parts:
            await asyncio.Event().wait()  # a client that stays
        part = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": method,
             "scheme": "http", "path": path, "raw_path": path.encode("utf-8", "replace"), "root_path": "", "query_string": b"",
             "headers": headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80)}
    asyncio.run(application(scope, receive, send))
    start, *rest = sent
    return start["status"], dict(start["headers"]), b"".join(message.get("body", b"") for message in rest)


def check_answered(application, *args, **kwargs):
    """The error object of a refusal; None of an answer."""
    status, headers, content = call(application, *args, **kwargs)
    if 200 <= status < 300:
        if headers[b"content-type"].startswith(b"text/event-stream"):
            assert content.endswith(b"data: [DONE]\n\n"), content
        elif kwargs.get("method") != "HEAD":
            json.loads(content)
        return None
    assert 400 <= status < 500, (status, content)
    error = json.loads(content)["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["message"] and "\n" not in error["message"] and len(error["message"]) < 1000
    return error


def deep(levels):
    return "[" * levels + "]" * levels


LITERALS = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000, "9" * 400, "-" + "9" * 40, "1e-400", "1e-38", "0.0",
            "-0.0", '"\\ud83d"', '"\\udc00\\ud800"', '"\\u0000"', '""', deep(100_000), deep(900), "[" * 5000, "{}",
            "[[]]", "null", '{"a": 1, "a": 2}', '{"\\ud83d": 1}', "true", "tru", "", '"' + "x" * 20000 + '"', "[1, 2]",
            '{"type": "text"}']


def literal(field, value):
    """The body with the text of a value in a field's place."""
    return json.dumps(BODY | {field: "@@"}).replace('"@@"', value).encode()


@pytest.mark.parametrize("value", LITERALS, ids=lambda value: value[:20] or "nothing")
def test_no_value_of_any_field_is_the_servers_fault(application, value):
    fields = [*BODY, "max_completion_tokens", "stream_options", "tools", "response_format", "logit_bias", "x", "\n\ud83d"]
    for field in fields:
        check_answered(application, literal(field, value))
    for field in ("role", "content", "name", "tool_calls", "function_call", "annotations", "refusal", "audio", "nonsense"):
        for role in ("user", "assistant"):
            message = {"role": role, "content": "a", field: "@@"}
            check_answered(application, literal("messages", json.dumps([message]).replace('"@@"', value)))
    for field in ("type", "text", "nonsense"):
        part = {"type": "text", "text": "a", field: "@@"}
        message = {"role": "user", "content": [part]}
        check_answered(application, literal("messages", json.dumps([message]).replace('"@@"', value)))


@pytest.mark.parametrize("body, reason, parameter", [
    (literal("temperature", "NaN"), "NaN is no JSON number", None),
    (literal("top_p", "1e999"), "1e999 is too large a number", None),
    (literal("seed", "9" * 5000), "is too large an integer: it has 5000 digits", None),
    (literal("metadata", deep(100_000)), "nested too deeply", None),
    (b'{"model": "fake", "model": "other"}', "the entry 'model' is given twice", "model"),
    (literal("stop", '["a", "\\ud83d"]'), r"stop[1] holds '\ud83d', half of a surrogate pair", "stop[1]"),
    (literal("model", '"\\udc00"'), r"model holds '\udc00'", "model"),
    (literal("\ud83d", "1"), r"\ud83d holds '\ud83d'", r"\ud83d"),
    (literal("messages", '[{"role": "user", "content": [{"type": "text", "text": "\\ud83d"}]}]'),
     r"messages[0].content[0].text holds '\ud83d'", "messages[0].content[0].text"),
    (b'{"model": "\xff"}', "byte 11 is not UTF-8", None),
    (b'{"model": "\xed\xa0\xbd"}', "byte 11 is not UTF-8", None),
    (json.dumps(BODY).encode("utf-16"), "is not UTF-8", None),
    (literal("model", '"' + "x" * 100_000 + '"'), "the model 'xxx", "model"),
    (literal("messages", '[{"role": "user", "content": null}]'), "messages[0].content is null, which only an assistant's may",
     "messages[0].content"),
    (literal("messages", '[{"role": "tool", "content": "a"}]'), "messages[0].role asks for tools, which are not supported",
     "messages[0].role"),
    (literal("messages", '[{"role": "assistant", "content": null, "tool_calls": [{"id": "1"}]}]'),
     "messages[0].tool_calls asks for tools", "messages[0].tool_calls"),
    (literal("messages", '[{"role": "assistant", "content": "", "function_call": {"name": "f"}}]'),
     "messages[0].function_call asks for tools", "messages[0].function_call"),
    (literal("messages", '[{"role": "user", "content": ""}]'), "the messages have no token", "messages"),
    (literal("messages", '[{"role": "user", "content": "a", "x\\ny": 1}]'), r"messages[0].x\ny is not a field",
     r"messages[0].x\ny"),
])
def test_a_refusal_names_the_field_and_the_reason(application, body, reason, parameter):
    error = check_answered(application, body)
    assert reason in error["message"] and error["param"] == parameter, error


@pytest.mark.parametrize("fields", [
    {"seed": 2**70}, {"seed": -2**200}, {"seed": 0}, {"max_tokens": 10**30}, {"temperature": 1e-38}, {"temperature": 2},
    {"temperature": 5e-324}, {"top_p": 1e-7}, {"stop": "\u0000"}, {"stop": []},
    {"messages": [{"role": "user", "content": "a\u0000b"}]}, {"messages": [{"role": "system", "content": "alone"}]},
    {"messages": [*USER, {"role": "assistant", "content": None, "tool_calls": [], "function_call": None}, *USER]},
    {"messages": [{"role": "assistant", "content": "x", "tool_calls": [], "refusal": None, "audio": None, "annotations": []}]},
], ids=str)
@pytest.mark.parametrize("stream", [False, True])
def test_values_at_the_edges_are_answered(application, fields, stream):
    assert check_answered(application, json.dumps(BODY | fields | {"stream": stream}).encode()) is None


def test_a_body_may_come_in_pieces_and_with_a_byte_order_mark(application):
    assert check_answered(application, b"\xef\xbb\xbf" + json.dumps(BODY).encode(), chunks=40) is None


@pytest.mark.parametrize("method, path, status", [
    ("GET", "/v1/chat/completions", 405), ("OPTIONS", "/v1/chat/completions", 405), ("HEAD", "/v1/chat/completions", 405),
    ("PUT", "/health", 405), ("HEAD", "/v1/models", 200), ("GET", "/v1/models/fake", 200), ("GET", "/v1/models/other", 404),
    ("GET", "/v1/models/", 404), ("POST", "/v1/chat/completions/", 404), ("GET", "/", 404), ("GET", "/a\n\ud83d\0", 404),
    ("BREW", "/v1/models", 405), ("GET", "//evil.example/v1/models", 404)])
def test_other_paths_and_methods_are_refused_in_openais_form(application, method, path, status):
    for host in (b"localhost", b"[::1", b"a b\xff", b""):
        found, headers, _ = call(application, method=method, path=path, headers=[(b"host", host)])
        assert found == status and (status != 405 or headers[b"allow"])
        check_answered(application, method=method, path=path, headers=[(b"host", host)])


@pytest.mark.parametrize("kind", [b"", b"text/plain", b"application/x-www-form-urlencoded", b"\xff", b"application/json2"])
def test_another_content_type_is_refused(application, kind):
    body = json.dumps(BODY).encode()
    assert call(application, body, headers=[(b"content-type", kind)])[0] == 415
    assert call(application, body, headers=[])[0] == 415
    assert call(application, body, headers=[(b"content-type", b"Application/JSON; charset=utf-8")])[0] == 200


@pytest.mark.parametrize("template", ["{{ raise_exception('no\nsystem') }}", "{{ messages[9].content.x }}", "{{ 1 / 0 }}",
                                      "{% if %}"])
def test_a_template_that_refuses_names_the_messages(template):
    model, tokenizer = FakeModel("a"), load_tokenizer(CHECKPOINT)
    tokenizer.chat_template = template
    model.encode = lambda messages: encode_chat(tokenizer, messages)
    queue = ModelQueue(4)
    application = http_server.Server(model, queue, lambda _: None).application
    error = check_answered(application, json.dumps(BODY).encode())
    assert error["param"] == "messages" and error["message"].startswith("the chat template refuses the conversation: ")
    queue.close(10)


TEXT = st.text(st.characters(codec=None) | st.characters(categories=["Cs", "Cc"]), max_size=6)
VALUE = st.recursive(st.none() | st.booleans() | st.integers() | st.integers(-10**400, 10**400) | st.floats() | TEXT
                     | st.sampled_from(["text", "user", "assistant", "tool", "fake"]),
                     lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6)


def places(value, path=()):
    yield path
    if isinstance(value, dict | list):
        for name, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(entry, (*path, name))


WIDE = BODY | {"stream": True, "stream_options": {"include_usage": True}, "messages": [
    {"role": "user", "content": [{"type": "text", "text": "a"}], "name": "b"},
    {"role": "assistant", "content": "c", "tool_calls": [], "refusal": None, "annotations": [], "function_call": None}]}


@lengths
def test_requests_with_any_part_changed_are_answered_or_refused(application, examples):
    @searching(examples)
    @given(st.sampled_from(list(places(WIDE))), VALUE, st.none() | TEXT)
    def check(place, value, name):
        def put(content, path):
            if not path:
                return content | {name: value} if name is not None and isinstance(content, dict) else value
            changed = content.copy()
            changed[path[0]] = put(content[path[0]], path[1:])
            return changed

        check_answered(application, json.dumps(put(WIDE, place)).encode())

    check()


@lengths
def test_bodies_with_any_bytes_changed_are_answered_or_refused(application, examples):
    whole = json.dumps(WIDE).encode()

    @searching(examples)
    @given(st.integers(0, len(whole)), st.integers(0, 12),
           st.binary(max_size=6) | st.text(string.printable, max_size=6).map(str.encode), st.integers(1, 5))
    def check(start, left_out, put_in, chunks):
        check_answered(application, whole[:start] + put_in + whole[start + left_out:], chunks=chunks)

    check()


@lengths
def test_any_path_and_header_is_answered_or_refused(application, examples):
    parts = st.sampled_from(["/v1", "/models", "/chat", "/completions", "/health", "/", "fake"]) | TEXT

    @searching(examples)
    @given(st.sampled_from(["GET", "HEAD", "POST", "PUT", "OPTIONS", "TRACE"]), st.lists(parts, max_size=5).map("".join),
           st.lists(st.tuples(st.sampled_from([b"host", b"content-type", b"content-length", b"accept"]), st.binary(max_size=8)),
                    max_size=3), st.binary(max_size=9))
    def check(method, path, headers, body):
        check_answered(application, body, method=method, path="/" + path, headers=headers)

    check()
