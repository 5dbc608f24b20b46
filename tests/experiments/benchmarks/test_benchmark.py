"""What a benchmark changes in a run, and the three that are asked in their own ways."""

import dataclasses
import io
import json

import pytest
from absl import flags as absl_flags
from absl.testing import flagsaver
from benches import FakeBench, fake_plan, make_settings
from rich.console import Console
from typed import ROOT, command

from experiments.benchmarks import gsm8k, human_eval, spec_bench
from experiments.benchmarks.benchmark import MT_BENCH, Benchmark
from experiments.inputs.questions import dialogue
from experiments.reporting import benchmark_command
from experiments.running import flags, runner
from experiments.timing import device
from specmq_jax.errors import UserError


@pytest.fixture(autouse=True)
def _no_bandwidth_measurement(monkeypatch):
    monkeypatch.setattr(device, "device_bandwidth", lambda: 1e11)


def run(settings, bench):
    return runner.run(settings, load=lambda _: bench, plan=fake_plan, console=Console(file=io.StringIO()))


SHOUTING = Benchmark(
    name="shouting", sample=None, published=None, parse=dialogue,
    encode=lambda bench, messages: bench.encode([m | {"content": m["content"].upper()} for m in messages]),
    text=lambda bench, generation: f"{len(generation.tokens)} tokens")


def test_its_prompts_are_asked_and_its_texts_kept(tmp_path):
    settings, bench = make_settings(tmp_path, benchmark=SHOUTING), FakeBench(slip=True)
    results = run(settings, bench)
    asked = [bytes(prompt).decode() for prompt in bench.decoders["baseline"].prompts]
    assert asked[:2] == ["u: NAME A COLOUR.\n", "u: NAME A COLOUR.\na: 9 TOKENS\nu: ANOTHER ONE.\n"]
    assert results[0].answers[0].texts == ("9 tokens", "9 tokens")
    # differences are looked up behind the same prompts
    assert bytes(bench.decoders["spec"].scored[0]).decode().startswith("u: NAME A COLOUR.\n")


def test_its_questions_are_read_in_its_format(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps({"question": "6 * 7?", "answer": "#### 42"}) + "\n")
    benchmark = dataclasses.replace(SHOUTING, parse=gsm8k.parse_question)
    results = run(make_settings(tmp_path, benchmark=benchmark, question_file=path), FakeBench())
    assert [(answer.question_id, answer.category) for answer in results[0].answers] == [(0, "gsm8k")]


def test_answers_of_another_benchmark_are_not_gone_on_with(tmp_path):
    run(make_settings(tmp_path), FakeBench())
    with pytest.raises(UserError, match="benchmark None there and 'shouting' here"):
        run(make_settings(tmp_path, benchmark=SHOUTING), FakeBench())


def test_a_question_file_is_a_path_or_the_published_one_or_the_sample(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECMQ_CACHE", str(tmp_path))
    (tmp_path / "questions").mkdir()
    (tmp_path / "questions" / "mt_bench.jsonl").write_text("downloaded before")
    assert MT_BENCH.question_file(None) == MT_BENCH.sample
    assert str(MT_BENCH.question_file("own/file.jsonl")) == "own/file.jsonl"
    assert MT_BENCH.question_file("published").read_text() == "downloaded before"


@pytest.mark.parametrize(("benchmark", "given", "expected"), [
    (MT_BENCH, [], (64, 1024)), (spec_bench.BENCHMARK, [], (64, 1024)), (gsm8k.BENCHMARK, [], (256, 2048)),
    (human_eval.BENCHMARK, [], (512, 1024)), (gsm8k.BENCHMARK, ["--max_new_tokens=7", "--max_length=99"], (7, 99)),
])
def test_lengths_suit_the_benchmark_where_no_flag_gives_them(benchmark, given, expected, monkeypatch):
    monkeypatch.setattr(flags.jax, "default_backend", lambda: "cpu")
    with flagsaver.flagsaver():
        absl_flags.FLAGS(["program", "--method=baseline", *given])
        settings = flags.settings(benchmark.name, benchmark=benchmark)
    assert (settings.max_new_tokens, settings.max_length) == expected
    assert settings.question_file == benchmark.sample and settings.benchmark == benchmark
    assert settings.output_dir.name == f"{benchmark.name}-SmolLM2-135M-Instruct"


def run_by_flags(name, directory, *more):
    """The figures of method spec."""
    result = command(name, f"--model={ROOT / 'tests' / 'data' / 'checkpoints' / 'fp16'}", "--methods=baseline,spec", *more,
                     "--draft_precision=w4a16-g64", "--question_end=2", "--max_new_tokens=6", "--max_length=1400",
                     f"--output_dir={directory}")
    assert result.returncode == 0, result.stderr
    figures = json.loads((directory / "summary.json").read_text())["methods"]["spec"]
    assert figures["identical_share"] == 1 and figures["turns"] == 2
    return figures


@pytest.mark.slow
def test_gsm8k_runs_by_flags_alone_and_goes_on_where_it_stopped(tmp_path):
    score = run_by_flags("gsm8k", tmp_path)["score"]
    assert score["metric"] == "accuracy" and score["answered"] == 2
    lines = (tmp_path / "spec.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "spec.jsonl").write_text(lines[0])
    sidecar = json.loads((tmp_path / "spec.settings.json").read_text())
    (tmp_path / "spec.settings.json").write_text(json.dumps(sidecar | {"measured": None}))
    assert run_by_flags("gsm8k", tmp_path)["score"] == score
    assert (tmp_path / "spec.jsonl").read_text().startswith(lines[0])


@pytest.mark.slow
def test_human_eval_runs_by_flags_alone(tmp_path):
    assert run_by_flags("human_eval", tmp_path, "--allow_code_execution")["score"] == {
        "metric": "pass@1", "share": 0, "right": 0, "answered": 2}


def test_human_eval_without_leave_reports_speeds_and_says_how_to_score_later(tmp_path, monkeypatch, capsys):
    results = run(make_settings(tmp_path), FakeBench())
    monkeypatch.setattr(benchmark_command.runner, "run", lambda settings: results[:1])
    with flagsaver.flagsaver():
        absl_flags.FLAGS(["program", "--method=baseline", f"--output_dir={tmp_path / 'out'}"])
        benchmark_command.run(human_eval.BENCHMARK, ["program"])
    printed = capsys.readouterr().out
    assert "Not scored: pass@1 needs the model's programs to be run, which --allow_code_execution allows" in printed
    assert f"--score={tmp_path / 'out' / 'baseline.jsonl'} scores these answers" in printed
    assert "│ pass@1" not in printed and "tokens/s" in printed
