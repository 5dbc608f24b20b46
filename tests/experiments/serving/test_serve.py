"""The server as its clients meet it: OpenAI's library, raw HTTP, the queue and the words of a request."""

import http.client
import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import openai
import pytest
from byte_tokens import answer_text, ids
from served import USER, FakeModel, begun, eventually, hang_up, health, running

import specmq_jax as sm
from experiments import serve
from experiments.serving import chat_protocol, http_server
from experiments.serving.chat_protocol import RequestError
from specmq_jax.decoding.request_sampling import RequestKey, RequestSampling
from specmq_jax.errors import NotFiniteError

ROOT = pathlib.Path(__file__).parents[3]


def client(port):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)


def ask(port, **fields):
    return client(port).chat.completions.create(**({"model": "fake", "messages": USER} | fields))


def post(port, body, kind="application/json"):
    """Status, headers and JSON of a raw request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": kind})
    response = connection.getresponse()
    return response.status, response.headers, json.loads(response.read())


def test_openais_library_completes_and_streams_the_same_text():
    with running(FakeModel("Größe: 5 €, 😀!")) as (port, _):
        assert [model.id for model in client(port).models.list()] == ["fake"]
        assert client(port).models.retrieve("fake").id == "fake"
        whole = ask(port)
        assert whole.choices[0].message.content == "Größe: 5 €, 😀!" and whole.choices[0].finish_reason == "stop"
        tokens = len(ids("Größe: 5 €, 😀!")) + 1
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(ids("Say something.")), tokens)
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + tokens
        chunks = list(ask(port, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    assert all(chunk.usage is None for chunk in chunks[:-1])
    deltas = [chunk.choices[0] for chunk in chunks[:-1]]
    assert deltas[0].delta.role == "assistant" and len(deltas) > 5
    assert "".join(choice.delta.content or "" for choice in deltas) == "Größe: 5 €, 😀!"
    assert [choice.finish_reason for choice in deltas] == [None] * (len(deltas) - 1) + ["stop"]


def test_a_limit_ends_with_length_and_stop_strings_are_cut_where_they_begin():
    with running(FakeModel("one, two, three")) as (port, _):
        for limit in ({"max_tokens": 6}, {"max_completion_tokens": 6, "max_tokens": 9}):
            cut = ask(port, **limit)
            assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == ("one, t", "length")
            assert cut.usage.completion_tokens == 6
        for stop in (" two", ["nothing", " two"]):
            stopped = ask(port, stop=stop)
            assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("one,", "stop")
            assert stopped.usage.completion_tokens == len("one, two")
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in ask(port, stop=" three", stream=True))
        assert streamed == "one, two,"
        assert ask(port, stop="three!").choices[0].message.content == "one, two, three"  # held back, then told


def test_sampling_is_the_requests_own_and_else_the_servers():
    model = FakeModel("a")
    with running(model) as (port, _):
        ask(port, temperature=0.5, top_p=0.75, seed=7)
        ask(port, seed=2**40 + 7)
        ask(port)
    first, second, third = ([float(key.temperature), float(key.top_p)] for key in model.keys)
    assert first == [0.5, 0.75] and second == third == [0.25, 1.0]
    keys = [int(key.seed) for key in model.keys]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_the_model_within_a_round(stream):
    model = FakeModel("word " * 8)
    model.held = True
    with running(model) as (port, log):
        connection = begun(port, stream=stream)
        model.allow.release(2)
        eventually(lambda: model.rounds == 2)
        hang_up(connection)
        eventually(lambda: log)
        model.allow.release(1)  # the round on its way
        eventually(lambda: model.ended == 1)
        assert model.rounds == 3 and "given up by the client" in log[0]
        model.held = False
        assert ask(port).choices[0].message.content == "word " * 8


def test_a_full_queue_refuses_and_says_when_to_come_back():
    model = FakeModel("hello")
    model.held = True
    with running(model, waiting=1) as (port, _):
        first, second = begun(port), None
        eventually(lambda: health(port) == (1, 0))
        second = begun(port, stream=True)
        eventually(lambda: health(port) == (1, 1))
        with pytest.raises(openai.RateLimitError) as refused:
            ask(port)
        assert int(refused.value.response.headers["Retry-After"]) >= 1 and refused.value.code == "queue_full"
        hang_up(second)  # a place in the queue is given up at once
        eventually(lambda: health(port) == (1, 0))
        third = begun(port)
        model.held = False
        model.allow.release(1)
        for connection in (first, third):
            assert json.loads(connection.getresponse().read())["choices"][0]["message"]["content"] == "hello"


def test_a_failure_of_the_model_is_told_and_the_next_request_served(capfd):
    model = FakeModel("fine")
    with running(model) as (port, _):
        model.failing = RuntimeError("a device fell off")
        with pytest.raises(openai.InternalServerError, match="the model failed"):
            ask(port)
        with pytest.raises(openai.APIError, match="the model failed"):
            list(ask(port, stream=True))
        model.failing = None
        assert ask(port).choices[0].message.content == "fine"
    assert "a device fell off" in capfd.readouterr().err


def test_a_state_that_is_not_finite_is_the_models_fault_and_is_told():
    model = FakeModel("fine")
    model.failing = NotFiniteError("the model's state at token 3 of the answer (id 7) is not finite", position=9)
    with running(model) as (port, _):
        with pytest.raises(openai.InternalServerError, match=r"token 3 of the answer \(id 7\) is not finite") as told:
            ask(port)
        assert told.value.code == "not_finite"


BAD = [
    (b"{", 400, "not valid JSON", None),
    (b"[]", 400, "must be a JSON object; found a list", None),
    ({"model": "other"}, 404, "the model 'other' does not exist here", "model"),
    ({"model": None}, 400, "model: input should be a valid string", "model"),
    ({"messages": []}, 400, "at least 1 item", "messages"),
    ({"messages": [{"role": "tool", "content": "a"}]}, 400, "'system', 'developer', 'user' or 'assistant'", "messages[0].role"),
    ({"messages": [{"role": "user"}]}, 400, "messages[0].content is missing", "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, "", "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": "word " * 20}]}, 400, "have 100 tokens, and this server's cache holds 64",
     "messages"),
    ({"max_tokens": 0}, 400, "greater than or equal to 1", "max_tokens"),
    ({"max_tokens": "9"}, 400, "valid integer", "max_tokens"),
    ({"temperature": -1}, 400, "greater than or equal to 0", "temperature"),
    ({"top_p": 0}, 400, "greater than 0", "top_p"),
    ({"stop": ["a", "b", "c", "d", "e"]}, 400, "at most 4 items", "stop"),
    ({"stop": ""}, 400, "at least 1 character", "stop"),
    ({"n": 2}, 400, "n = 2 is not supported; leave it out or give 1", "n"),
    ({"tools": [{"type": "function"}]}, 400, "tools", "tools"),
    ({"response_format": {"type": "json_object"}}, 400, "is not supported", "response_format"),
    ({"logprobs": True}, 400, "is not supported", "logprobs"),
    ({"nonsense": 1}, 400, "nonsense is not a field that this server knows", "nonsense"),
    ({"stream_options": {"include_usage": True}}, 400, "needs stream = true", "stream_options"),
]


def test_malformed_requests_get_a_reason_in_openais_form():
    model = FakeModel("a")
    with running(model) as (port, _):
        for body, status, reason, parameter in BAD:
            sent = body if isinstance(body, bytes) else json.dumps({"model": "fake", "messages": USER} | body)
            found, _, answer = post(port, sent)
            error = answer["error"]
            assert found == status and reason in error["message"], (body, answer)
            assert error["type"] == "invalid_request_error" and "\n" not in error["message"]
            assert (error["param"] or "").startswith(parameter or "") and (error["param"] is None) == (parameter is None), error
        assert post(port, b"{}", kind="text/plain")[0] == 415
        assert post(port, b" " * (http_server.MOST_BODY_BYTES + 1))[0] == 413
        with pytest.raises(openai.NotFoundError):
            client(port).embeddings.create(model="fake", input="a")
    assert not model.keys


def test_fields_without_a_bearing_are_let_through():
    body = {"model": "fake", "user": "me", "metadata": {"a": "b"}, "n": 1, "tools": [], "logit_bias": None,
            "response_format": {"type": "text"}, "frequency_penalty": 0, "stop": None, "temperature": 1,
            "messages": [{"role": "developer", "content": [{"type": "text", "text": part} for part in ("Be ", "brief.")]},
                         {"role": "assistant", "content": "Yes.", "refusal": None, "tool_calls": None, "annotations": []}]}
    asked = chat_protocol.parse(json.dumps(body).encode())
    assert [message.plain() for message in asked.messages] == [{"role": "system", "content": "Be brief."},
                                                               {"role": "assistant", "content": "Yes."}]
    assert asked.temperature == 1 and not asked.stop_strings and asked.most_tokens is None
    with pytest.raises(RequestError, match="at most 4"):
        chat_protocol.parse(json.dumps(body | {"stop": list("abcde")}).encode())


@pytest.mark.parametrize("stops", [("aab",), ("b", "aa"), ("xyz", "ab", "abaab"), ("aaaab",)])
def test_text_is_shown_up_to_the_first_stop_string_however_it_is_cut(stops):
    rng = np.random.default_rng(0)
    for _ in range(200):
        text = "".join(rng.choice(list("ab"), 12))
        shown = answer_text(stops)
        told, place, tokens = "", 0, ids(text)
        while place < len(tokens):
            step = int(rng.integers(1, 5))
            told += shown.add(tokens[place:place + step])
            place += step
        # the stop string that is complete first ends the answer; of two with one end, the longer one began earlier
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        assert told + shown.rest() == (text[:min(ends)[1]] if ends else text)
        assert shown.ended == bool(ends) and shown.tokens == (min(ends)[0] if ends else len(text))


@pytest.mark.parametrize("own", [sm.Greedy(), sm.Sampling(temperature=0.7), sm.Sampling(temperature=1.5, top_p=0.6),
                                 sm.Sampling(temperature=1.0, top_k=5, top_p=0.9)])
def test_a_requests_sampling_draws_what_the_librarys_does(own):
    logits = jnp.asarray(np.random.default_rng(1).normal(0, 3, (7, 50)), jnp.float32)
    positions, shared = jnp.arange(7, dtype=jnp.int32) * 3, RequestSampling()
    draw = jax.jit(shared.__call__)
    for seed in range(20):
        key = RequestKey.of(seed=seed, temperature=getattr(own, "temperature", 0), top_p=getattr(own, "top_p", 1),
                            top_k=getattr(own, "top_k", 0))
        assert draw(logits, positions, key).tolist() == own(logits, positions, jax.random.key(seed)).tolist()


def test_an_address_that_is_taken_or_foreign_is_one_line():
    with serve.listen("127.0.0.1", 0) as taken:
        with pytest.raises(sm.UserError, match="can't listen at 127.0.0.1, port .* choose another --port"):
            serve.listen("127.0.0.1", taken.getsockname()[1])
        assert serve.url(taken) == f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
    with pytest.raises(sm.UserError, match="can't listen at 203.0.113.7"):
        serve.listen("203.0.113.7", 0)


def test_a_missing_server_library_is_one_line(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    with pytest.raises(sm.UserError, match=r"^the server needs uvicorn: pip install 'specmq-jax\[serve\]'$"):
        serve.main(["serve"])


def test_flags_of_benchmarks_are_refused():
    result = subprocess.run([sys.executable, "-m", "experiments.serve", "--max_new_tokens=5"], cwd=ROOT, text=True,
                            capture_output=True, timeout=120)
    assert result.returncode == 2 and "error: --max_new_tokens has no use here" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_the_command_serves_a_model_that_samples_as_generate_does():
    source = ROOT / "tests" / "data" / "checkpoints" / "fp16"
    process = subprocess.Popen([sys.executable, "-m", "experiments.serve", f"--model={source}", "--method=spec",
                                "--draft_precision=w4a16-g64", "--port=0", "--max_length=300"], cwd=ROOT, text=True,
                               stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        line = next(line for line in process.stderr if "http://" in line)
        assert "with spec on" in line
        port = int(line.rsplit(":", 1)[1].split("/")[0])
        asked = dict(model="fp16", messages=USER, max_tokens=12, seed=3)
        found = {t: ask(port, temperature=t, **asked) for t in (0, 0.9)}
    finally:
        process.terminate()
        assert process.wait(timeout=60) in (-15, 143)
    model = sm.load(source)
    tokenizer = sm.tokenizer.load_tokenizer(model.directory)
    prompt = sm.tokenizer.encode_chat(tokenizer, USER)
    for temperature, answer in found.items():
        sampling = sm.Sampling(temperature=temperature) if temperature else sm.Greedy()
        decoder = sm.Decoder(model, config=sm.DecodeConfig(max_len=300, sampling=sampling, seed=3))
        expected = decoder.generate(prompt, 12).tokens
        assert answer.usage.completion_tokens == 12 and answer.usage.prompt_tokens == len(prompt)
        assert answer.choices[0].message.content == sm.tokenizer.decode(tokenizer, expected)
