"""GSM8K's word problems, answered by chain of thought behind eight examples."""

import json
import re
from collections.abc import Mapping, Sequence

import specmq_jax as sm
from checkpoints_tools.records import Record
from experiments.answers.scoring import Scorer, Verdict
from experiments.benchmarks.benchmark import Bench, Benchmark
from experiments.benchmarks.prompts import whole_text
from experiments.benchmarks.stop_strings import cut
from experiments.inputs import questions
from experiments.inputs.published import Published
from experiments.inputs.questions import Question

_EXAMPLES = questions.SAMPLES / "gsm8k_examples.jsonl"
"""Questions, chains of thought and answers from the appendix of Wei et al. (arXiv:2201.11903)."""
_STOP = ("\nQ:",)
_TRIGGER = "the answer is"
_NUMBER = re.compile(r"-?\d+\.?\d*")
_REFERENCE = re.compile(r"####\s*(-?[\d.,]*\d)")


def prompt(question: str) -> str:
    """The eight examples and the question, as SpecMQuant's evaluation (https://github.com/AI9Stars/SpecMQuant) asks it."""
    solved = map(json.loads, _EXAMPLES.read_text(encoding="utf-8").splitlines())
    examples = "".join("Q: {question}\nA: {thought} The answer is {answer}.\n\n".format(**example) for example in solved)
    return f"{examples}Q: {question}\nA:"


def parse_answer(text: str) -> str | None:
    """The number that an answer gives, by SpecMQuant's rule; None where there is none.

    After the first "the answer is", in whatever case, up to the next one, the first number counts; without it the last number
    of the text. Commas are dropped before, a full stop behind the number after. Numbers are compared as texts, so that 12.0
    is not 12.
    """
    before, *after = text.lower().split(_TRIGGER)
    numbers = _NUMBER.findall((after[0] if after else before).replace(",", ""))
    return numbers[0 if after else -1].removesuffix(".") if numbers else None


def parse_question(record: Record) -> Question:
    """A problem in GSM8K's format, `question` and `answer`, whose last line is "#### NUMBER"; its id is its place in the file.

    Raises:
      UserError: one of the two is missing or of another form.
    """
    found = _REFERENCE.search(record.text("answer"))
    record.field("answer", "a text that ends in #### and a number", found is not None)
    return Question(id=record.index, category="gsm8k", turns=(record.text("question"),),
                    reference={"number": found[1].replace(",", "")})


def judge(question: Question, text: str) -> Verdict:
    """Right is the reference's very number."""
    found, expected = parse_answer(text), question.reference["number"]
    return Verdict(right=found == expected, detail=f"{found or 'no number'}, expected {expected}")


def _encode(bench: Bench, messages: Sequence[Mapping[str, str]]) -> list[int]:
    return bench.tokenizer.encode(prompt(messages[-1]["content"]))


def _text(bench: Bench, generation: sm.Generation) -> str:
    return cut(whole_text(bench, generation), _STOP).strip()


BENCHMARK = Benchmark(
    name="gsm8k", sample=questions.SAMPLES / "gsm8k_small.jsonl",
    published=Published(name="gsm8k.jsonl", url="https://raw.githubusercontent.com/openai/grade-school-math/master/"
                                                "grade_school_math/data/test.jsonl",
                        sha256="3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"),
    parse=parse_question, encode=_encode, text=_text, stop_strings=_STOP, max_new_tokens=256, max_length=2048,
    scorer=Scorer(metric="accuracy", judge=judge))
"""arXiv:2110.14168, asked without a chat template; an answer ends where the model goes on to a next question."""
