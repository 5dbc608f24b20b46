"""Sweeps over a model made of arithmetic: which cells there are, what is run again, what the tables say."""

import csv
import dataclasses
import io
import pathlib
import shutil
import subprocess
import sys

import pytest
from absl import flags as absl_flags
from absl.testing import flagsaver
from benches import QUESTIONS, FakeBench, TinyBench, fake_plan
from rich.console import Console

from checkpoints_tools import demo_model
from experiments import sweep
from experiments.running import claims
from experiments.sweeping import grid, sweep_cells, sweep_report
from experiments.sweeping.isolated import ProcessEnded
from experiments.sweeping.sweep_progress import Tally, display
from experiments.sweeping.sweep_worker import Event, LoadedModels
from experiments.timing import device
from specmq_jax.decoding.config import TreeConfig
from specmq_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[3]
DATA = ROOT / "tests" / "data"
HEADS = DATA / "eagle"


@pytest.fixture(scope="module", autouse=True)
def _flags():
    before = set(absl_flags.FLAGS)
    sweep_cells.declare_flags()
    yield
    for name in set(absl_flags.FLAGS) - before:
        delattr(absl_flags.FLAGS, name)


@pytest.fixture(autouse=True)
def _no_device_work(monkeypatch):
    monkeypatch.setattr(device, "device_bandwidth", lambda: 1e11)
    monkeypatch.setattr(demo_model, "head", lambda version: HEADS / f"eagle{version}_head")


@pytest.fixture
def prepared(tmp_path):
    """Prepares the sweep of some flags, over QUESTIONS and into tmp_path / "out"."""
    (tmp_path / "questions.jsonl").write_text(QUESTIONS)

    def prepare(*arguments, file=None):
        given = [f"--question_file={tmp_path / 'questions.jsonl'}", "--max_new_tokens=9", f"--output_dir={tmp_path / 'out'}"]
        with flagsaver.flagsaver():
            absl_flags.FLAGS(["sweep", *given, *arguments])
            if file is not None:
                (tmp_path / "grid.yaml").write_text(file)
                grid.apply_file(tmp_path / "grid.yaml", absl_flags.FLAGS, sweep_cells.key_flags())
            return sweep_cells.prepared(absl_flags.FLAGS)

    return prepare


class FakeModels:
    """Models whose speculation accepts as many tokens as the tree is deep or the draft long; `broken` methods fail."""

    def __init__(self, kill_at=None, broken=()):
        self.kill_at, self.broken, self.asked = kill_at, broken, []

    def load(self, settings):
        (method,) = settings.methods
        if method in self.broken:
            raise self.broken[method]
        self.asked.append(settings)
        bench = FakeBench(precision=settings.models.precision or "fp16", kill_at=self.kill_at)
        accept = {"baseline": 1, "spec": settings.models.draft_length}.get(method, settings.models.tree.depth)
        made = bench.decoder
        bench.decoder = lambda method: dataclasses.replace(made(method), accept=accept)
        return bench

    def plan(self, settings, needed):
        return fake_plan(settings, needed)


def run(found, models=None):
    """Why cells failed, and the progress that was printed."""
    models, printed = models or FakeModels(), io.StringIO()

    def reports(work, cells):
        events = []
        try:
            work(cells, events.append, models)
        finally:
            yield from events

    return sweep.run(found, Console(file=printed, width=500), reports), printed.getvalue()


def report(found, failures=()):
    """The table's lines, and the spreadsheet."""
    printed = io.StringIO()
    sweep_report.report(found, dict(failures), Console(file=printed, width=200))
    with (found.output_dir / "table.csv").open() as file:
        return printed.getvalue(), list(csv.DictReader(file))


def names(found):
    return [cell.name for cell in found.cells]


def test_a_method_is_combined_only_with_the_settings_that_it_uses(prepared):
    found = prepared("--precisions=fp16,w4a16-g64", "--methods=baseline,spec,eagle2,hier", "--tree_depths=2,3",
                     "--tree_top_ks=4", "--tree_sizes=5", "--draft_lengths=3,6", "--min_draft_lengths=7")
    assert names(found) == [f"{precision}/{name}" for precision in ("fp16", "w4a16-g64") for name in (
        "baseline", "spec-length3", "spec-length6", "eagle2-depth2-top_k4-size5", "eagle2-depth3-top_k4-size5",
        "hier-depth2-top_k4-size5-min_length7", "hier-depth3-top_k4-size5-min_length7")]
    models = found.cells[-1].settings.models
    assert models.precision == "w4a16-g64" and models.tree == TreeConfig(depth=3, top_k=4, size=5)
    assert models.min_draft_length == 7 and found.questions == 3


def test_single_values_come_from_the_flags_of_all_experiments(prepared):
    found = prepared("--precision=w8a8", "--method=eagle2", "--tree_depth=2", "--tree_top_k=4")
    assert names(found) == ["w8a8/eagle2-depth2-top_k4-size4"]
    assert names(prepared("--methods=baseline")) == ["stored/baseline"]


def test_a_precision_named_twice_is_one(prepared):
    assert names(prepared("--precisions=w4a16,w4a16-g128", "--methods=baseline")) == ["w4a16/baseline"]


def test_impossible_trees_are_left_out_and_told(prepared):
    found = prepared("--methods=eagle2", "--tree_depths=1,2", "--tree_top_ks=3", "--tree_sizes=4,9")
    assert names(found) == [f"stored/eagle2-{name}" for name in ("depth1-top_k3-size4", "depth2-top_k3-size4",
                                                                 "depth2-top_k3-size9")]
    assert found.left_out == ("eagle2: a tree of depth 1 and top_k 3 has at most 4 nodes, not 9",)
    with pytest.raises(UserError, match="no tree of the grid is possible: eagle2: .* at most 4 nodes"):
        prepared("--methods=eagle2", "--tree_depths=1", "--tree_top_ks=3", "--tree_sizes=9")
    assert names(prepared("--methods=eagle2", "--tree_depths=1,2", "--tree_top_ks=1")) == [
        "stored/eagle2-depth1-top_k1-size2", "stored/eagle2-depth2-top_k1-size3"]  # a size that nobody gave is cut


def test_a_file_says_the_same_as_flags(prepared):
    written = prepared(file="precisions: [fp16, w8a8]\nmethods: [baseline, spec]\ndraft_lengths: [2, 3]\nquestion_end: 2\n")
    assert written == prepared("--precisions=fp16,w8a8", "--methods=baseline,spec", "--draft_lengths=2,3", "--question_end=2")


def test_flags_win_over_the_file(prepared):
    found = prepared("--draft_lengths=5", file="methods: spec\ndraft_lengths: [2, 3]\n")
    assert names(found) == ["stored/spec-length5"]


@pytest.mark.parametrize(("text", "fault"), [
    ("precisons: [fp16]", "'precisons' is no key of a grid; did you mean 'precisions'?"),
    ("tree_depths: [3, x]", r"'tree_depths' has a wrong value \[3, 'x'\]: expected whole numbers above 0, found 3, x"),
    ("tree_depths: [0]", "'tree_depths' has a wrong value"),
    ("seed: many", "'seed' has a wrong value 'many'"),
    ("question_end: [1, 2]", "'question_end' takes one value; found a list"),
    ("methods: {a: b}", "'methods' takes texts or numbers"),
    ("precisions: []", "'precisions' takes texts or numbers"),
    ("- fp16", "must map keys to values, for example precisions"),
    ("methods: [", "line 1: not valid YAML"),
    ("!!python/object/apply:os.system [exit]", "not valid YAML"),
])
def test_a_wrong_file_is_told_by_its_key_or_line(prepared, text, fault):
    with pytest.raises(UserError, match=f"grid.yaml.*{fault}"):
        prepared(file=text)


@pytest.mark.parametrize(("arguments", "fault"), [
    (["--precision=fp16", "--precisions=fp16"], "--precisions and --precision were both given"),
    (["--tree_depth=2", "--tree_depths=2"], "--tree_depths and --tree_depth were both given"),
    (["--answer_file=a.jsonl", "--method=baseline"], "a sweep has many; give --output_dir"),
    (["--precisions=fp16,w3"], "precision 'w3' is not known"),
    (["--methods=baseline,auto"], "method auto chooses by itself .* experiments.mt_bench --method=auto"),
    (["--methods=baseline,sepc"], "method 'sepc' is not known"),
    (["--models=own", "--methods=eagle2"], "method eagle2 drafts with an EAGLE head"),
    (["--models=a/own,b/own", "--methods=baseline"], "--models names a/own and b/own, which bear one name"),
    (["--question_end=9"], "--question_end=9 lies past the 3 questions"),
])
def test_mistakes_are_found_before_anything_runs(prepared, arguments, fault):
    with pytest.raises(UserError, match=fault):
        prepared(*arguments)


def test_the_table_holds_the_figures_of_every_cell(prepared):
    found = prepared("--precisions=fp16,w8a8", "--methods=baseline,spec,eagle2", "--draft_lengths=2,4", "--tree_depths=3")
    failures, printed = run(found)
    assert not failures and "fp16/spec-length4: done (3 of 8 cells, " in printed and "8 of 8 cells, none left" in printed
    assert "w8a8/baseline: memory: target 2.0 GB, baseline 80.0 MB: 2.1 GB" in printed
    shown, lines = report(found)
    # nine tokens, the first of the prefill: eight, four, two or three rounds of 0.1 s
    speeds = {"": 9 / 0.8, "2": 9 / 0.4, "4": 9 / 0.2}
    assert [(line["precision"], line["method"], line["length"], line["depth"]) for line in lines] == [
        (precision, *rest) for precision in ("fp16", "w8a8") for rest in (
            ("baseline", "", ""), ("spec", "2", ""), ("spec", "4", ""), ("eagle2", "", "3"))]
    for line in lines:
        if line["method"] != "eagle2":
            assert float(line["tokens_per_second"]) == pytest.approx(speeds[line["length"]])
            assert float(line["speedup"]) == pytest.approx(speeds[line["length"]] / speeds[""])
            assert float(line["mean_accept_length"]) == float(line["length"] or 1)
        assert float(line["identical_share"]) == 1 and int(line["questions"]) == 3
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
    assert ["w8a8", "spec", "-", "4", "45.0", "4.00x", "4.00x", "4.00", "100%", "10.00", "100.00"] in rows
    assert "| w8a8      | eagle2   | 3/" in (found.output_dir / "table.md").read_text()
    assert {path.name for path in found.output_dir.glob("*.png")} == {"speedup.png", "speed-spec.png"}


class TinyModels(FakeModels):
    """A model that decodes, in every cell."""

    def load(self, settings):
        self.asked.append(settings)
        return TinyBench(max_length=settings.max_length)


@pytest.mark.slow
def test_questions_side_by_side_give_throughputs_and_no_speeds(prepared):
    arguments = ("--methods=baseline,spec", "--slots=2", "--draft_length=3", "--max_length=256")
    found = prepared(*arguments)
    failures, printed = run(found, TinyModels())
    assert not failures and "stored/spec-length3: done (2 of 2 cells" in printed
    shown, lines = report(found)
    throughputs = [cell.answers().measured["throughput"] for cell in found.cells]
    assert [float(line["throughput"]) for line in lines] == throughputs and min(throughputs) > 0
    assert [float(line["speedup"]) for line in lines] == [each / throughputs[0] for each in throughputs]
    assert [(line["slots"], line["tokens_per_second"], line["mean_ratio"], line["verify_seconds"]) for line in lines] == [
        ("2", "", "", "")] * 2
    assert all(float(line["identical_share"]) == 1 for line in lines)
    assert "2 questions side by side: tokens/s of all together" in shown and "ms" not in shown
    assert "2 questions side by side" in (found.output_dir / "table.md").read_text()
    base, bars = sweep_report.bars(sweep_report.rows(found, {}))
    assert base == "stored/baseline" and bars[1].speedup == throughputs[1] / throughputs[0]
    again = TinyModels()
    assert run(prepared(*arguments), again)[0] == {} and not again.asked
    with pytest.raises(UserError, match=r"slots 2 there.*--noresume"):
        prepared("--methods=baseline", "--max_length=256")


def test_a_throughput_of_a_part_is_none(prepared):
    arguments = ("--methods=baseline,spec", "--slots=2", "--max_length=256")
    found = prepared(*arguments)
    run(found, TinyModels())
    file = found.cells[1].settings.answers("spec")
    file.write_text(file.read_text().splitlines(keepends=True)[0])
    again = prepared(*arguments)
    run(again, TinyModels())
    shown, lines = report(again)
    assert [line["speedup"] for line in lines] == ["1.0", ""] and lines[1]["throughput"] == ""
    assert "stored/spec-length4: no throughput, for a former run answered a part" in shown


def test_a_killed_sweep_goes_on_and_gives_the_same_tables(prepared, tmp_path):
    arguments = ("--precisions=fp16,w8a8", "--methods=baseline,spec")
    with pytest.raises(KeyboardInterrupt):
        run(prepared(*arguments), FakeModels(kill_at=4))
    again, models = prepared(*arguments), FakeModels()
    assert again.answered == {"fp16/baseline": 2, "fp16/spec-length4": 0, "w8a8/baseline": 0, "w8a8/spec-length4": 0}
    run(again, models)
    assert len(models.asked) == 4
    _, lines = report(again)
    whole = prepared(*arguments, f"--output_dir={tmp_path / 'whole'}")
    run(whole)
    _, expected = report(whole)
    for line in (*lines, *expected):
        del line["answers"]
    assert lines == expected
    assert (again.output_dir / "table.md").read_text() == (whole.output_dir / "table.md").read_text()


def test_finished_cells_are_not_run_again(prepared):
    run(prepared("--methods=baseline"))
    models, more = FakeModels(), prepared("--methods=baseline,spec")
    assert more.finished == {"stored/baseline"}
    _, printed = run(more, models)
    assert [settings.methods for settings in models.asked] == [("spec",)]
    assert "cells: 2, questions in each: 3, finished before: 1" in printed
    none = FakeModels()
    run(prepared("--methods=baseline,spec"), none)
    assert not none.asked
    fresh = FakeModels()
    run(prepared("--methods=baseline,spec", "--noresume"), fresh)
    assert len(fresh.asked) == 2


def test_answers_of_other_settings_are_found_before_anything_runs(prepared):
    run(prepared("--methods=baseline"))
    with pytest.raises(UserError, match="max_new_tokens 9 there and 10 here.*--noresume"):
        prepared("--methods=baseline,spec", "--max_new_tokens=10")


def test_a_failed_cell_is_recorded_and_the_others_run(prepared):
    found = prepared("--precisions=fp16,w8a8", "--methods=baseline,spec,eagle2")
    broken = {"spec": UserError("no such drafter; name another"), "eagle2": RuntimeError("out of luck\nfor good")}
    failures, printed = run(found, FakeModels(broken=broken))
    assert list(failures) == [f"{precision}/{name}" for precision in ("fp16", "w8a8")
                              for name in ("spec-length4", "eagle2-depth3-top_k2-size4")]
    assert failures["fp16/spec-length4"] == "no such drafter; name another"
    assert failures["w8a8/eagle2-depth3-top_k2-size4"].startswith("RuntimeError: out of luck (traceback in ")
    traceback = found.cells[2].traceback
    assert "out of luck" in traceback.read_text() and "Traceback" in traceback.read_text()
    shown, lines = report(found, failures.items())
    assert [line["error"] for line in lines][:2] == ["", "no such drafter; name another"]
    assert "failed: fp16/spec-length4: no such drafter" in shown and "fp16/spec-length4: failed: no such drafter" in printed
    assert "failed: fp16/spec-length4" in (found.output_dir / "table.md").read_text()
    assert lines[1]["tokens_per_second"] == "" and float(lines[3]["speedup"]) == 1
    models = FakeModels()
    failures, _ = run(prepared("--precisions=fp16,w8a8", "--methods=baseline,spec,eagle2"), models)
    assert not failures and len(models.asked) == 4 and not traceback.exists()


def test_a_process_that_ends_early_costs_the_cell_it_was_at(prepared):
    found, models, groups = prepared("--methods=baseline,spec", "--draft_lengths=2,3"), FakeModels(), []

    def reports(work, cells):
        groups.append([cell.name for cell in cells])
        for cell in cells:
            yield Event(cell=cell.name, kind="started")
            if cell.name.endswith("length2"):
                raise ProcessEnded("the process was ended by SIGKILL")
            events = []
            work([cell], events.append, models)
            yield from events

    failures = sweep.run(found, Console(file=io.StringIO()), reports)
    assert failures == {"stored/spec-length2": "the process was ended by SIGKILL"}
    assert groups == [["stored/baseline", "stored/spec-length2", "stored/spec-length3"], ["stored/spec-length3"]]
    assert len(models.asked) == 2


def test_the_time_left_is_that_of_the_pace_so_far():
    now = [0.0]
    tally = Tally(waiting={"a": 2, "b": 4}, cells=3, clock=lambda: now[0])
    assert tally.left == "time left unknown" and tally.ended == 1
    now[0] = 30.0
    tally.count(Event(cell="a", kind="answered"))
    assert tally.left == "about 2 min left"  # five at 30 s each
    tally.count(Event(cell="b", kind="failed"))
    assert tally.left == "about 30 s left" and tally.ended == 2
    tally.count(Event(cell="a", kind="answered"))
    tally.count(Event(cell="a", kind="finished"))
    assert tally.left == "none left" and tally.ended == 3


def test_a_terminal_shows_a_bar_and_the_notes():
    printed = io.StringIO()
    with display(Console(file=printed, width=140, force_terminal=True), {"a": 1, "b": 1}, cells=3, done=2) as shown:
        for event in (Event(cell="a", kind="started"), Event(cell="a", kind="note", text="memory: 2.0 GB"),
                      Event(cell="a", kind="answered", speed=12.5), Event(cell="a", kind="finished"),
                      Event(cell="b", kind="failed", text="no such drafter")):
            shown.show(event)
    assert "a: memory: 2.0 GB" in printed.getvalue() and "b: failed: no such drafter" in printed.getvalue()
    assert "4/4" in printed.getvalue() and "cell 3 of 3, none left" in printed.getvalue()


def test_heat_maps_have_the_settings_that_vary(prepared):
    found = prepared("--precisions=fp16,w8a8", "--methods=eagle2,spec,baseline", "--tree_depths=2,4", "--tree_top_ks=2,3",
                     "--tree_sizes=3,4", "--draft_lengths=2,4")
    run(found)
    rows = sweep_report.rows(found, {})
    trees = sweep_report.heat_maps(rows, "eagle2")
    assert [heat.title for heat in trees] == ["eagle2 at fp16, best top-k", "eagle2 at w8a8, best top-k"]
    assert trees[0].rows == (2, 4) and trees[0].columns == (3, 4)
    assert (trees[0].y, trees[0].x) == ("tree depth", "tree size, nodes")
    assert trees[1].values[4, 3] == pytest.approx(9 / 0.2) and trees[1].values[2, 4] == pytest.approx(9 / 0.4)
    (chain,) = sweep_report.heat_maps(rows, "spec")
    assert chain.rows == ("fp16", "w8a8") and chain.columns == (2, 4) and chain.values["w8a8", 4] == pytest.approx(9 / 0.2)
    assert sweep_report.heat_maps(rows, "baseline") == []


def test_a_bar_is_the_fastest_choice_of_its_method(prepared):
    found = prepared("--precisions=fp16,w8a8", "--methods=baseline,spec", "--draft_lengths=4,2")
    run(found)
    base, bars = sweep_report.bars(sweep_report.rows(found, {}))
    assert base == "fp16/baseline"
    assert [(bar.group, bar.series, round(bar.speedup, 6), bar.relative and round(bar.relative, 6)) for bar in bars] == [
        (group, *rest) for group in ("fp16", "w8a8") for rest in (("plain", 1, None), ("+ spec", 4, 4))]


def test_without_plain_decoding_there_are_no_speedups(prepared):
    found = prepared("--methods=spec", "--draft_lengths=2,4")
    run(found)
    shown, lines = report(found)
    assert [line["speedup"] for line in lines] == ["", ""] and "over" not in shown
    assert all(float(line["tokens_per_second"]) > 0 for line in lines)


def test_cells_of_one_target_share_it_and_the_small_model(prepared):
    found = prepared(f"--model={DATA / 'checkpoints' / 'fp16'}", "--methods=baseline,spec,hier", "--draft_lengths=2,3",
                     f"--eagle={HEADS / 'eagle2_head'}", "--draft_precision=w4a16-g64", "--max_length=300")
    models = LoadedModels()
    before = models.plan(found.cells[0].settings, ["spec"]).parts
    benches = [models.load(cell.settings) for cell in found.cells]
    assert len({id(bench.target) for bench in benches}) == 1 and len({id(bench.small_model) for bench in benches}) == 1
    drafters = [bench.decoder(cell.variant.method).drafter for bench, cell in zip(benches, found.cells, strict=True)]
    assert [drafter.max_depth for drafter in drafters[:3]] == [0, 2, 3]
    after = models.plan(found.cells[1].settings, ["spec"]).parts
    assert before["target"] > 0 and before["draft model"] > 0
    assert after == {**before, "target": 0, "draft model": 0}


def command(*arguments):
    return subprocess.run([sys.executable, "-m", "experiments.sweep", *map(str, arguments)], cwd=ROOT, text=True,
                          capture_output=True, timeout=600)


@pytest.mark.slow
def test_one_command_runs_every_precision_and_goes_on_after_failures(tmp_path):
    asked = [f"--model={DATA / 'checkpoints' / 'fp16'}", "--precisions=fp16,w8a8", "--question_end=1", "--max_new_tokens=8",
             "--max_length=900", f"--output_dir={tmp_path / 'out'}"]
    result = command("--methods=spec,baseline", f"--drafter={tmp_path / 'none'}", *asked)
    assert result.returncode == 2 and "error: 2 of 4 cells failed, see above" in result.stderr, result.stderr
    assert "Traceback" not in result.stderr and result.stderr.count("spec-length4: failed: ") == 2
    with (tmp_path / "out" / "table.csv").open() as file:
        found = [(line["precision"], line["method"], f"{tmp_path}/none" in line["error"]) for line in csv.DictReader(file)]
    assert found == [(precision, method, method == "spec") for precision in ("fp16", "w8a8") for method in ("spec", "baseline")]
    assert (tmp_path / "out" / "speedup.png").read_bytes().startswith(b"\x89PNG")
    again = command("--methods=baseline", *asked)
    assert again.returncode == 0 and "cells: 2, questions in each: 1, finished before: 2" in again.stderr, again.stderr


def test_a_finished_cell_whose_answers_were_cut_off_does_the_rest(prepared):
    run(prepared("--methods=baseline,spec"))
    cell = prepared("--methods=baseline,spec").cells[1]
    file = cell.settings.answers("spec")
    file.write_bytes(file.read_bytes()[:-20])
    again, models = prepared("--methods=baseline,spec"), FakeModels()
    assert again.finished == {"stored/baseline"} and again.lost == ("stored/spec-length4",)
    assert again.answered == {"stored/baseline": 3, "stored/spec-length4": 2}
    run(again, models)
    assert [settings.methods for settings in models.asked] == [("spec",)] and len(cell.answers().found) == 3


def test_a_head_that_is_replaced_is_found_before_anything_runs(prepared, tmp_path):
    head = shutil.copytree(HEADS / "eagle2_head", tmp_path / "head")
    arguments = "--methods=baseline,eagle2", f"--eagle={head}"
    run(prepared(*arguments))
    assert len(prepared(*arguments).finished) == 2
    (head / "config.json").write_text((head / "config.json").read_text() + " ")
    with pytest.raises(UserError, match=r"eagle content '\w+' there and '\w+' here.*--noresume"):
        prepared(*arguments)


@pytest.mark.slow
def test_one_command_compares_throughputs(tmp_path):
    result = command(f"--model={DATA / 'checkpoints' / 'fp16'}", "--precisions=fp16,w8a8", "--methods=baseline,spec",
                     "--slots=2", "--question_end=2", "--max_new_tokens=8", "--max_length=900",
                     f"--output_dir={tmp_path / 'out'}")
    assert result.returncode == 0 and "2 questions side by side" in result.stdout, result.stderr
    with (tmp_path / "out" / "table.csv").open() as file:
        found = [(line["precision"], line["method"], line["slots"]) for line in csv.DictReader(file)
                 if float(line["throughput"]) > 0 and float(line["speedup"]) > 0]
    assert found == [(precision, method, "2") for precision in ("fp16", "w8a8") for method in ("baseline", "spec")]


@pytest.mark.slow
def test_a_second_sweep_in_one_directory_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    with claims.reported(tmp_path / "out"):
        result = command(f"--model={DATA / 'checkpoints' / 'fp16'}", "--methods=baseline", f"--output_dir={tmp_path / 'out'}")
    assert result.returncode == 2 and "another run is writing into" in result.stderr and "Traceback" not in result.stderr
