"""A file that ranks a vocabulary: what is wrong with it is one line that names the file."""

import json

import pytest
from fuzzing import lengths, searching
from hypothesis import given
from hypothesis import strategies as st

from checkpoints_tools.rank_vocabulary import texts
from specmq_jax.decoding.drafters.vocabulary import FORMAT, read_ranking
from specmq_jax.errors import UserError

PLAIN = {"format": FORMAT, "vocab_size": 5, "token_ids": [3, 0, 4]}


def test_a_ranking_is_read(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(PLAIN))
    ids, size = read_ranking(tmp_path / "x.json")
    assert ids.tolist() == [3, 0, 4] and size == 5


@pytest.mark.parametrize(("key", "values", "part"), [
    ("format", [None, "x", 1, [FORMAT], {}], "is no ranked vocabulary"),
    ("vocab_size", [None, "5", 5.0, True, 0, -5, [5], 10**30], "needs a positive integer 'vocab_size'"),
    ("token_ids", [None, "304", 3, {}], "needs a list of integers 'token_ids'"),
    ("token_ids", [["3"], [3.0], [True], [None], [[3]], [-1], [10**30]], "needs a non-negative integer 'token_ids'"),
    ("token_ids", [[], [3, 3], [5], [0, 2**31 - 1]], "must rank distinct token ids below 5"),
])
def test_an_entry_of_another_kind(tmp_path, key, values, part):
    for value in values:
        (tmp_path / "x.json").write_text(json.dumps(PLAIN | {key: value}))
        with pytest.raises(UserError) as caught:
            read_ranking(tmp_path / "x.json")
        assert part in str(caught.value) and "x.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["vocab_size", "token_ids"])
def test_a_missing_entry(tmp_path, key):
    (tmp_path / "x.json").write_text(json.dumps({name: value for name, value in PLAIN.items() if name != key}))
    with pytest.raises(UserError, match=f"'{key}'; found None"):
        read_ranking(tmp_path / "x.json")


@pytest.mark.parametrize("line", ["[" * 100_000, '{"x":' + "9" * 5000 + "}", "[" * 900 + '"a"' + "]" * 900, "{", "{} x"])
def test_a_line_of_json_that_can_not_be_ranked(tmp_path, line):
    (tmp_path / "x.jsonl").write_text('{"x": "a"}\n' + line + "\n")
    try:
        assert list(texts(tmp_path / "x.jsonl")) == ["a", "a"]
    except UserError as error:
        assert "x.jsonl, line 2: not JSON" in str(error) and "\n" not in str(error)


ODD = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers(0, 9) | st.none(), max_size=4)


@lengths
def test_any_ranking_is_read_or_refused_in_one_line(tmp_path, examples):
    @searching(examples)
    @given(st.dictionaries(st.sampled_from(["vocab_size", "token_ids"]), ODD))
    def search(changes):
        (tmp_path / "x.json").write_text(json.dumps(PLAIN | changes))
        try:
            ids, size = read_ranking(tmp_path / "x.json")
        except UserError as error:
            assert "\n" not in str(error)
            return
        assert len(set(ids.tolist())) == len(ids) > 0 and 0 <= ids.min() and ids.max() < size

    search()
