"""HumanEval's functions, asked for as evalplus asks chat models."""

from collections.abc import Mapping, Sequence

from absl import flags as absl_flags

from checkpoints_tools.records import Record
from experiments.answers.scoring import Scorer, Verdict
from experiments.benchmarks import code_answers
from experiments.benchmarks.benchmark import Bench, Benchmark
from experiments.benchmarks.prompts import encode_begun, whole_text
from experiments.inputs import questions
from experiments.inputs.published import Published
from experiments.inputs.questions import Question
from experiments.sandbox import code_execution
from experiments.sandbox.code_execution import Limits

_ALLOW_CODE_EXECUTION = absl_flags.DEFINE_bool(
    "allow_code_execution", False, "Run the programs that the model writes, for pass@1: each in a process of its own for 3 "
    "seconds at most, in 1 GiB, without network, other processes or any file but Python's own. Needs Linux.")
_ALLOW_FILE_READING = absl_flags.DEFINE_bool(
    "allow_file_reading", False, "Run programs also where the kernel can't keep them from reading files (it lacks Landlock).")

_INSTRUCTION = "Please provide a self-contained Python script that solves the following problem in a markdown code block:"
_BEGUN = "Below is a Python script with a self-contained function that solves the problem and passes corresponding tests:"


def parse_question(record: Record) -> Question:
    """A function in HumanEval's format: task_id, prompt, entry_point and test.

    Raises:
      UserError: one of the four is missing or no text.
    """
    fields = {key: record.text(key) for key in ("prompt", "entry_point", "test")}
    return Question(id=record.text("task_id"), category="humaneval", turns=(fields["prompt"],), reference=fields)


def program(question: Question, answer: str) -> str:
    """The prompt, what the answer defines and the tests, in HumanEval's order (arXiv:2107.03374).

    The prompt's imports and helpers are there for answers that leave them out; a function defined again replaces its
    beginning.
    """
    prompt, entry_point, test = (question.reference[key] for key in ("prompt", "entry_point", "test"))
    return f"{prompt}{code_answers.solution(answer, entry_point, prompt)}\n{test}\ncheck({entry_point})\n"


def _encode(bench: Bench, messages: Sequence[Mapping[str, str]]) -> list[int]:
    prompt = messages[-1]["content"]
    if not bench.tokenizer.chat_template:  # a base model goes on with the function itself
        return bench.tokenizer.encode(prompt)
    content = f"{_INSTRUCTION}\n```\n{prompt.strip()}\n```\n"
    return encode_begun(bench.tokenizer, [{"role": "user", "content": content}], f"{_BEGUN}\n```python\n")


def _limits() -> Limits:
    return Limits(read_restricted=not _ALLOW_FILE_READING.value)


def _judge(question: Question, answer: str) -> Verdict:
    outcome = code_execution.run(program(question, answer), _limits())
    return Verdict(right=outcome.passed, detail=outcome.detail or "passed")


def _obstacle() -> str | None:
    if not _ALLOW_CODE_EXECUTION.value:
        return "pass@1 needs the model's programs to be run, which --allow_code_execution allows"
    code_execution.check(_limits())
    return None


BENCHMARK = Benchmark(
    name="human_eval", sample=questions.SAMPLES / "human_eval_small.jsonl",
    published=Published(name="human_eval.jsonl.gz",
                        url="https://raw.githubusercontent.com/openai/human-eval/master/data/HumanEval.jsonl.gz",
                        sha256="b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef"),
    parse=parse_question, encode=_encode, text=whole_text, max_new_tokens=512,
    scorer=Scorer(metric="pass@1", judge=_judge, obstacle=_obstacle))
