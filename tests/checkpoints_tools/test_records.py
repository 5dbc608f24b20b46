"""The file formats that questions come in."""

import gzip
import json
import sys

import pytest
from fuzzing import lengths, searching
from hypothesis import given
from hypothesis import strategies as st

from checkpoints_tools import records
from experiments.inputs import questions
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
    (gzip.compress(b"{}\n{\n", mtime=0), "line 2: it is not valid JSON"),
])
def test_an_unreadable_file_is_an_error_in_one_line(tmp_path, content, fault):
    path = tmp_path / "questions"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=fault) as error:
        read(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize(("line", "fault"), [
    (b'{"a": "smile \\ud83d"}', r"a holds '\\ud83d', half of a surrogate pair"),
    (b'{"a": {"\\udcff": 1}}', r"\\udcff', half of a surrogate pair"),
    (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep"),
    (b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}", None),
    (b'{"a": ' + b"9" * 5000 + b"}", "is too large an integer: it has 5000 digits"),
    (b'{"a": "\\ud83d\\ude00"}', None),
])
def test_what_json_allows_and_no_file_holds_names_its_line(tmp_path, line, fault):
    path = tmp_path / "questions"
    path.write_bytes(b'{"a": 1}\n' + line + b"\n")
    if fault is None:
        assert len(read(path)) == 2
        return
    with pytest.raises(UserError, match=f"{path}, line 2: .*{fault}") as error:
        read(path)
    assert "\n" not in str(error.value)


PIECES = st.sampled_from([
    b'{"question_id": 1, "category": "a", "turns": ["b"]}', b"\n", b"\r\n", b"\x00", b"\xef\xbb\xbf", b"\xff", b"PAR1",
    b"\x1f\x8b", b"[" * 3000, b"9" * 5000, b'"\\ud83d"', b'{"question_id": 1e999}', b"{", b"}", b"NaN", b",", b":", b'"', b"[]",
    LINES, gzip.compress(LINES, mtime=0)]) | st.binary(max_size=20)


@lengths
def test_any_bytes_are_questions_or_a_mistake_in_one_line(tmp_path, examples):
    path = tmp_path / "questions"

    @searching(examples)
    @given(st.lists(PIECES, max_size=8).map(b"".join), st.booleans())
    def check(content, packed):
        path.write_bytes(gzip.compress(content, mtime=0) if packed else content)
        try:
            found = questions.load(path)
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error)
        else:
            assert found and all(question.turns for question in found)

    check()


@lengths
def test_a_mutated_file_is_read_or_a_mistake_in_one_line(tmp_path, examples):
    path = tmp_path / "questions"
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow belongs to the extra train")
    from pyarrow import parquet
    row = {"question_id": 1, "category": "math", "turns": ["a", "b"]}
    parquet.write_table(pyarrow.Table.from_pylist([row, row | {"question_id": 2}]), path)
    line = json.dumps(row).encode() + b"\n"
    originals = [path.read_bytes(), line, gzip.compress(line, mtime=0)]

    @searching(examples)
    @given(st.sampled_from(originals), st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4),
           st.integers(0, 10_000))
    def check(content, changes, end):
        mutated = bytearray(content)
        for place, value in changes:
            mutated[place % len(mutated)] = value
        path.write_bytes(mutated[:end])
        try:
            questions.load(path)
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error)

    check()
