"""MT-Bench dialogues, decoded plainly and speculatively: python -m experiments.mt_bench

Without flags: the demo model on eight questions of the package's own, into results/. --question_file=published downloads
the 80.
"""

from experiments.benchmarks.benchmark import MT_BENCH
from experiments.reporting import benchmark_command

if __name__ == "__main__":
    benchmark_command.main(MT_BENCH)
