"""Spec-Bench's six tasks, decoded plainly and speculatively: python -m experiments.spec_bench

Without flags: the demo model on seven questions of the package's own. --question_file=published downloads the 480.
"""

from collections.abc import Sequence

from absl import flags as absl_flags

from experiments.benchmarks.spec_bench import BENCHMARK
from experiments.reporting import benchmark_command
from experiments.running import flags
from specmq_jax.commands import entry

absl_flags.adopt_module_key_flags(flags)
absl_flags.adopt_module_key_flags(benchmark_command)


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark and reports."""
    benchmark_command.run(BENCHMARK, argv)


if __name__ == "__main__":
    entry.run(main)
