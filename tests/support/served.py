"""A server for a model that says what it is told to, and what clients of it do."""

import contextlib
import http.client
import json
import threading
import time

from byte_tokens import END, answer_text, ids

from experiments import serve
from experiments.serving import http_server
from experiments.serving.model_queue import ModelQueue

USER = [{"role": "user", "content": "Say something."}]


class FakeModel:
    """Says `reply`, three bytes a round; while `held`, each round waits for `allow`; one with `failing` raises that."""

    name, fingerprint, max_length, temperature, top_p, top_k = "fake", "fake-1", 64, 0.25, 1.0, 0

    def __init__(self, reply):
        self.reply, self.keys, self.rounds, self.ended, self.failing = ids(reply) + [END], [], 0, 0, None
        self.held, self.allow = False, threading.Semaphore(0)

    def encode(self, messages):
        return ids("".join(message["content"] for message in messages))

    def answer_text(self, stop_strings):
        return answer_text(stop_strings)

    def stream(self, prompt, max_new_tokens, key):
        self.keys.append(key)
        tokens = self.reply[:max_new_tokens or 64 - len(prompt)]
        try:
            for start in (0, *range(1, len(tokens), 3)):
                if self.held:
                    self.allow.acquire()
                if self.failing:
                    raise self.failing
                self.rounds += 1
                yield tokens[start:start + (3 if start else 1)]
        finally:
            self.ended += 1


@contextlib.contextmanager
def running(model, waiting=1):
    """The port of a server for the model, and what it logged."""
    log, queue = [], ModelQueue(waiting)
    server = http_server.uvicorn_server(model, queue, log.append)
    with serve.listen("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield listening.getsockname()[1], log
        finally:
            model.held = False
            model.allow.release(1000)
            server.should_exit = True
            thread.join()
            queue.close()


def eventually(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def hang_up(connection):
    connection.sock.close()


def begun(port, **fields):
    """A connection over which an answer has been asked for."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("POST", "/v1/chat/completions", json.dumps({"model": "fake", "messages": USER} | fields),
                       {"Content-Type": "application/json"})
    return connection


def health(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", "/health")
    found = json.loads(connection.getresponse().read())
    assert found["status"] == "ok"
    return found["answering"], found["waiting"]
