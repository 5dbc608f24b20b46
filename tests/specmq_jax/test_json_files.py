"""Whatever is wrong with a JSON file is one line that names the file."""

import json

import pytest
from fuzzing import lengths, searching
from hypothesis import given
from hypothesis import strategies as st

from specmq_jax.errors import UserError
from specmq_jax.json_files import parse_json, read_json


@pytest.mark.parametrize(("content", "part"), [
    (b"", "is not valid JSON"), (b"{", "is not valid JSON"), (b'{"a": 1,}', "is not valid JSON"),
    (b'{"a": 1} x', "Extra data"), (b"\xff\xfe{}", "utf-8"), (b'{"a": "\xe9"}', "utf-8"),
    (b'\xef\xbb\xbf{"a": 1}', "byte order mark"), (b"[" * 100_000, "nested too deeply"),
    (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"), (b'{"a":' * 100_000, "nested too deeply"),
    (b'{"a": ' + b"9" * 5000 + b"}", "is too large an integer: it has 5000 digits"),
    (b'{"a": -' + b"9" * 5000 + b"}", "is too large an integer: it has 5000 digits"),
    (b'{"a": NaN}', "NaN"), (b'{"a": [Infinity]}', "Infinity"), (b'{"a": -Infinity}', "-Infinity"),
    (b'{"a": 1e999}', "1e999 is too large"), (b'{"a": -1e999}', "-1e999 is too large"),
    (b'{"a": 1, "a": 2}', "'a' is given twice"), (b'{"b": {"a": 1, "c": 0, "a": null}}', "'a' is given twice"),
    (rb'{"a": "\ud800"}', r"\ud800"), (rb'{"a": ["x", {"b": "\uDC00y"}]}', r"\udc00"), (rb'{"\udfff": 1}', r"\udfff"),
    (rb'{"a": "\udc00\ud800"}', r"\udc00"), (b"[1]", "must hold a JSON object; found a list"), (b"null", "NoneType"),
    (b'"a"', "found a str"),
])
def test_a_malformed_file(tmp_path, content, part):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_json(file)
    message = str(caught.value)
    assert message.startswith(str(file)) and part in message and "\n" not in message and len(message) < 300


def test_a_file_that_is_not_there_or_none(tmp_path):
    with pytest.raises(UserError, match="config.json does not exist"):
        read_json(tmp_path / "config.json")
    with pytest.raises(UserError, match="can't be read: Is a directory"):
        read_json(tmp_path)


def test_what_json_allows_is_read(tmp_path):
    text = r'{"pair": "\ud83d\ude00", "n": 1, "n": 1, "big": ' + "9" * 4000 + ', "small": 1e-400, "deep": ' + "[" * 50 + (
        "]" * 50 + "}")
    (tmp_path / "x.json").write_text(text)
    found = read_json(tmp_path / "x.json")
    assert found["pair"] == "😀" and found["n"] == 1 and found["big"] == 10**4000 - 1 and found["small"] == 0.0


VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False,
                                                                                        allow_infinity=False),
                      lambda part: st.lists(part, max_size=4) | st.dictionaries(st.text(), part, max_size=4), max_leaves=20)


@lengths
def test_a_mutated_text_is_parsed_or_refused_in_one_line(examples):
    @searching(examples)
    @given(VALUES, st.text(max_size=4) | st.sampled_from(["\\ud800", "NaN", "\ufeff", "{", "]", '"', "\\", "\n", "9" * 5000]),
           st.floats(0, 1), st.booleans())
    def search(value, piece, place, ascii_only):
        text = json.dumps(value, ensure_ascii=ascii_only)
        assert parse_json(text, "x") == value
        at = int(place * len(text))
        try:
            parse_json(text[:at] + piece + text[at:], "x")
        except UserError as error:
            assert str(error).startswith("x is not valid JSON: ") and "\n" not in str(error)

    search()
