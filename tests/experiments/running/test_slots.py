"""Questions answered side by side: the answers are those of one by one, and their times are no speeds of a stream."""

import dataclasses
import io
import json

import pytest
from benches import TinyBench, fake_plan, make_settings
from rich.console import Console

import specmq_jax as sm
from experiments.answers import answer_files
from experiments.benchmarks.benchmark import MT_BENCH
from experiments.reporting import figures, report
from experiments.running import desk, runner


@pytest.fixture(scope="module")
def bench():
    return TinyBench()


def run(bench, settings):
    console = Console(file=io.StringIO(), width=200)
    return runner.run(settings, load=lambda _: bench, plan=fake_plan, console=console)


def test_answers_side_by_side_are_those_of_one_by_one(tmp_path, bench):
    alone = run(bench, make_settings(tmp_path, output_dir=tmp_path / "alone"))
    settings = make_settings(tmp_path, slots=2)
    beside = run(bench, settings)
    for one, other in zip(alone, beside, strict=True):
        tokens = {answer.question_id: answer.token_ids for answer in one.answers}
        assert {answer.question_id: answer.token_ids for answer in other.answers} == tokens
        assert [len(answer.new_tokens) for answer in sorted(other.answers, key=lambda answer: str(answer.question_id))] == [
            2, 1, 2]
        assert {answer.speed for answer in other.answers} == {None} and other.measured["throughput"] > 0
    compared = figures.compare(beside[1].answers, alone[0].answers)
    assert compared.tokens_per_second is None and compared.mean_ratio is None and compared.identical_share == 1
    assert compared.accept_length > 3  # of four at most: the last round of an answer is cut
    summary = report.summarise(settings, beside)
    assert summary["methods"]["spec"]["speedup"] == beside[1].measured["throughput"] / beside[0].measured["throughput"]
    shown = Console(file=io.StringIO(), width=200)
    report.report(settings, beside, shown)
    assert "2 questions side by side: tokens/s of all together" in shown.file.getvalue()
    assert run(None, settings) == beside  # which asks no model again
    with pytest.raises(sm.UserError, match="slots"):
        run(bench, dataclasses.replace(settings, slots=1))


def test_a_run_goes_on_and_tells_no_throughput_of_a_part(tmp_path, bench):
    settings = make_settings(tmp_path, methods=("baseline",), slots=2)
    whole = run(bench, settings)[0].answers
    file = settings.answers("baseline")
    file.write_text(file.read_text().splitlines(keepends=True)[0])
    again = run(bench, settings)[0]
    assert {(answer.question_id, answer.token_ids) for answer in again.answers} == {
        (answer.question_id, answer.token_ids) for answer in whole}
    assert again.measured["throughput"] is None
    assert json.loads(file.read_text().splitlines()[0])["choices"][0]["generate_speed"][0] is None
    line = file.read_text().splitlines()[0]
    file.write_text(line.replace('"slots": 2', '"slots": 0'))
    with pytest.raises(sm.UserError, match="'slots' must be a whole number above 0"):
        answer_files.read(file)


def test_an_answer_ends_at_its_string_beside_others_as_alone(tmp_path, bench, monkeypatch):
    monkeypatch.setattr(desk.tokens, "decode", lambda _, ids: bytes(ids).decode())
    settings = make_settings(tmp_path, max_new_tokens=40)
    asked = settings.questions()
    plain = desk.Desk(bench=bench, benchmark=MT_BENCH).converse(bench.decoder("spec"), asked[0], 40).turns[0].text
    ending = desk.Desk(bench=bench, benchmark=dataclasses.replace(MT_BENCH, stop_strings=(plain[5:7],)))
    alone = {question.id: ending.converse(bench.decoder("spec"), question, 40) for question in asked}
    decoder = bench.decoder("spec")
    with sm.Engine(decoder.target, decoder.drafter, decoder.config, slots=2) as engine:
        beside = {dialogue.question.id: dialogue for dialogue in ending.converse_side_by_side(engine, asked, 40)}
    assert beside.keys() == alone.keys()
    for name, dialogue in beside.items():
        for turn, expected in zip(dialogue.turns, alone[name].turns, strict=True):
            assert turn.text == expected.text and turn.generation.stopped == expected.generation.stopped
            assert turn.generation.tokens.tolist() == expected.generation.tokens.tolist()
            assert turn.generation.accept_lengths.tolist() == expected.generation.accept_lengths.tolist()
    assert len(beside[1].turns[0].text) <= 7


def test_a_later_turn_longer_than_the_cache_ends_its_question(tmp_path):
    bench = TinyBench(max_length=64)
    settings = make_settings(tmp_path, methods=("baseline",), slots=2, max_length=64, max_new_tokens=30)
    cut = {answer.question_id: answer.cut for answer in run(bench, settings)[0].answers}
    assert cut[2] is None and "turn 2 has a prompt of" in cut[1]
