"""Commands as a user types them: one line and exit code 2 for a mistake, a table for a comparison."""

import json
import subprocess
import sys

import pytest
from benches import QUESTIONS
from typed import ROOT, command, commands, fails_with


@pytest.fixture
def question_file(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(QUESTIONS)
    return path


def test_an_unwritable_output_directory(tmp_path, question_file):
    fails_with(command("mt_bench", f"--output_dir={question_file}/out"), f"{question_file}/out can't be written to",
               "--output_dir")


def test_a_range_past_the_file(tmp_path, question_file):
    fails_with(command("mt_bench", f"--question_file={question_file}", "--question_end=4", f"--output_dir={tmp_path}"),
               "--question_end=4 lies past the 3 questions")


def test_a_malformed_line(tmp_path, question_file):
    question_file.write_text(QUESTIONS + '{"question_id": 9, "category": "math"}\n')
    fails_with(command("mt_bench", f"--question_file={question_file}", f"--output_dir={tmp_path}"),
               f"{question_file}, line 4: 'turns' is missing")


MISTAKES = [
    (["--methods=baseline,sepc"], "method 'sepc' is not known; choose of baseline, spec"),
    (["--method=spec", "--methods=baseline"], "choose one"),
    (["--model=own", "--method=eagle2"], "method eagle2 drafts with an EAGLE head; give its directory with --eagle=DIR"),
    (["--tree_depth=1", "--tree_top_k=10", "--tree_size=60"], "has 10 candidates; size 60 needs 59"),
    (["--answer_file=a.jsonl"], "--answer_file takes the answers of one method"),
    (["--draft_precision=w3"], "precision 'w3' is not known; choose one of"),
    (["--top_k=5"], "need a --temperature above 0"),
    (["--temperature=1", "--top_p=0"], "top_p must lie in (0, 1]"),
    (["--draft_length=0"], "draft_length"),
    (["--nonsense=1"], "nonsense"),
    (["spec"], "unexpected argument 'spec'"),
]


@pytest.fixture(scope="module")
def mistaken():
    return commands(*(("experiments.mt_bench", *arguments) for arguments, _ in MISTAKES),
                    shared="experiments.reporting.benchmark_command")


@pytest.mark.parametrize("place", range(len(MISTAKES)), ids=[fault for _, fault in MISTAKES])
def test_contradictory_or_unknown_flags(mistaken, place):
    fails_with(mistaken[place], MISTAKES[place][1])


@pytest.mark.slow
def test_every_method_runs_by_flags_alone_and_answers_as_the_baseline(tmp_path):
    data = ROOT / "tests" / "data"
    result = command("mt_bench", f"--model={data / 'checkpoints' / 'fp16'}", "--methods=baseline,spec,eagle2,hier",
                     f"--eagle={data / 'eagle' / 'eagle2_head'}", "--draft_precision=w4a16-g64", "--tree_depth=3",
                     "--tree_top_k=4", "--tree_size=12", "--max_new_tokens=16", "--question_end=1", "--max_length=900",
                     f"--output_dir={tmp_path}")
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary["methods"]) == ["baseline", "spec", "eagle2", "hier"]
    assert all(figures["identical_share"] == 1 for figures in summary["methods"].values())
    assert [name for name, figures in summary["methods"].items() if figures["mean_draft_accept_length"]] == ["hier"]
    ranking = tmp_path / "ranking.json"
    made = subprocess.run([sys.executable, "-m", "checkpoints_tools.rank_vocabulary", str(data / "checkpoints" / "fp16"),
                           str(ranking), f"--text={data / 'smollm2_135m_greedy.json'}"], cwd=ROOT, capture_output=True)
    assert made.returncode == 0, made.stderr
    result = command("mt_bench", f"--model={data / 'checkpoints' / 'fp16'}", "--methods=baseline,eagle2",
                     f"--eagle={data / 'eagle' / 'eagle2_head'}", f"--vocabulary={ranking}", "--vocabulary_size=64",
                     "--tree_depth=3", "--tree_top_k=4", "--tree_size=12", "--max_new_tokens=16", "--question_end=1",
                     "--max_length=900", f"--output_dir={tmp_path / 'cut'}")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "cut" / "summary.json").read_text())["methods"]["eagle2"]["identical_share"] == 1
    wrong = command("mt_bench", f"--model={data / 'checkpoints' / 'fp16'}", "--method=eagle3",
                    f"--eagle={data / 'eagle' / 'eagle2_head'}", f"--output_dir={tmp_path / 'other'}")
    fails_with(wrong, "method eagle3 drafts with an EAGLE-3 head", "holds an EAGLE-2 head")


def answer(ident, category, new_tokens, wall_time, accept_lengths):
    choice = {"new_tokens": new_tokens, "wall_time": wall_time, "accept_lengths": accept_lengths}
    return json.dumps({"question_id": ident, "category": category, "choices": [choice]}) + "\n"


def test_speedup_compares_answer_files_by_category(tmp_path):
    base, fast = tmp_path / "base.jsonl", tmp_path / "fast.jsonl"
    base.write_text(answer(1, "math", [10], [1.0], [1] * 9) + answer(2, "qa", [30, 10], [1.0, 1.0], [1] * 38))
    fast.write_text(answer(1, "math", [10], [0.5], [3, 3, 3]) + answer(2, "qa", [30, 10], [0.5, 0.5], [5]))
    result = command("speedup", f"--base={base}", f"--answers={fast}")
    assert result.returncode == 0, result.stderr
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    assert ["math", "1", "10.0", "20.0", "2.00x", "3.00"] in rows
    assert ["qa", "1", "20.0", "40.0", "2.00x", "5.00"] in rows
    assert ["overall", "2", "15.0", "30.0", "2.00x", "3.50"] in rows


def test_speedup_refuses_other_questions_and_broken_files(tmp_path):
    base, other, broken = (tmp_path / f"{name}.jsonl" for name in ("base", "other", "broken"))
    base.write_text(answer(1, "math", [10], [1.0], [1]) + answer(2, "math", [10], [1.0], [1]))
    other.write_text(answer(1, "math", [10], [1.0], [1]))
    broken.write_text(other.read_text() + '{"question_id": 2, "ca')
    typed = [[f"--base={base}", f"--answers={file}"] for file in (other, broken, tmp_path / "none.jsonl")]
    unequal, torn, gone, bare = commands(*(("experiments.speedup", *arguments) for arguments in (*typed, [])),
                                         shared="experiments.display.plots")
    fails_with(unequal, "1 question and", "2", "same questions")
    fails_with(torn, f"{broken}, line 2")
    fails_with(gone, "can't be read")
    fails_with(bare, "--base=")
