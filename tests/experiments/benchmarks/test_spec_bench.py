"""Spec-Bench: six tasks, and the speeds of each."""

import io
import json
import pathlib

import pytest
from benches import FakeBench, fake_plan, make_settings
from printed_tables import table_cells
from rich.console import Console

from experiments.benchmarks import spec_bench
from experiments.inputs import questions
from experiments.reporting import report
from experiments.running import runner
from experiments.timing import device

TASKS = ["mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag"]


def test_the_sample_has_the_six_tasks():
    found = questions.load(spec_bench.BENCHMARK.sample)
    assert list(dict.fromkeys(spec_bench.task(q.category) for q in found)) == TASKS
    assert {len(q.turns) for q in found if spec_bench.task(q.category) == "mt_bench"} == {2}
    assert {len(q.turns) for q in found if spec_bench.task(q.category) != "mt_bench"} == {1}


@pytest.mark.shared
def test_every_published_question_is_read():
    path = pathlib.Path(__file__).parents[4] / "shared" / "data" / "spec_bench.jsonl"
    found = questions.load(path)
    assert {name: sum(spec_bench.task(q.category) == name for q in found) for name in TASKS} == dict.fromkeys(TASKS, 80)
    assert len(found) == 480


def reported(tmp_path, monkeypatch, methods, slow):
    """The summary and the table of a run over the sample; `slow` multiplies a task's times for the method spec."""
    monkeypatch.setattr(device, "device_bandwidth", lambda: 1e11)
    settings = make_settings(tmp_path, benchmark=spec_bench.BENCHMARK, question_file=spec_bench.BENCHMARK.sample,
                             methods=methods, max_length=4096)

    def run():
        return runner.run(settings, load=lambda _: FakeBench(max_length=4096), plan=fake_plan,
                          console=Console(file=io.StringIO()))

    run()
    path = settings.output_dir / "spec.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        choice = line["choices"][0]
        choice["wall_time"] = [slow.get(spec_bench.task(line["category"]), 1) * t for t in choice["wall_time"]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report.report(settings, run(), Console(file=(printed := io.StringIO()), width=100))
    return json.loads((settings.output_dir / "summary.json").read_text()), table_cells(printed.getvalue())


def test_speedups_are_told_by_task_and_over_all(tmp_path, monkeypatch):
    summary, cells = reported(tmp_path, monkeypatch, ("baseline", "spec"), {"qa": 2, "rag": 4})
    # nine tokens in eight rounds, or in two that take as long each
    assert cells["speedup, mt_bench"] == ["1.00x", "4.00x"] and cells["speedup, translation"] == ["1.00x", "4.00x"]
    assert cells["speedup, qa"] == ["1.00x", "2.00x"] and cells["speedup, rag"] == ["1.00x", "1.00x"]
    # seven questions: the ratio of mean speeds
    assert cells["speedup"] == ["1.00x", f"{(5 * 4 + 2 + 1) / 7:.2f}x"]
    tasks = summary["methods"]["spec"]["tasks"]
    assert list(tasks) == TASKS and [tasks[name]["questions"] for name in TASKS] == [2, 1, 1, 1, 1, 1]
    assert tasks["qa"]["speedup"] == pytest.approx(2) and tasks["qa"]["mean_accept_length"] == 4
    assert tasks["rag"]["tokens_per_second"] == pytest.approx(9 / 0.8)


def test_without_a_baseline_tasks_have_speeds(tmp_path, monkeypatch):
    summary, cells = reported(tmp_path, monkeypatch, ("spec",), {})
    assert cells["tokens/s, qa"] == ["45.0"] and summary["methods"]["spec"]["tasks"]["qa"]["speedup"] is None


def test_other_benchmarks_report_no_tasks(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "device_bandwidth", lambda: 1e11)
    settings, printed = make_settings(tmp_path), io.StringIO()
    results = runner.run(settings, load=lambda _: FakeBench(), plan=fake_plan, console=Console(file=io.StringIO()))
    report.report(settings, results, Console(file=printed, width=100))
    assert not any(name.startswith("speedup,") for name in table_cells(printed.getvalue()))
