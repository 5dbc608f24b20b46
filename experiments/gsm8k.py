"""GSM8K's word problems, answered by chain of thought behind eight examples: python -m experiments.gsm8k

Without flags: the demo model on six problems of the package's own. --question_file=published downloads the 1319 of the test
split. --score=FILE scores a saved answer file.
"""

from experiments.benchmarks.gsm8k import BENCHMARK
from experiments.reporting import benchmark_command

if __name__ == "__main__":
    benchmark_command.main(BENCHMARK)
