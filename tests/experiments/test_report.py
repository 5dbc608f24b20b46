"""Table, summary and plot of a run, and the comparison of answer files."""

import io
import json

import pytest
from benches import FakeBench, make_settings
from rich.console import Console

from experiments import report, runner
from specmq_jax import metrics


@pytest.fixture
def reported(tmp_path, monkeypatch):
    """The settings of a reported run, and the table."""
    monkeypatch.setattr(metrics, "device_bandwidth", lambda: 1e11)
    settings, printed = make_settings(tmp_path), io.StringIO()
    results = runner.run(settings, load=lambda _: FakeBench(), console=Console(file=io.StringIO()))
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


def test_a_differing_turn_counts_against_the_identical_share(reported):
    settings, _ = reported
    path = settings.output_dir / "spec.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["choices"][0]["token_ids"][1][-1] += 1
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = runner.run(settings, load=None, console=Console(file=io.StringIO()))
    assert report.summarise(settings, results)["methods"]["spec"]["identical_share"] == pytest.approx(4 / 5)


def test_table_shows_every_figure_and_fits_eighty_columns(reported):
    _, printed = reported
    rows = {line.split("│")[1].strip(): line.split("│")[2:4] for line in printed.splitlines() if line.startswith("│")}
    cells = {name: [cell.strip() for cell in found] for name, found in rows.items()}
    assert cells["tokens/s"] == ["11.2", "45.0"]
    assert cells["speedup"] == ["1.00x", "4.00x"]
    assert cells["answers identical to baseline"] == ["100%", "100%"]
    assert cells["draft, ms a round"] == ["-", "10.00"]
    assert cells["of the device's copy speed"] == ["10%", "10%"]
    assert cells["rounds accepting 4 tokens"][1].endswith("100%")
    assert max(len(line) for line in printed.splitlines() if line.startswith("│")) <= 80


def test_plot_is_a_picture(reported):
    settings, _ = reported
    assert (settings.output_dir / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_baseline_has_no_relative_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "device_bandwidth", lambda: 1e11)
    settings, printed = make_settings(tmp_path, methods=("spec",)), io.StringIO()
    results = runner.run(settings, load=lambda _: FakeBench(), console=Console(file=io.StringIO()))
    report.report(settings, results, Console(file=printed, width=100))
    assert json.loads((settings.output_dir / "summary.json").read_text())["methods"]["spec"]["speedup"] is None
