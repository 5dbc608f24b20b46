"""The file formats that questions come in."""

import gzip
import json
import sys

import pytest

from experiments import records
from specmq_jax.errors import UserError

ROWS = [{"question": "How many?", "answer": "#### 2"}, {"question": "Ωhm?", "answer": "#### 3"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def read(path):
    return [(record.index, dict(record.values)) for record in records.read(path)]


@pytest.mark.parametrize("content", [
    LINES, gzip.compress(LINES, mtime=0), b"\xef\xbb\xbf" + LINES, LINES.replace(b"\n", b"\n\n")])
def test_json_lines_plain_and_packed(tmp_path, content):
    path = tmp_path / "questions"
    path.write_bytes(content)
    assert read(path) == list(enumerate(ROWS))


def test_parquet_and_a_damaged_one(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow belongs to the extra train")
    from pyarrow import parquet
    path = tmp_path / "questions"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert read(path) == list(enumerate(ROWS))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match="damaged parquet file"):
        read(path)


def test_without_pyarrow_a_parquet_file_says_what_to_install(tmp_path, monkeypatch):
    path = tmp_path / "questions"
    path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="needs PyArrow; pip install pyarrow"):
        read(path)


@pytest.mark.parametrize(("content", "fault"), [
    (None, "does not exist"), (gzip.compress(LINES, mtime=0)[:-20], "damaged gzip file"), (b"\xff", "not UTF-8"),
    (gzip.compress(b"\xff", mtime=0), "not UTF-8"), (b"{}\n[]\n", "line 2: expected a JSON object; found a list"),
    (gzip.compress(b"{}\n{\n", mtime=0), "line 2: not valid JSON"),
])
def test_an_unreadable_file_is_an_error_in_one_line(tmp_path, content, fault):
    path = tmp_path / "questions"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=fault) as error:
        read(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
