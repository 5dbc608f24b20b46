"""HumanEval's functions, asked for as evalplus asks chat models: python -m experiments.human_eval

Without flags: the demo model on four functions of the package's own, speeds alone. --question_file=published downloads the 164.
--allow_code_execution runs the model's programs, contained, and reports pass@1; with --score=FILE those of a saved answer file.
"""

from collections.abc import Sequence

from absl import flags as absl_flags

from experiments.benchmarks import human_eval
from experiments.benchmarks.human_eval import BENCHMARK
from experiments.reporting import benchmark_command
from experiments.running import flags
from specmq_jax.commands import entry

absl_flags.adopt_module_key_flags(flags)
absl_flags.adopt_module_key_flags(benchmark_command)
absl_flags.adopt_module_key_flags(human_eval)


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark, or scores a file, and reports."""
    benchmark_command.run(BENCHMARK, argv)


if __name__ == "__main__":
    entry.run(main)
