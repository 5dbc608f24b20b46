"""A server goes on while long requests are read and clients go away, and ends every answer when it stops."""

import contextlib
import json
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from served import USER, FakeModel, begun, eventually, hang_up, health, running

from experiments import serve
from experiments.serving import chat_protocol, http_server
from experiments.serving.model_queue import ModelQueue, QueueStoppedError

ROOT = pathlib.Path(__file__).parents[3]
REASON = "the server is stopping"


def events(response):
    """The objects of a stream's events, and [DONE] as None."""
    lines = (line.removeprefix(b"data: ").strip() for line in response.read().split(b"\n\n") if line)
    return [None if line == b"[DONE]" else json.loads(line) for line in lines]


@contextlib.contextmanager
def stopping(model, waiting=4):
    """A server's port, and what stops it and says how long that took."""
    queue = ModelQueue(waiting)
    server = http_server.uvicorn_server(model, queue, lambda _: None)
    with serve.listen("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()

        def stop():
            start = time.monotonic()
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()
            return time.monotonic() - start

        try:
            yield listening.getsockname()[1], stop
        finally:
            model.held = False
            model.allow.release(1000)
            stop()
            queue.close()


def raw(port, text):
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.sendall(text)
    return connection


def test_a_stop_ends_each_answer_with_an_error(capfd, caplog):
    model = FakeModel("word " * 8)
    model.held = True
    with stopping(model) as (port, stop):
        streamed = begun(port, stream=True)
        model.allow.release(2)
        eventually(lambda: model.rounds == 2)
        whole, waiting = begun(port), begun(port, stream=True)
        eventually(lambda: health(port) == (1, 2))
        assert stop() < 3
        found = events(streamed.getresponse())
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in found[:-1]) == "word"
        for last in (found[-1], events(waiting.getresponse())[-1]):
            assert last["error"]["message"] == REASON
        refused = whole.getresponse()
        assert refused.status == 503 and json.loads(refused.read())["error"]["message"] == REASON
    assert not capfd.readouterr().err + caplog.text


def test_a_stop_ends_requests_that_are_being_read(capfd, caplog):
    model, encoding, encoded = FakeModel("word"), threading.Event(), threading.Event()

    def encode(messages):
        encoding.set()
        encoded.wait(20)
        return [1]

    model.encode = encode
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n{"
    with stopping(model) as (port, stop):
        half, encoded_one, silent = raw(port, head), begun(port), raw(port, b"POST /v1/ch")
        eventually(encoding.is_set)
        threading.Timer(0.5, encoded.set).start()
        assert stop() < 3
        for answer in (half.makefile("rb").read(), encoded_one.getresponse().read()):
            assert REASON.encode() in answer
        assert not silent.recv(100)
    assert "Traceback" not in capfd.readouterr().err + caplog.text


@pytest.mark.slow
def test_a_client_that_does_not_read_holds_no_stop_up(capfd, caplog):
    model = FakeModel("x")
    model.max_length, model.reply = 10**9, list(range(60, 90)) * 300_000
    with stopping(model) as (port, stop):
        body = json.dumps({"model": "fake", "messages": USER, "stream": True, "max_tokens": 10**7}).encode()
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", port))
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                           b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        eventually(lambda: model.rounds > 100)
        time.sleep(1)  # until what lies between the two is full
        assert stop() < 8
        connection.close()
    assert "Traceback" not in capfd.readouterr().err + caplog.text


def test_a_stopped_queue_takes_nothing():
    queue = ModelQueue(1)
    queue.stop()
    queue.stop()
    with pytest.raises(QueueStoppedError, match=REASON):
        queue.submit(lambda: iter(()))
    queue.close(10)


@pytest.mark.parametrize("what", ["parse", "encode"])
def test_other_requests_are_answered_while_a_long_one_is_read(what, monkeypatch):
    model, reading, read = FakeModel("word"), threading.Event(), threading.Event()
    owner, name = (chat_protocol, "parse") if what == "parse" else (model, "encode")
    original = getattr(owner, name)

    def slow(argument):
        reading.set()
        assert read.wait(20)
        return original(argument)

    monkeypatch.setattr(owner, name, slow)
    with running(model) as (port, _):
        connection = begun(port)
        eventually(reading.is_set)
        assert health(port) == (0, 0)  # as long as this takes, the first one is not read
        read.set()
        assert json.loads(connection.getresponse().read())["choices"][0]["message"]["content"] == "word"


def test_clients_that_go_away_at_any_time_leave_nothing_behind(capfd, caplog):
    model = FakeModel("word " * 8)
    body = json.dumps({"model": "fake", "messages": USER}).encode()
    streamed = json.dumps({"model": "fake", "messages": USER, "stream": True}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    chunked = (b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
               b"Transfer-Encoding: chunked\r\n\r\n5\r\n{\"mod\r\n")
    with running(model, waiting=30) as (port, _):
        for sent in (b"", b"PO", head % 900, head % 900 + b"{", chunked, chunked + b"zz\r\n", head % len(body) + body,
                     head % len(streamed) + streamed, b"\x16\x03\x01\x00", b"GET / HTTP/9.9\r\n\r\n"):
            for _ in range(3):
                raw(port, sent).close()
        model.held = True
        for stream in (False, True, False, True):
            connection = begun(port, stream=stream)
            time.sleep(0.05)
            hang_up(connection)
        model.held = False
        model.allow.release(100)
        eventually(lambda: health(port) == (0, 0))
        answered = json.loads(begun(port).getresponse().read())
        assert answered["choices"][0]["message"]["content"] == "word " * 8
    assert "Traceback" not in capfd.readouterr().err + caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_of_the_model_is_in_the_log_once(stream, capfd, caplog):
    model = FakeModel("fine")
    model.failing = RuntimeError("a device fell off")
    with running(model) as (port, _):
        answer = begun(port, stream=stream).getresponse()
        last = events(answer)[-1] if stream else json.loads(answer.read())
        assert last["error"]["type"] == "server_error" and answer.status == (200 if stream else 500)
    assert (capfd.readouterr().err + caplog.text).count("RuntimeError: a device fell off") == 1


@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_ends_its_answers_when_it_is_stopped(number, status):
    source = ROOT / "tests" / "data" / "checkpoints" / "fp16"
    command = [sys.executable, "-m", "experiments.serve", f"--model={source}", "--method=baseline", "--port=0"]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    line = next(line for line in process.stderr if "http://" in line)
    port = int(line.rsplit(":", 1)[1].split("/")[0])
    fields = dict(model="fp16", stream=True, temperature=2, seed=1)
    answers = [begun(port, **fields).getresponse() for _ in range(3)]
    process.send_signal(number)
    for answer in answers:
        last = events(answer)[-1]
        assert last is None or last["error"]["message"] == REASON  # the first may have ended before
    assert last is not None
    _, err = process.communicate(timeout=30)
    assert process.returncode == status and "Traceback" not in err, err
