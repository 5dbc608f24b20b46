"""Spec-Bench's six tasks, decoded plainly and speculatively."""



from experiments.benchmarks.benchmark import Benchmark
from experiments.inputs import questions
from experiments.inputs.published import Published

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
