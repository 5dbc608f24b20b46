"""Comparisons of made-up answer files, whose figures are worked out by hand."""

import csv
import io

import numpy as np
import pytest
from made_up_answers import write
from rich.console import Console
from typed import commands

from experiments import speedup
from experiments.answers.answer_files import AnswerFile
from experiments.benchmarks.registry import BENCHMARKS
from experiments.display import tables
from experiments.reporting import answer_runs, figures
from specmq_jax.errors import UserError


def rows(base, *others, common=False):
    return speedup.compared(*_split(speedup.over_same_questions(
        answer_runs.find_one(str(base), unfinished=common),
        [run for other in others for run in answer_runs.find(str(other), unfinished=common)], common=common)))


def _split(runs):
    return runs[0], runs[1:]


def by_key(found):
    return {(row.label, row.category): row.figures for row in found}


def test_a_ratio_of_means_is_not_a_mean_of_ratios(tmp_path):
    base = write(tmp_path / "base.jsonl", [10, 30])
    fast = write(tmp_path / "fast.jsonl", [30, 30], accept=3)
    found = by_key(rows(base, fast))["fast", "overall"]
    assert found.tokens_per_second == pytest.approx(30) and found.base_tokens_per_second == pytest.approx(20)
    assert found.speedup == pytest.approx(1.5)  # 30 / 20
    assert found.mean_ratio == pytest.approx(2.0)  # of 3 and 1
    assert found.accept_length == 3 and found.questions == 2


def test_figures_are_those_of_each_category_in_the_files_order(tmp_path):
    base = write(tmp_path / "base.jsonl", [10, 20, 10, 20], categories=("writing", "math"))
    fast = write(tmp_path / "fast.jsonl", [20, 20, 20, 60], categories=("writing", "math"))
    found = rows(base, fast)
    assert [(row.label, row.category) for row in found] == [
        (label, category) for label in ("base", "fast") for category in ("writing", "math", "overall")]
    assert by_key(found)["fast", "writing"].speedup == pytest.approx(2)
    assert by_key(found)["fast", "math"].speedup == pytest.approx(2)
    assert by_key(found)["fast", "overall"].speedup == pytest.approx(2)
    assert by_key(found)["fast", "math"].interval == pytest.approx((1, 3))  # of ratios 1 and 3


def test_spec_bench_counts_mt_benchs_categories_as_one_task(tmp_path):
    base = write(tmp_path / "base.jsonl", [10, 20, 30], categories=("writing", "math", "qa"))
    task = BENCHMARKS["spec_bench"].task
    found = speedup.compared(answer_runs.find_one(str(base)).by_task(task), [])
    assert [(row.category, row.figures.questions) for row in found] == [("mt_bench", 2), ("qa", 1), ("overall", 3)]


def test_questions_are_matched_by_id_whatever_their_order(tmp_path):
    base = write(tmp_path / "base.jsonl", [10, 30])
    fast = write(write(tmp_path / "fast.jsonl", [60], first=2), [10])
    assert by_key(rows(base, fast))["fast", "overall"].mean_ratio == pytest.approx(1.5)  # of 60/30 and 10/10


def test_nineteen_of_twenty_intervals_cover_the_true_mean():
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(200):
        low, high = figures.bootstrap_interval(rng.normal(2.0, 0.4, 40))
        covered += low <= 2.0 <= high
    assert 180 <= covered <= 199
    assert figures.bootstrap_interval(np.full(5, 1.5)) == (1.5, 1.5)


def test_a_single_question_has_no_interval(tmp_path):
    found = rows(write(tmp_path / "base.jsonl", [10]), write(tmp_path / "fast.jsonl", [20]))
    assert found[-1].figures.interval is None


def test_an_interval_narrows_with_the_root_of_the_number_of_questions():
    values = np.random.default_rng(0).normal(2.0, 0.4, 25)
    few, many = (np.subtract(*figures.bootstrap_interval(np.tile(values, count))[::-1]) for count in (1, 16))
    assert few == pytest.approx(2 * 1.96 * values.std() / 5, rel=0.05)
    assert few / many == pytest.approx(4, rel=0.05)


def test_answers_count_as_identical_token_by_token(tmp_path):
    base = write(tmp_path / "base.jsonl", [10] * 4, texts=["a", "b", "c", "d"])
    other = write(tmp_path / "other.jsonl", [10] * 4, texts=["a", "b", "x", "d"])
    assert by_key(rows(base, other))["other", "overall"].identical_share == 0.75
    assert by_key(rows(base, other))["base", "overall"].identical_share == 1


def test_files_without_token_ids_are_compared_by_text(tmp_path):
    base, other = (write(tmp_path / f"{name}.jsonl", [10] * 2, texts=["a", name]) for name in ("base", "other"))
    other.write_text(other.read_text().replace("token_ids", "unknown"))
    assert by_key(rows(base, other))["other", "overall"].identical_share == 0.5
    other.write_text(other.read_text().replace('"turns"', '"unread"'))
    assert by_key(rows(base, other))["other", "overall"].identical_share is None


def test_runs_of_other_models_in_one_file_are_told_apart(tmp_path):
    both = write(write(tmp_path / "both.jsonl", [10, 10]), [20, 20], model_id="Tiny-fp16-spec")
    found = rows(f"{both}#1", both)
    assert by_key(found)["Tiny-fp16-spec", "overall"].speedup == pytest.approx(2)
    with pytest.raises(UserError, match=r"holds 2 runs; choose one: .*#1 is Tiny-fp16-baseline, .*#2 is Tiny-fp16-spec"):
        answer_runs.find_one(str(both))
    with pytest.raises(UserError, match="both.jsonl#3: .*both.jsonl holds 2 runs, numbered from 1"):
        answer_runs.find(f"{both}#3")


def test_a_run_appended_again_is_another_even_where_the_first_was_killed(tmp_path):
    both = write(write(tmp_path / "both.jsonl", [10]), [20, 20, 20])
    assert [[answer.question_id for answer in run.answers] for run in answer_runs.read(both)] == [[1], [1, 2, 3]]
    assert answer_runs.labels(answer_runs.read(both)) == ["Tiny-fp16-baseline#1", "Tiny-fp16-baseline#2"]
    resumed = write(write(tmp_path / "resumed.jsonl", [10]), [20, 20], first=2)
    assert len(answer_runs.read(resumed)) == 1


def test_no_run_goes_on_in_a_file_of_two(tmp_path):
    both = write(write(tmp_path / "both.jsonl", [10, 10]), [20, 20])
    (tmp_path / "both.settings.json").write_text('{"settings": {"seed": 0}, "measured": null}')
    with pytest.raises(UserError, match="both.jsonl answers question 1 twice, so that two runs were appended to it"):
        AnswerFile(both, {"seed": 0}, resume=True)


def test_lines_of_two_runs_that_wrote_in_turn_are_told_apart(tmp_path):
    both = tmp_path / "both.jsonl"
    for question in (1, 2):
        for model_id in ("Tiny-fp16-baseline", "Tiny-fp16-spec"):
            write(both, [10], first=question, model_id=model_id)
    assert [(run.method, len(run.answers)) for run in answer_runs.read(both)] == [("baseline", 2), ("spec", 2)]


@pytest.mark.parametrize(("model_id", "expected"), [
    ("Llama-3-8B-w4a8-qqq-g128-eagle2", ("Llama-3-8B", "w4a8-qqq-g128", "eagle2")),
    ("SmolLM2-135M-Instruct-w4a16-g64-baseline", ("SmolLM2-135M-Instruct", "w4a16-g64", "baseline")),
    ("fp16-tests-fp16-spec", ("fp16-tests", "fp16", "spec")),
    ("baseline-llama-3-70b-fp16", ("baseline-llama-3-70b-fp16", None, None)),
    ("", ("", None, None)),
])
def test_model_ids_name_target_precision_and_method(tmp_path, model_id, expected):
    (run,) = answer_runs.read(write(tmp_path / "a.jsonl", [10], model_id=model_id))
    assert (run.target, run.precision, run.method) == expected


def test_files_of_one_name_are_labelled_with_their_folders(tmp_path):
    paths = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        paths.append(write(tmp_path / folder / "spec.jsonl", [10]))
    runs = [run for path in paths for run in answer_runs.read(path)]
    assert answer_runs.labels(runs) == ["one/spec", "two/spec"]


def test_partial_files_are_compared_over_their_common_questions_when_asked(tmp_path):
    base = write(tmp_path / "base.jsonl", [10, 10, 40])
    partial = write(tmp_path / "partial.jsonl", [20, 20])
    other = write(tmp_path / "other.jsonl", [30, 30], first=2)
    with pytest.raises(UserError, match="answers 2 questions and .* 3, of which 2 are the same.* with --common"):
        rows(base, partial)
    assert by_key(rows(base, partial, common=True))["partial", "overall"].speedup == pytest.approx(2)
    three = by_key(rows(base, partial, other, common=True))
    assert three["other", "overall"].questions == 1 and three["other", "overall"].speedup == pytest.approx(3)
    partial.write_text(partial.read_text() + '{"question_id": 3, "cat')
    with pytest.raises(UserError, match="line 3: no answer of this format"):
        rows(base, partial)
    assert by_key(rows(base, partial, common=True))["partial", "overall"].questions == 2
    with pytest.raises(UserError, match="no question is answered in"):
        rows(other, write(tmp_path / "far.jsonl", [10], first=9), common=True)


def test_the_spreadsheet_holds_the_figures_in_full(tmp_path):
    base = write(tmp_path / "base.jsonl", [10, 17, 30])
    found = rows(base, write(tmp_path / "fast, and more.jsonl", [31, 29, 37], accept=2, model_id="Tiny-w4a16-g64-spec"))
    lines = list(csv.DictReader(io.StringIO(tables.comma_separated(speedup.FIELDS, found))))
    assert len(lines) == len(found) == 4
    for line, row in zip(lines, found, strict=True):
        assert line["run"] == row.label and line["model_id"] == row.run.model_id
        assert float(line["speedup"]) == row.figures.speedup and float(line["mean_ratio"]) == row.figures.mean_ratio
        assert (float(line["mean_ratio_low"]), float(line["mean_ratio_high"])) == row.figures.interval
        assert float(line["mean_accept_length"]) == row.figures.accept_length
        assert int(line["questions"]) == 3


def test_bars_stand_by_precision_with_the_relative_speedup(tmp_path):
    base, *others = (write(tmp_path / f"{name}.jsonl", [speed] * 2, model_id=f"Tiny-{name}") for name, speed in [
        ("fp16-baseline", 10), ("fp16-eagle2", 20), ("w8a8-baseline", 15), ("w8a8-eagle2", 24), ("w4a16-spec", 30)])
    odd = write(tmp_path / "odd.jsonl", [50] * 2, model_id="of another program")
    found = [(bar.group, bar.series, round(bar.speedup, 6), bar.relative and round(bar.relative, 6))
             for bar in speedup.bars(rows(base, *others, odd))]
    assert found == [("fp16", "plain", 1, None), ("fp16", "+ eagle2", 2, 2), ("w8a8", "plain", 1.5, None),
                     ("w8a8", "+ eagle2", 2.4, 1.6), ("w4a16", "+ spec", 3, None), ("odd", "plain", 5, None)]


def test_bars_of_two_runs_of_one_method_bear_their_files_names(tmp_path):
    base, small, large = (write(tmp_path / f"{name}.jsonl", [speed] * 2, model_id=f"Tiny-fp16-{method}") for name, speed, method
                          in [("base", 10, "baseline"), ("small", 20, "eagle2"), ("large", 30, "eagle2")])
    assert [bar.series for bar in speedup.bars(rows(base, small, large))] == ["plain", "small", "large"]


def test_a_wide_comparison_is_printed_in_parts(tmp_path):
    base = write(tmp_path / "base.jsonl", [10, 10])
    others = [write(tmp_path / f"run{i}.jsonl", [10 + i, 10 + i]) for i in range(6)]
    speedup.show(rows(base, *others), Console(file=(printed := io.StringIO()), width=100))
    assert max(map(len, printed.getvalue().splitlines())) <= 100 and "…" not in printed.getvalue()
    assert all(f"run{i}" in printed.getvalue() and f"{1 + i / 10:.2f}x" in printed.getvalue() for i in range(6))


def test_the_command_writes_its_files(tmp_path):
    base = write(tmp_path / "base.jsonl", [10, 30])
    fast = write(tmp_path / "fast.jsonl", [30, 30], model_id="Tiny-fp16-spec")
    answers = f"--answers={fast}"
    typed = [[answers, f"--csv={tmp_path}/out.csv", f"--markdown={tmp_path}/out.md", f"--plot={tmp_path}/out.png"],
             [answers, f"--csv={tmp_path}/none/out.csv"], [answers, "--benchmark=spec_bench"],
             [answers, f"--plot={tmp_path}/out.txt"], [f"--answers={base}"]]
    result, bad, tasks, odd, alone = commands(*(("experiments.speedup", f"--base={base}", *rest) for rest in typed),
                                             shared="experiments.display.plots")
    assert result.returncode == 0, result.stderr
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines()]
    assert ["fast", "30.0", "1.50x", "2.00x", "1.00 to 3.00", "1.00", "100%"] in cells
    lines = (tmp_path / "out.md").read_text().splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")][:3] == ["run", "category", "questions"]
    assert set(lines[1]) == {"|", "-"} and len(lines) == 2 + 4
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert [line["speedup"] for line in csv.DictReader((tmp_path / "out.csv").open())][-1] == "1.5"
    assert bad.returncode == 2 and "none/out.csv can't be written to; name another file with --csv=FILE" in bad.stderr
    assert "mt_bench" in tasks.stdout and "math" not in tasks.stdout
    assert odd.returncode == 2 and "must end in .png, .svg, .pdf" in odd.stderr
    assert alone.returncode == 2 and "holds nothing but the base" in alone.stderr
