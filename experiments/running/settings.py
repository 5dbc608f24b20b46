"""What a run is asked for."""

import dataclasses
import pathlib

from experiments.benchmarks.benchmark import MT_BENCH, Benchmark
from experiments.inputs import questions
from experiments.inputs.questions import Question
from experiments.running import methods
from specmq_jax.decoding.sampling import Greedy, Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run is asked for. The flags' help explains the fields; those without comment bear the flags' names.

    Attributes:
      max_length: before the model's own limit is known.
      sampling: of temperature, top_k and top_p.
      reproducible: as in `specmq_jax.DecodeConfig`.
      answer_file: None puts each method's answers into `output_dir`.
      models: the target and what drafts for it.
      slots: questions that are answered side by side; more than one give a throughput, and no single-stream speeds.
      benchmark: what kind of questions they are, and how they are asked.
    """

    models: methods.Models
    methods: tuple[str, ...]
    question_file: pathlib.Path
    question_begin: int = 0
    question_end: int | None = None
    max_new_tokens: int
    max_length: int
    sampling: Greedy | Sampling = Greedy()
    seed: int = 0
    reproducible: bool = False
    output_dir: pathlib.Path
    answer_file: pathlib.Path | None = None
    resume: bool = True
    slots: int = 1
    benchmark: Benchmark = MT_BENCH

    def answers(self, method: str) -> pathlib.Path:
        """Where a method's answers go."""
        return self.answer_file or self.output_dir / f"{method}.jsonl"

    def questions(self) -> list[Question]:
        """The questions to be asked; errors as in `questions.load`."""
        return questions.load(self.question_file, self.question_begin, self.question_end, parse=self.benchmark.parse)
