"""GSM8K's word problems, answered by chain of thought behind eight examples: python -m experiments.gsm8k

Without flags: the demo model on six problems of the package's own. --question_file=published downloads the 1319 of the test
split. --score=FILE scores a saved answer file.
"""

from collections.abc import Sequence

from absl import flags as absl_flags

from experiments.benchmarks.gsm8k import BENCHMARK
from experiments.reporting import benchmark_command
from experiments.running import flags
from specmq_jax.commands import entry

absl_flags.adopt_module_key_flags(flags)
absl_flags.adopt_module_key_flags(benchmark_command)


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark, or scores a file, and reports."""
    benchmark_command.run(BENCHMARK, argv)


if __name__ == "__main__":
    entry.run(main)
