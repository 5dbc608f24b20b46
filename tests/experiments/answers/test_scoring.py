"""Scoring answers, and answer files that are finished, partial, of several runs or to other questions."""

import io
import json
import warnings

import pytest
from benches import FakeBench, fake_plan, make_settings
from printed_tables import table_cells
from rich.console import Console
from typed import command, fails_with

from checkpoints_tools.records import Record
from experiments.answers import answer_files, scoring
from experiments.answers.scoring import Scorer, Verdict
from experiments.benchmarks import gsm8k
from experiments.benchmarks.benchmark import Benchmark
from experiments.inputs.questions import dialogue
from experiments.reporting import benchmark_command, report
from experiments.running import runner
from experiments.timing import device
from specmq_jax.errors import UserError
from specmq_jax.words import count as counted

WORKED = [("What is 6 * 7?", "#### 42"), ("What is 2 + 2?", "#### 4"), ("What is 1000 + 1?", "#### 1,001")]


def answer(ident, text, model_id="m-fp16-baseline"):
    choice = {"turns": [text], "new_tokens": [1], "wall_time": [1.0], "accept_lengths": [1]}
    return json.dumps({"question_id": ident, "category": "gsm8k", "model_id": model_id, "choices": [choice]}) + "\n"


@pytest.fixture
def question_file(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in WORKED))
    return path


@pytest.fixture
def answers(tmp_path):
    return tmp_path / "answers.jsonl"


def score_lines(answers, question_file, score=None):
    """What scoring prints, each line with the paths taken out."""
    printed = io.StringIO()
    benchmark_command.score_files(gsm8k.BENCHMARK, [score or str(answers)], str(question_file), Console(
        file=printed, width=200))
    return printed.getvalue().replace(f"{answers.parent}/", "").splitlines()


def test_a_finished_file(answers, question_file):
    answers.write_text(answer(0, "The answer is 42.") + answer(1, "5") + answer(2, "The answer is 1,001."))
    before = answers.read_bytes()
    assert score_lines(answers, question_file) == [
        "answers.jsonl: accuracy 66.7%, 2 of 3 answers right; 3 of 3 questions answered", "Wrote answers.scores.json"]
    (scores,) = json.loads(scoring.score_file(answers).read_text())
    assert scores["model_id"] == "m-fp16-baseline" and scores["share"] == pytest.approx(2 / 3)
    assert scores["verdicts"][1] == {"question_id": 1, "right": False, "detail": "5, expected 4"}
    assert answers.read_bytes() == before


@pytest.mark.parametrize("unfinished", ["", '{"question_id": 1, "cat', answer(1, "4").strip()])
def test_a_partial_file_says_how_much_it_holds_and_stays_as_it_is(answers, question_file, unfinished):
    answers.write_text(answer(0, "The answer is 42.") + unfinished)
    before, count = answers.read_bytes(), 2 if unfinished.endswith("}") else 1
    assert score_lines(answers, question_file)[0] == (
        f"answers.jsonl: accuracy 100.0%, {count} of {counted(count, 'answer')} right; {count} of 3 questions answered")
    assert answers.read_bytes() == before


def test_runs_in_one_file_are_told_apart(answers, question_file):
    answers.write_text(answer(0, "42") + answer(1, "4") + answer(0, "41") + answer(1, "4") + answer(0, "42", "other"))
    lines = score_lines(answers, question_file)
    assert [line.partition(",")[0] for line in lines[:3]] == [
        "answers.jsonl#1: accuracy 100.0%", "answers.jsonl#2: accuracy 50.0%", "answers.jsonl#3: accuracy 100.0%"]
    assert len(json.loads(scoring.score_file(answers).read_text())) == 3
    lines = score_lines(answers, question_file, score=f"{answers}#2")
    assert lines[0].startswith("answers.jsonl#2: accuracy 50.0%")


def test_answers_to_other_questions_are_refused(answers, question_file):
    answers.write_text(answer(7, "42"))
    with pytest.raises(UserError, match="question 7 was answered and is not among the 3 questions.*--question_file"):
        score_lines(answers, question_file)
    answers.write_text(answer(0, "42"))
    answers.with_suffix(".settings.json").write_text(json.dumps({"settings": {"questions": f"q.jsonl 0:3 {16 * '0'}"}}))
    with pytest.raises(UserError, match="answers other questions than these"):
        score_lines(answers, question_file)
    assert not scoring.score_file(answers).exists()


def test_the_questions_that_a_run_asked_count(answers, question_file):
    asked = runner.questions.load(question_file, 0, 2, parse=gsm8k.parse_question)
    recorded = f"elsewhere.jsonl 0:2 {runner.questions.digest(asked)}"
    answers.write_text(answer(0, "42"))
    answers.with_suffix(".settings.json").write_text(json.dumps({"settings": {"questions": recorded}}))
    assert score_lines(answers, question_file)[0].endswith("1 of 2 questions answered")


def test_an_answer_without_text_is_refused(answers, question_file):
    answers.write_text(answer(0, "42").replace('"turns": ["42"], ', ""))
    with pytest.raises(UserError, match="the answer to question 0 holds no text"):
        score_lines(answers, question_file)


def test_the_command_scores_and_names_what_it_can_not(answers, question_file):
    answers.write_text(answer(0, "The answer is 42."))
    result = command("gsm8k", f"--score={answers}", f"--question_file={question_file}")
    assert result.returncode == 0, result.stderr
    assert "accuracy 100.0%, 1 of 1 answer right; 1 of 3 questions answered" in result.stdout
    fails_with(command("spec_bench", f"--score={answers}"), "spec_bench measures speed alone")


def test_what_python_warns_of_in_an_answer_is_not_shown():
    def judge(question, text):
        return Verdict(right=bool(compile(text, question.category, "exec")), detail="")

    asked = [gsm8k.parse_question(Record(place="f", index=0, values={"question": "q", "answer": "#### 1"}))]
    found = answer_files.Answer(
        question_id=0, category="gsm8k", prompt_tokens=(), texts=(r"'\d'",), token_ids=(), new_tokens=(1,), wall_time=(1.0,),
        prefill_time=(), accept_lengths=(), draft_accept_lengths=(), cut=None)
    with warnings.catch_warnings(action="error"):
        assert scoring.score(Scorer(metric="valid", judge=judge), [found], asked).share == 1


BENCHMARK = Benchmark(name="parity", sample=None, published=None, parse=dialogue, scorer=Scorer(
    metric="accuracy", judge=lambda question, text: Verdict(right=text.startswith("e"), detail=text[:1])))


def test_a_scored_run_has_its_score_in_table_and_summary_and_beside_the_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "device_bandwidth", lambda: 1e11)
    settings = make_settings(tmp_path, benchmark=BENCHMARK)
    results = runner.run(settings, load=lambda _: FakeBench(), plan=fake_plan, console=Console(file=io.StringIO()))
    results = [benchmark_command.scored(settings, BENCHMARK.scorer, result) for result in results]
    right = sum(found.texts[0].startswith("e") for found in results[0].answers)
    printed = io.StringIO()
    report.report(settings, results, Console(file=printed, width=100))
    assert table_cells(printed.getvalue())["accuracy"] == 2 * [f"{right / 3:.1%}"]
    summary = json.loads((settings.output_dir / "summary.json").read_text())
    assert summary["methods"]["spec"]["score"] == {"metric": "accuracy", "share": right / 3, "right": right, "answered": 3}
    assert json.loads((settings.output_dir / "spec.scores.json").read_text())[0]["right"] == right
