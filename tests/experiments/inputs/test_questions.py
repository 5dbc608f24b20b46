"""Question files: what is read, and which line an error names."""

import json

import pytest

from experiments.inputs import questions
from specmq_jax.errors import UserError

GOOD = '{"question_id": 1, "category": "math", "turns": ["a", "b"]}'


def test_the_packages_questions_cover_mt_benchs_categories_with_two_turns_each():
    found = questions.load(questions.SMALL)
    assert {q.category for q in found} == {"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem",
                                           "humanities"}
    assert all(len(q.turns) == 2 for q in found)


def test_a_range_is_cut_out_and_further_keys_and_empty_lines_are_ignored(tmp_path):
    path = tmp_path / "q.jsonl"
    lines = [json.dumps({"question_id": i, "category": "c", "turns": [f"ask\u2028{i}"], "reference": []},
                        ensure_ascii=False) for i in range(5)]
    path.write_text("\n\n".join(lines))
    assert [q.turns for q in questions.load(path, 1, 3)] == [("ask\u20281",), ("ask\u20282",)]


@pytest.mark.parametrize(("line", "fault"), [
    ("{'question_id': 1}", "it is not valid JSON"),
    ("[1, 2]", "expected a JSON object; found a list"),
    ('{"category": "math", "turns": ["a"]}', "'question_id' is missing"),
    ('{"question_id": true, "category": "math", "turns": ["a"]}', "'question_id' must be a number or a text; found true"),
    ('{"question_id": 2, "category": "", "turns": ["a"]}', "'category' must be a text"),
    ('{"question_id": 2, "category": "math", "turns": "a"}', "'turns' must be a list of at least one text; found \"a\""),
    ('{"question_id": 2, "category": "math", "turns": []}', "'turns' must be a list"),
    ('{"question_id": 2, "category": "math", "turns": ["a", " "]}', "'turns' must be a list"),
    (GOOD, "question_id 1 was already used in line 1"),
])
def test_a_malformed_line_is_named_with_its_fault(tmp_path, line, fault):
    path = tmp_path / "q.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(UserError) as error:
        questions.load(path)
    assert f"{path}, line 3: {fault}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("begin", "end", "fault"), [
    (0, 2, "--question_end=2 lies past the 1 question of"), (1, None, "leave no question"), (1, 1, "leave no question"),
    (-1, 1, "leave no question"),
])
def test_a_range_outside_the_file_is_an_error(tmp_path, begin, end, fault):
    path = tmp_path / "q.jsonl"
    path.write_text(GOOD)
    with pytest.raises(UserError, match=fault):
        questions.load(path, begin, end)


@pytest.mark.parametrize(("content", "fault"), [
    (None, "does not exist"), (b"\n \n", "holds no questions"), (b'{"question_id": \xff', "not UTF-8"),
])
def test_an_unreadable_file_is_an_error(tmp_path, content, fault):
    path = tmp_path / "q.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=fault):
        questions.load(path)
