"""What tells one benchmark from another: its questions, its prompts, where answers end and what they are scored by."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import specmq_jax as sm
from experiments.answers.scoring import Scorer
from experiments.inputs import questions
from experiments.inputs.published import Published
from experiments.inputs.questions import Parse

_TITLES = {"mt_bench": "MT-Bench", "spec_bench": "Spec-Bench", "gsm8k": "GSM8K", "human_eval": "HumanEval"}
PUBLISHED = "published"
"""What stands for the published questions where a question file can be named."""


class Bench(Protocol):
    """The part of `methods.Workbench` that benchmarks and the runner use."""

    max_length: int
    precision: str
    tokenizer: Any

    def encode(self, messages: Sequence[Mapping[str, str]]) -> list[int]: ...

    def text(self, token_ids: Sequence[int]) -> str: ...

    def decoder(self, method: str) -> sm.Decoder: ...


def _chat(bench: Bench, messages: Sequence[Mapping[str, str]]) -> list[int]:
    return bench.encode(messages)


def _answer(bench: Bench, generation: sm.Generation) -> str:
    return bench.text(generation.tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark, run by `runner` like all others.

    Attributes:
      name: begins the name of the default output directory.
      sample: a few questions of the package's own, in the published format.
      published: where all of them are.
      parse: reads one question.
      encode: a dialogue's token ids, up to where the model answers.
      text: the answer as it is kept, which later turns hold and a scorer reads.
      stop_strings: an answer ends before the first of these.
      max_new_tokens: tokens a turn at most, where no flag says; None suits the device.
      max_length: tokens that the cache holds at least, where no flag says.
      task: the task that a category belongs to, for speeds by task; None reports none.
      scorer: judges answers; None where only speed is measured.
    """

    name: str
    sample: pathlib.Path
    published: Published
    parse: Parse = questions.dialogue
    encode: Callable[[Bench, Sequence[Mapping[str, str]]], list[int]] = _chat
    text: Callable[[Bench, sm.Generation], str] = _answer
    stop_strings: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    max_length: int = 0
    task: Callable[[str], str] | None = None
    scorer: Scorer | None = None

    @property
    def title(self) -> str:
        """What its authors call it."""
        return _TITLES.get(self.name, self.name)

    def question_file(self, named: str | None) -> pathlib.Path:
        """The file that a flag names: a path, "published", or None for the sample.

        Raises:
          UserError: the published questions can't be downloaded.
        """
        return self.published.fetch() if named == PUBLISHED else pathlib.Path(named) if named else self.sample


MT_BENCH = Benchmark(
    name="mt_bench", sample=questions.SMALL, published=Published(
        name="mt_bench.jsonl", url="https://huggingface.co/spaces/lmsys/mt-bench/resolve/main/data/mt_bench/question.jsonl",
        sha256="119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7"))
"""Two-turn dialogues in eight categories (arXiv:2306.05685)."""
