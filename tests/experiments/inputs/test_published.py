"""Downloading published questions, from a server on this machine."""

import hashlib
import http.server
import threading

import pytest

from experiments.inputs.published import Published
from specmq_jax.errors import UserError

CONTENT = b'{"question_id": 1, "category": "c", "turns": ["a"]}\n'


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Its address; it counts what it was asked for."""
    monkeypatch.setenv("SPECMQ_CACHE", str(tmp_path))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked.append(self.path)
            self.send_response(200 if self.path == "/file" else 404)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT if self.path == "/file" else b"x" * len(CONTENT))

        def log_message(self, format, *arguments):
            del format, arguments

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def published(server, path="/file", sha256=None):
    return Published(name="questions.jsonl", url=f"http://127.0.0.1:{server.server_port}{path}", sha256=sha256)


def test_a_file_is_downloaded_once(server):
    source = published(server, sha256=hashlib.sha256(CONTENT).hexdigest())
    assert source.fetch().read_bytes() == CONTENT == source.fetch().read_bytes()
    assert server.asked == ["/file"]
    assert [path.name for path in source.fetch().parent.iterdir()] == ["questions.jsonl"]


def test_another_file_than_expected_is_not_kept(server, tmp_path):
    with pytest.raises(UserError, match="not the expected file: its SHA-256 is .*--question_file=FILE"):
        published(server, sha256="0" * 64).fetch()
    assert not (tmp_path / "questions").exists()


def test_a_missing_file_and_no_network_are_one_line(server):
    with pytest.raises(UserError, match=r"can't be downloaded \(Not Found\); without a network"):
        published(server, "/other").fetch()
    with pytest.raises(UserError, match="can't be downloaded") as error:
        Published(name="q", url="http://127.0.0.1:9/file").fetch()
    assert "\n" not in str(error.value)
