"""HumanEval's functions, asked for as evalplus asks chat models: python -m experiments.human_eval

Without flags: the demo model on four functions of the package's own, speeds alone. --question_file=published downloads the 164.
--allow_code_execution runs the model's programs, contained, and reports pass@1; with --score=FILE those of a saved answer file.
"""

from experiments.benchmarks import human_eval
from experiments.reporting import benchmark_command

if __name__ == "__main__":
    benchmark_command.main(human_eval.BENCHMARK, human_eval)
