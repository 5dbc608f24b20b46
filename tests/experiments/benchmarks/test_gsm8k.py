"""GSM8K: the prompt, the published rule for answers, its questions."""

import json
import pathlib
import re

import pytest

from checkpoints_tools.records import Record
from experiments.benchmarks import gsm8k, stop_strings
from experiments.inputs import questions
from specmq_jax.errors import UserError


@pytest.mark.parametrize(("text", "number"), [
    ("There are 15 - 6 = 9 trees. The answer is 9.", "9"),
    ("so 9. THE ANSWER IS 12", "12"),
    ("The answer is $1,234,567.", "1234567"),
    ("The answer is 12.50 dollars.", "12.50"),
    ("The answer is 12.0.", "12.0"),
    ("The answer is -5.", "-5"),
    ("The answer is about 3 apples and 4 pears.", "3"),
    ("The answer is 3. The answer is 4.", "3"),
    ("The answer is: **42**", "42"),
    ("The answer is 50%.", "50"),
    ("The answer is 3/4.", "3"),
    ("The answer is 6\n#### 7", "6"),
    ("The answer is unknown. Maybe 7.", "7"),
    ("The answer is unknown. The answer is 7.", None),
    ("First 3, then 4, which makes 7 apples.", "7"),
    ("7 apples at $2 each make $14.", "14"),
    ("2 + 2 = 4\n#### 1,004", "1004"),
    ("It costs 5.", "5"),
    ("5 - 3 = 2 and 3-5=-2", "-2"),
    ("10-8", "-8"),
    ("no number at all", None),
    ("", None),
])
def test_answers_are_parsed_by_the_published_rule(text, number):
    assert gsm8k.parse_answer(text) == number


@pytest.mark.parametrize(("text", "right"), [
    ("The answer is 1,200.", True), ("The answer is $1200", True), ("The answer is 1200.0.", False), ("1200", True),
    ("The answer is 120.", False), ("", False),
])
def test_only_the_references_very_number_is_right(text, right):
    question = question_of({"question": "How many?", "answer": "60*20 = <<60*20=1200>>1,200\n#### 1,200"})
    verdict = gsm8k.judge(question, text)
    assert verdict.right == right and verdict.detail.endswith("expected 1200")


def question_of(values):
    return gsm8k.parse_question(Record(place="f, line 1", index=4, values=values))


def test_a_question_is_known_by_its_place_and_keeps_its_reference():
    found = question_of({"question": "How cold?", "answer": "2-7 = -5\n#### -5"})
    assert found.id == 4 and found.category == "gsm8k" and found.turns == ("How cold?",)
    assert found.reference == {"number": "-5"}


@pytest.mark.parametrize(("values", "fault"), [
    ({"question": "How many?"}, "f, line 1: 'answer' is missing"),
    ({"question": "", "answer": "#### 1"}, "f, line 1: 'question' must be a text"),
    ({"question": "How many?", "answer": "seven"}, "f, line 1: 'answer' must be a text that ends in #### and a number"),
])
def test_a_malformed_question_is_named_with_its_fault(values, fault):
    with pytest.raises(UserError, match=fault):
        question_of(values)


def test_the_prompt_holds_eight_solved_examples_before_the_question():
    prompt = gsm8k.prompt("How many?")
    assert prompt.endswith("\n\nQ: How many?\nA:") and prompt.count("Q: ") == 9 and prompt.count("The answer is ") == 8
    for example in prompt.split("\n\n")[:-1]:
        thought, answer = re.fullmatch(r"Q: .*\nA: (.*) The answer is (.*)\.", example).groups()
        assert gsm8k.parse_answer(f"{thought} The answer is {answer}.") == answer
        assert gsm8k.parse_answer(thought) == answer  # each chain of thought comes to its answer
    assert prompt.startswith("Q: There are 15 trees in the grove.")


def test_the_model_is_stopped_where_it_asks_itself_the_next_question():
    said = " 6 * 7 = 42. The answer is 42.\n\nQ: What is 6 + 7?\nA: The answer is 13."
    assert stop_strings.cut(said, gsm8k.BENCHMARK.stop_strings).strip() == "6 * 7 = 42. The answer is 42."


def test_the_sample_is_in_the_published_format_and_comes_to_its_answers():
    found = questions.load(gsm8k.BENCHMARK.sample, parse=gsm8k.parse_question)
    assert len(found) == 6
    for line, question in zip(gsm8k.BENCHMARK.sample.read_text().splitlines(), found, strict=True):
        assert re.search(rf"= \$?{question.reference['number']}\b", json.loads(line)["answer"].split("####")[0])


@pytest.mark.shared
def test_every_published_question_is_read():
    pytest.importorskip("pyarrow", reason="pyarrow belongs to the extra train")
    path = pathlib.Path(__file__).parents[4] / "shared" / "data" / "gsm8k_test.parquet"
    found = questions.load(path, parse=gsm8k.parse_question)
    assert len(found) == 1319 and found[0].reference == {"number": "18"}
    assert all(gsm8k.judge(q, f"The answer is {q.reference['number']}.").right for q in found)
