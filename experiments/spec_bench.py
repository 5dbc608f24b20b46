"""Spec-Bench's six tasks, decoded plainly and speculatively: python -m experiments.spec_bench

Without flags: the demo model on seven questions of the package's own. --question_file=published downloads the 480.
"""

from experiments.benchmarks.spec_bench import BENCHMARK
from experiments.reporting import benchmark_command

if __name__ == "__main__":
    benchmark_command.main(BENCHMARK)
