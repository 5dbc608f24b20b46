"""Spec-Bench's six tasks, decoded plainly and speculatively: python -m experiments.spec_bench

Without flags: the demo model on seven questions of the package's own. --question_file=published downloads the 480.
"""

from collections.abc import Sequence

from absl import flags as absl_flags

from experiments import benchmark_command, flags, questions
from experiments.benchmark import Benchmark
from experiments.published import Published
from specmq_jax import errors

absl_flags.adopt_module_key_flags(flags)
absl_flags.adopt_module_key_flags(benchmark_command)

_MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")


def task(category: str) -> str:
    """The task that a question's category belongs to: MT-Bench's categories are one."""
    return "mt_bench" if category in _MT_BENCH else category


BENCHMARK = Benchmark(
    name="spec_bench", sample=questions.SAMPLES / "spec_bench_small.jsonl",
    published=Published(name="spec_bench.jsonl", url="https://raw.githubusercontent.com/hemingkx/Spec-Bench/main/data/"
                                                     "spec_bench/question.jsonl",
                        sha256="4b6d33e79484f9841c487ee87d1cf6aa8c6066f61d5d482ff09e5a007fafdf04"), task=task)
"""arXiv:2401.07851."""


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark and reports."""
    benchmark_command.run(BENCHMARK, argv)


if __name__ == "__main__":
    errors.run(main)
