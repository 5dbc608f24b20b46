"""All benchmarks by name, for commands that run whichever is asked for."""

from collections.abc import Mapping

from experiments.benchmarks import gsm8k, human_eval, spec_bench
from experiments.benchmarks.benchmark import MT_BENCH, Benchmark

BENCHMARKS: Mapping[str, Benchmark] = {
    benchmark.name: benchmark for benchmark in (MT_BENCH, spec_bench.BENCHMARK, gsm8k.BENCHMARK, human_eval.BENCHMARK)}
