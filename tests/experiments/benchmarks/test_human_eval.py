"""HumanEval: the prompt, what is taken from an answer, and pass@1 of saved answers."""

import gzip
import json
import pathlib
import types

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from typed import command, fails_with

from checkpoints_tools.records import Record
from experiments.benchmarks import code_answers, human_eval
from experiments.inputs import questions
from experiments.sandbox import code_execution
from experiments.sandbox.code_execution import Limits
from specmq_jax.errors import UserError

PROMPT = 'from typing import List\n\n\ndef double(values: List[int]) -> List[int]:\n    """ Double each value. """\n'
GOOD = "def double(values):\n    return [2 * v for v in values]\n"
TEST = "def check(candidate):\n    assert candidate([1, 2]) == [2, 4]\n    assert candidate([]) == []\n"
SAMPLE = human_eval.BENCHMARK.sample


def question(prompt=PROMPT, entry_point="double", test=TEST):
    values = {"task_id": "Test/0", "prompt": prompt, "entry_point": entry_point, "test": test}
    return human_eval.parse_question(Record(place="f, line 1", index=0, values=values))


def passes(answer, **changes):
    return code_execution.run(human_eval.program(question(**changes), answer), Limits(seconds=2)).passed


@pytest.mark.parametrize("answer", [
    GOOD,
    f"{GOOD}```\nIt doubles each value.",
    f"{GOOD}\n```\n\nUsage:\n\n```python\nprint(double([1]))\nprint(double([2]))\nprint(double([3]))\n```\n",
    f"Here is the function:\n```python\n{GOOD}```\n",
    f"Sure! Let's do it.\n\n{GOOD}\nHope this helps, it's simple.",
    "def double(values: List[int]) -> List[int]:\n    return [2 * v for v in values]\n",
    "from typing import List\n\ndef double(values: List[int]) -> List[int]:\n    return [2 * v for v in values]\n",
    "import math\n\ndef _twice(v):\n    return math.prod((2, v))\n\ndef double(values):\n"
    "    return [_twice(v) for v in values]\n",
    "FACTOR = 2\n\nclass Doubler:\n    def of(self, v):\n        return FACTOR * v\n\ndef double(values):\n"
    "    return list(map(Doubler().of, values))\n",
    "def double(values):\n\treturn [2 * v for v in values]\n",
    "    return [2 * v for v in values]\n",
    "    result = []\n    for v in values:\n        result.append(2 * v)\n    return result\n\nThe function doubles.",
    f"{GOOD}\nif __name__ == '__main__':\n    raise SystemExit(1)\n",
    f"{GOOD}\ndef main():\n    double(None)\n\nmain()\n",
    f"{GOOD}\nprint(double(undefined))\n",
    f"{GOOD}\nassert double([1]) == [3]\n",
    f"{GOOD}</s> and more",
    f"from __future__ import annotations\n{GOOD}",
    "import functools\n\n@functools.lru_cache\ndef twice(v):\n    return 2 * v\n\ndef double(values):\n"
    "    return [twice(v) for v in values]\n",
])
def test_the_program_is_found_in_the_answer(answer):
    assert passes(answer)


@pytest.mark.parametrize("answer", [
    "", "I can't do that.", "def double(values):\n    return values\n",
    "def double(values):\n    print([2 * v for v in values])\n",
    "def triple(values):\n    return [2 * v for v in values]\n", "return [2 * v for v in values]\n", "def double(values:\n",
    "Here it is:\n```\ndef double(values):\n    return [2 * v for v in values]\n```\n",
    "import os\nos._exit(0)\n", "def double(values):\n    while True: pass\n    return values\n", "double = None\n\x00\n",
    f"class double:\n    pass\n{GOOD}",
])
def test_a_wrong_or_missing_function_does_not_pass(answer):
    assert not passes(answer)


def test_only_imports_and_what_the_function_refers_to_is_kept():
    answer = ("import math\nfrom os import path\nlimit: int = 3\nunused = print('run')\nraise SystemExit\n\n"
              "def helper(v):\n    return limit * v\n\ndef other():\n    return 1\n\ndef f(v):\n    return helper(v)\n\n"
              "def f(v):\n    return 0\n")
    assert code_answers.solution(answer, "f", "") == (
        "import math\nfrom os import path\nlimit: int = 3\ndef helper(v):\n    return limit * v\n"
        "def f(v):\n    return helper(v)")


def test_the_longest_span_that_is_python_counts():
    short, long = "def f():\n    return 1", "def f():\n    a = 1\n    return a"
    assert code_answers.solution(f"{short}\nor else, better:\n{long}\nthat's it", "f", "") == long


@pytest.mark.parametrize("key", ["task_id", "prompt", "entry_point", "test"])
def test_a_malformed_question_is_named_with_its_fault(key):
    values = {"task_id": "t", "prompt": "p", "entry_point": "e", "test": "t", key: None}
    with pytest.raises(UserError, match=f"f, line 1: '{key}' must be a text"):
        human_eval.parse_question(Record(place="f, line 1", index=0, values=values))


@pytest.fixture
def tokenizer():
    """Adds a beginning of text of its own, as Llama 3's does, whose template writes one too; templates trim."""
    vocabulary = {character: i for i, character in enumerate(["<bos>", "<unk>", *map(chr, range(32, 127)), "\n"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    template = ("{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}[end]{% endfor %}"
                "{% if add_generation_prompt %}[assistant]{% endif %}")
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", unk_token="<unk>", chat_template=template)


def spelled(tokenizer, ids):
    return "".join(tokenizer.convert_ids_to_tokens(ids))


def encoded(tokenizer, prompt):
    bench = types.SimpleNamespace(tokenizer=tokenizer)
    return spelled(tokenizer, human_eval.BENCHMARK.encode(bench, [{"role": "user", "content": prompt}]))


def test_the_prompt_asks_in_a_chat_and_begins_the_answer_with_one_beginning_of_text(tokenizer):
    assert encoded(tokenizer, "\ndef f():\n    pass\n") == (
        "<bos>[user]Please provide a self-contained Python script that solves the following problem in a markdown code block:"
        "\n```\ndef f():\n    pass\n```[end][assistant]Below is a Python script with a self-contained function that solves the "
        "problem and passes corresponding tests:\n```python\n")


def test_a_model_without_a_template_goes_on_with_the_function_itself(tokenizer):
    tokenizer.chat_template = None
    assert encoded(tokenizer, "def f():\n") == "<bos>def f():\n"


def test_a_template_that_drops_the_begun_answer_is_an_error(tokenizer):
    tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match="leaves out the beginning of the assistant's turn"):
        encoded(tokenizer, "def f():\n")


def answers_of(path, solve):
    """An answer file to the questions of `path`, each answered by what `solve` makes of its record."""
    opened = gzip.open(path, "rt") if path.suffix == ".gz" else path.open()
    with opened as file:
        for line in file:
            record = json.loads(line)
            choice = {"turns": [solve(record)], "new_tokens": [1], "wall_time": [1.0], "accept_lengths": [1]}
            yield json.dumps({"question_id": record["task_id"], "category": "humaneval", "model_id": "m", "choices": [choice]})


def canonical(record):
    return record["canonical_solution"]


def broken(record):
    del record
    return "    raise NotImplementedError\n"


@pytest.mark.parametrize(("solve", "share"), [(canonical, 1.0), (broken, 0.0)])
def test_a_file_of_known_solutions_scores_one_and_a_broken_one_nothing(tmp_path, solve, share):
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(answers_of(SAMPLE, solve)) + "\n")
    result = command("human_eval", f"--score={path}", "--allow_code_execution")
    assert result.returncode == 0, result.stderr
    right = round(4 * share)
    assert f"pass@1 {share:.1%}, {right} of 4 answers right; 4 of 4 questions answered" in result.stdout
    (scores,) = json.loads((tmp_path / "answers.scores.json").read_text())
    assert scores["share"] == share and [verdict["right"] for verdict in scores["verdicts"]] == 4 * [share == 1]


def test_without_leave_no_program_is_run(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(answers_of(SAMPLE, canonical)) + "\n")
    fails_with(command("human_eval", f"--score={path}"), "which --allow_code_execution allows", "nothing was scored")
    assert not (tmp_path / "answers.scores.json").exists()


@pytest.mark.shared
@pytest.mark.parametrize(("solve", "right"), [(canonical, 164), (broken, 0)])
def test_every_published_question_is_judged(solve, right):
    path = pathlib.Path(__file__).parents[4] / "shared" / "data" / "HumanEval.jsonl.gz"
    asked = {q.id: q for q in questions.load(path, parse=human_eval.parse_question)}
    assert len(asked) == 164
    found = [json.loads(line) for line in answers_of(path, solve)]
    programs = [human_eval.program(asked[answer["question_id"]], answer["choices"][0]["turns"][0]) for answer in found]
    assert sum(code_execution.run(program, Limits()).passed for program in programs) == right
