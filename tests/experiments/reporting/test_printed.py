"""What is printed is true: dashes, shares, bytes, speeds and widths."""

import dataclasses
import io
import json
import math
import types

import pytest
from benches import FakeBench, fake_plan, make_settings
from fuzzing import lengths, searching
from hypothesis import given
from hypothesis import strategies as st
from made_up_answers import write as write_answers
from printed_tables import table_cells
from rich.console import Console
from rich.progress import TimeRemainingColumn

from checkpoints_tools import arguments
from experiments import speedup
from experiments.answers import metrics
from experiments.cost import cost_plots
from experiments.cost.cost_search import chains
from experiments.cost.cost_study import Findings
from experiments.display import colors, plots, tables
from experiments.display.cells import NO_VALUE, change, milliseconds, number, part, percent, significant, times
from experiments.display.time_left import Pace
from experiments.reporting import answer_runs, figures, report
from experiments.running import methods, progress, runner
from experiments.running.methods import Choice
from experiments.serving import answer_view
from experiments.timing import device
from specmq_jax.decoding.costs.table import Costs, Curve, Span
from specmq_jax.words import count


def test_what_is_counted_is_singular_for_one_alone():
    assert [count(n, "token") for n in (0, 1, 2)] == ["0 tokens", "1 token", "2 tokens"]
    assert count(1, "problem is", "problems are") == "1 problem is" and count(3, "query", "queries") == "3 queries"


@pytest.mark.parametrize(("shown", "right"), [
    (percent(1.0), "100%"), (percent(0.0), "0%"), (percent(0.996), ">99%"), (percent(0.004), "<1%"), (percent(0.5), "50%"),
    (percent(0.9996, 1), ">99.9%"), (percent(0.0001, 1), "<0.1%"), (percent(None), "-"), (percent(0.995), ">99%"),
    (times(0.001), "<0.01x"), (times(1.0), "1.00x"), (times(None), "-"), (number(0.0, 2), "0.00"), (number(0.004, 2), "0.004"),
    (number(-0.0, 1), "0.0"), (number(None, 1), "-"), (milliseconds(0.0), "0.00"), (milliseconds(-0.000327), "-"),
    (milliseconds(1e-6), "0.001"), (change(-0.0001), "+0.0%"), (change(0.031), "+3.1%"), (part(1.01), ">100%"),
    (part(1.001), "100%"), (part(0.27), "27%"), (report.identical(0.942), "94.2%"), (report.identical(1.0), "100%"),
    (report.identical(0.57), "57%"), (significant(3117.2), "3117"), (significant(0.004861), "0.00486"),
    (significant(12.34), "12.3"), (report.identical(0.99996), ">99.9%")])
def test_a_figure_is_written_so_that_rounding_makes_nothing_untrue(shown, right):
    assert shown == right


@lengths
def test_only_all_is_a_hundred_percent_and_only_nothing_is_zero(examples):
    @searching(examples)
    @given(st.integers(1, 10**6), st.data(), st.sampled_from([0, 1, 2]))
    def check(total, data, digits):
        found = data.draw(st.integers(0, total))
        shown = percent(found / total, digits)
        assert (float(shown.rstrip("%")) == 100 if shown[0] not in "<>" else False) == (found == total)
        assert (float(shown.rstrip("%")) == 0 if shown[0] not in "<>" else False) == (found == 0)

    check()


@lengths
def test_a_number_is_shown_as_zero_only_if_it_is(examples):
    @searching(examples)
    @given(st.floats(-1e9, 1e9), st.integers(0, 3))
    def check(value, digits):
        shown = number(value, digits)
        assert (float(shown) == 0) == (value == 0) and not (value == 0 and shown.startswith("-"))

    check()


def test_a_question_without_a_second_token_has_no_speed():
    assert metrics.speed([1, 1], [0.001, 0.002]) is None and metrics.speed([1], [0.0]) is None
    assert metrics.speed([1, 9], [0.5, 1.5]) == 5.0
    assert metrics.mean_speed([None, 10.0, 20.0]) == 15.0 and metrics.mean_speed([None]) is None


@pytest.fixture(autouse=True)
def bandwidth(monkeypatch):
    monkeypatch.setattr(device, "device_bandwidth", lambda: 1e11)


def run(settings, bench=None, load=True):
    return runner.run(settings, load=(lambda _: bench or FakeBench()) if load else None, plan=fake_plan,
                      console=Console(file=io.StringIO()))


def printed_table(settings, results, width=100):
    console = Console(file=io.StringIO(), width=width)
    report.report(settings, results, console)
    return console.file.getvalue()


def kept_summary(settings):
    return json.loads((settings.output_dir / "summary.json").read_text(), parse_constant=pytest.fail)


def test_answers_of_one_token_have_dashes_for_speeds(tmp_path):
    settings = make_settings(tmp_path, max_new_tokens=1)
    printed = printed_table(settings, run(settings))
    assert "tokens/s" not in table_cells(printed) and "mean accept length" not in table_cells(printed)
    spec = kept_summary(settings)["methods"]["spec"]
    assert spec["tokens_per_second"] is None and spec["speedup"] is None and spec["achieved_bandwidth"] is None
    assert spec["mean_accept_length"] is None and spec["categories"] == {"writing": None, "math": None}
    assert "question 1 of 3 (writing), time left" not in printed
    found = runner.run(settings, load=None, console=Console(file=io.StringIO()))  # the files are read again
    assert found[0].answers[0].speed is None


def test_times_that_were_not_measured_are_dashes_and_zero_is_not(tmp_path):
    settings = make_settings(tmp_path)
    results = run(settings)
    measured = {"verify": None, "draft": 0.0, "prefill": -0.001}
    results[1] = dataclasses.replace(results[1], measured={**results[1].measured, **measured})
    cells = table_cells(printed_table(settings, results))
    assert cells["verify, ms a round"] == ["100.00", "-"] and cells["draft, ms a round"] == ["-", "0.00"]
    assert next(values for name, values in cells.items() if name.startswith("prefill")) == ["500.00", "-"]
    assert kept_summary(settings)["methods"]["spec"]["verify_time"] is None


def test_figures_that_are_no_numbers_are_null_in_json(tmp_path):
    settings = make_settings(tmp_path)
    results = run(settings)
    results[1] = dataclasses.replace(results[1], measured={**results[1].measured, "prefill": math.nan, "verify": math.inf})
    printed_table(settings, results)
    spec = kept_summary(settings)["methods"]["spec"]
    assert spec["prefill_time"] is None and spec["verify_time"] is None


def test_the_copy_speed_is_that_of_the_methods_own_moment(tmp_path, monkeypatch):
    speeds = iter([1e10, 2e10])
    monkeypatch.setattr(device, "device_bandwidth", lambda: next(speeds))
    settings = make_settings(tmp_path)
    printed = printed_table(settings, run(settings))
    # 1 GB a round of a tenth of a second
    assert table_cells(printed)["copy measured after it, GB/s"] == ["10.0", "20.0"]
    assert table_cells(printed)["of the device's copy speed"] == ["100%", "50%"]
    assert [kept_summary(settings)["methods"][name]["device_bandwidth"] for name in ("baseline", "spec")] == [1e10, 2e10]


def test_a_resumed_run_is_compared_with_no_copy(tmp_path):
    settings = make_settings(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(settings, FakeBench(kill_at=3))
    results = run(settings)
    assert results[0].measured["device_bandwidth"] is None and results[1].measured["device_bandwidth"] == 1e11
    assert table_cells(printed_table(settings, results))["of the device's copy speed"] == ["-", "10%"]


def test_more_than_the_copy_speed_is_explained_and_given_no_share(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "device_bandwidth", lambda: 8e9)
    settings = make_settings(tmp_path)
    printed = printed_table(settings, run(settings), width=400)
    assert table_cells(printed)["of the device's copy speed"] == [">100%", ">100%"]
    assert "baseline and spec: more is read than the device copies in the same time. A round reads 1000.0 MB" in printed


def test_the_rounds_inside_a_hierarchy_are_counted_by_turn():
    @dataclasses.dataclass
    class Small:
        min_draft_length: int = 3
        draft_model_start: bool = False

    answer = runner.Answer(
        question_id=1, category="a", prompt_tokens=(3, 3), texts=("", ""), token_ids=((), ()), new_tokens=(5, 5),
        wall_time=(1.0, 1.0), prefill_time=(), accept_lengths=(5, 5), draft_accept_lengths=(2, 2, 2, 2), cut=None,
        decoding_steps=(1, 1))
    # each turn drafts 2 + 2, all right, so that the small model goes ahead; the second turn begins without that token
    assert runner.inner_work([answer], Small()) == {"inner_rounds": 2.0, "ahead": 1.0}
    joined = dataclasses.replace(answer, decoding_steps=(2,), draft_accept_lengths=(2, 2, 2))
    assert runner.inner_work([joined], Small()) == {"inner_rounds": 1.5, "ahead": 1.0}  # behind one ahead, 1 + 2 suffice


TREE = methods.sm.TreeConfig(depth=3, top_k=4, size=7)


@pytest.mark.parametrize(("choice", "setting", "kept"), [
    (Choice(method="eagle3", tree=TREE, predicted=45.12), "3/4/7", {"tree": {"depth": 3, "top_k": 4, "size": 7}}),
    (Choice(method="spec", draft_length=1, predicted=45.12), "1 token", {"draft_length": 1}),
    (Choice(method="hier", tree=TREE, min_draft_length=2, predicted=45.12), "3/4/7, 2 tokens", {"min_draft_length": 2})])
def test_what_auto_chose_stands_in_the_table_and_the_summary(tmp_path, choice, setting, kept):
    settings = make_settings(tmp_path, methods=("baseline", "auto"), models=methods.Models(auto=choice))
    printed = printed_table(settings, run(settings))
    cells = table_cells(printed)
    assert "auto:" in printed and f" {choice.method} ┃" in printed
    assert cells["chosen tree or draft length"] == ["-", setting] and cells["predicted tokens/s"] == ["-", "45.1"]
    said = " ".join(printed.split())
    assert f"auto is --method={choice.method}" in said and "predicted to make 45.1 tokens/s" in said
    chosen = kept_summary(settings)["methods"]["auto"]["chosen"]
    assert chosen["method"] == choice.method and chosen["predicted_tokens_per_second"] == 45.12
    assert kept.items() <= chosen.items()


def test_a_prediction_changes_nothing_in_what_a_choice_is():
    assert Choice(method="spec", predicted=1.0) == Choice(method="spec")
    assert repr(Choice(method="spec", predicted=1.0)) == repr(Choice(method="spec"))


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_column_of_a_report_is_cut(tmp_path, width):
    names = ("baseline", "spec", "eagle2", "eagle3", "hier", "auto")
    settings = make_settings(tmp_path, models=methods.Models(auto=Choice(method="eagle3")))
    baseline, spec = run(settings)
    results = [dataclasses.replace(spec if name != "baseline" else baseline, method=name) for name in names]
    printed = printed_table(settings, results, width=width)
    assert printed.count("45.0 ") >= 5 and "…" not in printed
    assert max(len(line) for line in printed.splitlines() if line.startswith("│")) <= width


COLUMNS = {"": lambda row: row, **{f"figure {i}": (lambda row, i=i: f"{i}{i}{i}.{i}") for i in range(9)}}


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("name", ["T_v(1)", "a/very/long/path/to/some/answers/of/a/run/baseline.jsonl#12"])
def test_a_table_too_wide_goes_on_below_with_its_rows_named_again(width, name):
    console = Console(file=io.StringIO(), width=width)
    tables.show(COLUMNS, [name], console, texts=1, title="behind 512 tokens")
    printed = console.file.getvalue()
    for i in range(9):
        assert f"figure {i}" in printed and f"{i}{i}{i}.{i}" in printed
    lines = printed.splitlines()
    assert max(map(len, lines)) <= width and "…" not in printed
    assert printed.count("┏") == printed.count(name[:6])


@pytest.mark.parametrize(("columns", "width"), [("80", 80), (None, 200)])
def test_a_pipe_is_as_wide_as_columns_says(monkeypatch, columns, width):
    monkeypatch.setattr(Console, "is_terminal", False)
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    assert tables.stdout().width == width


def test_runs_are_compared_over_the_questions_that_have_speeds(tmp_path):
    base, fast = (answer_runs.find(str(write_answers(tmp_path / f"{i}.jsonl", speeds)))[0].answers
                  for i, speeds in enumerate([(10.0, 20.0), (20.0, 60.0)]))
    both = figures.compare(fast, base)
    assert both.speedup == pytest.approx(40 / 15) and both.mean_ratio == pytest.approx(2.5)
    short = [dataclasses.replace(answer, new_tokens=(1,), wall_time=(0.0,), accept_lengths=()) for answer in (base[0], fast[0])]
    found = figures.compare([short[1], fast[1]], [short[0], base[1]])
    assert found.mean_ratio == pytest.approx(3.0) and found.interval is None and found.speedup == pytest.approx(3.0)
    none = figures.compare([short[1]], [short[0]])
    assert (none.tokens_per_second, none.speedup, none.mean_ratio, none.accept_length) == (None, None, None, None)
    run = answer_runs.find(str(tmp_path / "0.jsonl"))[0]
    rows = [speedup.Row(label="a", run=run, category=speedup.OVERALL, figures=none)]
    assert speedup.bars(rows) == [] and all(speedup.FIELDS[name](rows[0]) is None for name in ("speedup", "mean_ratio"))
    assert [speedup._COLUMNS[name](rows[0]) for name in ("tokens/s", "speedup", "accept\nlength")] == [NO_VALUE] * 3


def test_every_method_has_one_colour_in_every_picture():
    few, all_of_them = colors.colors(["eagle3", "baseline"]), colors.colors(methods.METHODS)
    assert few["eagle3"] == all_of_them["eagle3"] and few["baseline"] == all_of_them["baseline"]
    assert colors.colors(["plain", "+ eagle3"]) == {"plain": few["baseline"], "+ eagle3": few["eagle3"]}
    many = colors.colors([*methods.METHODS, *(f"run {i}" for i in range(60))])
    assert len(set(many.values())) == len(many)


def test_a_picture_names_benchmark_count_and_unit(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    settings = make_settings(tmp_path)
    plots.plot(report.summarise(settings, run(settings)), tmp_path / "plot.png")
    assert drawn[0].axes[0].get_ylabel() == "tokens/s (MT-Bench, 3 questions)"
    assert "MT-Bench, 3 questions" in drawn[0].get_suptitle()
    bars = drawn[0].axes[0].containers[0]
    assert plots.colors(["baseline", "spec"])["spec"] == "#1f77b4" and bars[1].get_facecolor()[2] == pytest.approx(0xb4 / 255)


def test_a_picture_of_a_run_without_speeds_can_be_drawn(tmp_path):
    settings = make_settings(tmp_path, max_new_tokens=1)
    plots.plot(report.summarise(settings, run(settings)), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_prediction_has_the_spread_of_its_parts_and_counts_tokens_as_a_run_does():
    verify = Curve.rising((1, 4), [Span(median=1.0, fastest=0.5, slowest=3.0), Span(median=2.0, fastest=1.0, slowest=5.0)])
    costs = Costs(plain=1.0, plain_spread=(0.5, 3.0), verify=verify, draft=Curve(at=(0, 3), seconds=(0.0, 0.3)), rest=0.1)
    (chain,) = chains(costs, [[3, 2, 1, 0]], [3])
    assert chain.seconds == pytest.approx(2.4) and chain.spread == pytest.approx((1.4, 5.4))
    findings = Findings(predictions=(chain,), verify={"fp16": verify}, answers=1, tokens=5)
    # four tokens behind the first in a round of 2.4 s; the first counts, as in every speed
    assert findings.tokens_per_second(chain) == pytest.approx(metrics.speed([5], [2.4]))


def test_the_cost_curves_are_drawn(tmp_path):
    verify = Curve.rising((1, 4), [Span(median=1.0, fastest=0.5, slowest=3.0), Span(median=2.0, fastest=1.0, slowest=5.0)])
    costs = Costs(plain=1.0, verify=verify, draft=Curve(at=(0, 3), seconds=(0.0, 0.3)))
    found = tuple(chains(costs, [[3, 2, 1, 0]], [1, 2, 3]))
    cost_plots.plot(Findings(predictions=found, verify={"fp16": verify}, answers=1, tokens=5), "t", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_time_left_follows_from_the_pace():
    now = [0.0]
    pace = Pace(clock=lambda: now[0])
    assert pace.left(4) == "time left unknown" and pace.left(0) == "none left"
    now[0] = 30.0
    pace.count()
    assert pace.left(2) == "about 60 s left" and pace.left(4) == "about 2 min left" and pace.left(1000) == "about 8.3 h left"


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_tells_the_time_left_and_a_speed_where_there_is_one(tmp_path, terminal):
    answers = run(make_settings(tmp_path))[0].answers
    console = Console(file=io.StringIO(), force_terminal=terminal, width=150)
    with progress.progress(console, "spec", total=3, done=0) as shown:
        shown.doing(progress.ANSWERING)
        shown.answered(answers[0])
        shown.answered(dataclasses.replace(answers[1], new_tokens=(1,)))
    printed = console.file.getvalue()
    assert "about 0 s left" in printed
    if not terminal:
        assert "11.2 tokens/s" in printed and "question 2 of 3 (math), about" in printed




def test_a_chat_counts_tokens_as_a_run_does_and_no_time_but_the_rounds(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(answer_view, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    console = Console(file=io.StringIO(), width=80)
    with answer_view.AnswerView(console, console) as view:
        now[0] = 1.0  # of the prefill
        view.committed(1)
        assert view.figures == "1 token"
        now[0] = 5.0  # of showing the text
        view.add("a", drafted=False)
        now[0] = 7.0
        view.committed(4)
        now[0] = 99.0
    assert view.figures == f"5 tokens, {metrics.speed([5], [2.0])} tokens/s, accept length 4.00"


def test_the_bar_of_conversions_shows_the_time_left():
    assert any(isinstance(column, TimeRemainingColumn) for column in arguments.progress_bar().columns)
