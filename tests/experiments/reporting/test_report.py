"""Table, summary and plot of a run, and the comparison of answer files."""

import dataclasses
import io
import json

import pytest
from benches import FakeBench, fake_plan, make_settings
from printed_tables import table_cells
from rich.console import Console

from experiments.reporting import report
from experiments.running import methods, runner
from experiments.timing import device


@pytest.fixture
def reported(tmp_path, monkeypatch):
    """The settings of a reported run, and the table."""
    monkeypatch.setattr(device, "device_bandwidth", lambda: 1e11)
    settings, printed = make_settings(tmp_path), io.StringIO()
    results = runner.run(settings, load=lambda _: FakeBench(), plan=fake_plan, console=Console(file=io.StringIO()))
    report.report(settings, results, Console(file=printed, width=100))
    return settings, printed.getvalue()


def test_summary_holds_the_figures(reported):
    settings, _ = reported
    summary = json.loads((settings.output_dir / "summary.json").read_text())
    spec = summary["methods"]["spec"]
    # nine tokens in eight rounds of 0.1 s, or in two
    assert summary["methods"]["baseline"]["tokens_per_second"] == pytest.approx(9 / 0.8)
    assert spec["tokens_per_second"] == pytest.approx(9 / 0.2)
    assert spec["speedup"] == pytest.approx(4.0)
    assert spec["mean_accept_length"] == 4.0 and spec["accept_histogram"] == [0, 0, 0, 10]
    assert spec["identical_share"] == 1.0
    assert spec["achieved_bandwidth"] == pytest.approx(1e10, rel=1e-3)
    assert summary["questions"] == 3 and summary["turns"] == 5


def test_turns_count_against_the_identical_share_while_their_prompts_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "device_bandwidth", lambda: 1e11)
    settings, printed = make_settings(tmp_path), io.StringIO()
    # turns of questions 1, 1, 2, c, c; the first, third and fifth differ, and the second's prompt with the first's answer
    results = runner.run(settings, load=lambda _: FakeBench(slip=True), plan=fake_plan, console=Console(file=io.StringIO()))
    report.report(settings, results, Console(file=printed, width=100))
    spec = report.summarise(settings, results)["methods"]["spec"]
    assert spec["comparable_turns"] == 4 and spec["turns"] == 5
    assert spec["identical_share"] == pytest.approx(1 / 4)
    assert spec["differences"] == 3 and spec["largest_gap"] == 0.25 and spec["stray_differences"] == 0
    cells = table_cells(printed.getvalue())
    assert cells["answers identical to baseline"] == ["100%", "25%"]
    assert cells["turns comparable with it"] == ["-", "4/5"]
    assert cells["largest gap at a difference"] == ["-", "0.25"]


@pytest.mark.parametrize(("precision", "slip", "reproducible", "told"), [
    ("w8a8", True, False, True), ("w4a8-qoq-g128", True, False, True), ("w4a16", True, False, False),
    ("w8a8", False, False, False), ("w8a8", True, True, False)])
def test_answers_that_part_for_rounded_activations_are_explained(tmp_path, monkeypatch, precision, slip, reproducible, told):
    monkeypatch.setattr(device, "device_bandwidth", lambda: 1e11)
    settings = make_settings(tmp_path, reproducible=reproducible)
    results = runner.run(settings, load=lambda _: FakeBench(slip=slip, precision=precision), plan=fake_plan,
                         console=Console(file=io.StringIO()))
    report.report(settings, results, Console(file=(printed := io.StringIO()), width=200))
    assert ("with --reproducible no last bit depends on" in printed.getvalue()) == told


def test_acceptance_by_depth_is_conditional(reported):
    settings, _ = reported
    path = settings.output_dir / "spec.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["choices"][0]["accept_lengths"], lines[1]["choices"][0]["accept_lengths"] = [1, 1, 2, 4], []
    lines[2]["choices"][0]["accept_lengths"] = []
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = runner.run(settings, load=None, console=Console(file=io.StringIO()))
    summary = report.summarise(settings, results)
    assert summary["methods"]["baseline"]["depth_acceptance"] == []
    # of four rounds two accepted the first draft, one of these the second, and that one the third
    assert summary["methods"]["spec"]["depth_acceptance"] == [0.5, 0.5, 1.0]
    report.print_table(summary, Console(file=(printed := io.StringIO()), width=100))
    cells = table_cells(printed.getvalue())
    assert cells["draft 1 accepted"] == ["-", "50%"] and cells["draft 3 accepted where 2 was"] == ["-", "100%"]


@pytest.mark.parametrize(("name", "method", "drafter", "told"), [
    ("CPU (x86)", "spec", None, True), ("CPU (x86)", "hier", None, True), ("CPU (x86)", "eagle2", None, False),
    ("CPU (x86)", "spec", "small", False), ("NVIDIA H200", "spec", None, False)])
def test_only_a_slow_low_bit_copy_on_a_cpu_is_excused(tmp_path, monkeypatch, name, method, drafter, told):
    monkeypatch.setattr(device, "device_bandwidth", lambda: 1e11)
    monkeypatch.setattr(device, "device_name", lambda: name)
    settings = make_settings(tmp_path, methods=("baseline", "spec"), models=methods.Models(drafter=drafter))
    results = runner.run(settings, load=lambda _: FakeBench(), plan=fake_plan, console=Console(file=io.StringIO()))
    slow = [dataclasses.replace(answer, wall_time=tuple(20 * t for t in answer.wall_time)) for answer in results[1].answers]
    results[1] = dataclasses.replace(results[1], method=method, answers=tuple(slow))
    report.print_table(report.summarise(settings, results), Console(file=(printed := io.StringIO()), width=100))
    assert (f"the small model of {method}" in printed.getvalue()) == told


def test_table_shows_every_figure_and_fits_eighty_columns(reported):
    _, printed = reported
    cells = table_cells(printed)
    assert cells["tokens/s"] == ["11.2", "45.0"]
    assert cells["speedup"] == ["1.00x", "4.00x"]
    assert cells["answers identical to baseline"] == ["100%", "100%"]
    assert cells["draft, ms a round"] == ["-", "10.00"]
    assert cells["of the device's copy speed"] == ["10%", "10%"]
    assert cells["rounds accepting 4 tokens"][1] == "████████ 100%"
    assert "turns comparable with it" not in cells and "largest gap at a difference" not in cells
    assert max(len(line) for line in printed.splitlines() if line.startswith("│")) <= 80


def test_a_table_of_all_methods_fits_eighty_columns_without_bars(reported):
    settings, _ = reported
    results = runner.run(settings, load=None, console=Console(file=io.StringIO()))
    summary = report.summarise(settings, results)
    spec = summary["methods"]["spec"]
    everything = summary | {"methods": summary["methods"] | {name: spec for name in ("eagle2", "eagle3", "hier")}}
    report.print_table(everything, Console(file=(printed := io.StringIO()), width=80))
    cells = table_cells(printed.getvalue())
    assert cells["tokens/s"] == ["11.2", "45.0", "45.0", "45.0", "45.0"]
    assert cells["rounds accepting 4 tokens"] == ["-", "100%", "100%", "100%", "100%"]


def test_plot_is_a_picture(reported):
    settings, _ = reported
    assert (settings.output_dir / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_baseline_has_no_relative_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "device_bandwidth", lambda: 1e11)
    settings, printed = make_settings(tmp_path, methods=("spec",)), io.StringIO()
    results = runner.run(settings, load=lambda _: FakeBench(), plan=fake_plan, console=Console(file=io.StringIO()))
    report.report(settings, results, Console(file=printed, width=100))
    assert json.loads((settings.output_dir / "summary.json").read_text())["methods"]["spec"]["speedup"] is None
