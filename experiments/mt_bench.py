"""MT-Bench dialogues, decoded plainly and speculatively: python -m experiments.mt_bench

Without flags: the demo model on eight questions of the package's own, baseline and spec, into results/.
"""

from collections.abc import Sequence

from absl import flags as absl_flags

from experiments import flags, report, runner
from specmq_jax import errors

absl_flags.adopt_module_key_flags(flags)


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark and reports."""
    flags.no_arguments(argv)
    settings = flags.settings("mt_bench")
    report.report(settings, runner.run(settings))


if __name__ == "__main__":
    errors.run(main)
