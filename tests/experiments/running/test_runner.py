"""The runner over a model made of arithmetic: what it asks, what it writes, how it resumes."""

import dataclasses
import io
import json

import pytest
from benches import FakeBench, fake_plan, make_settings
from rich.console import Console

import specmq_jax as sm
from experiments.running import runner
from experiments.running.methods import Models
from experiments.timing import device
from specmq_jax.errors import UserError
from specmq_jax.loading import memory


@pytest.fixture(autouse=True)
def _no_bandwidth_measurement(monkeypatch):
    monkeypatch.setattr(device, "device_bandwidth", lambda: 1e11)


def run(settings, bench=None):
    """The results and what was printed."""
    bench, printed = bench or FakeBench(), io.StringIO()
    results = runner.run(settings, load=lambda _: bench, plan=fake_plan, console=Console(file=printed, width=500))
    return results, printed.getvalue()


def no_load(settings):
    raise AssertionError("a model was loaded")


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(path):
    return [{key: value for key, value in record.items() if key not in ("answer_id", "tstamp")}
            for record in records(path)]


def test_answers_have_the_schema(tmp_path):
    settings = make_settings(tmp_path)
    run(settings)
    found = records(settings.output_dir / "spec.jsonl")
    assert [record["question_id"] for record in found] == [1, 2, "c"]
    first = found[0]
    assert set(first) == {"question_id", "category", "answer_id", "model_id", "tstamp", "choices"}
    assert first["model_id"] == "SmolLM2-135M-Instruct-fp16-spec"
    (choice,) = first["choices"]
    assert choice["new_tokens"] == [9, 9] and choice["decoding_steps"] == [2, 2]
    assert choice["accept_lengths"] == [4, 4, 4, 4]
    assert choice["wall_time"] == [0.2, 0.2] and choice["generate_speed"] == pytest.approx([45, 45])
    assert choice["prefill_time"] == [0.5, 0.5] and choice["draft_prefill_time"] == [0.25, 0.25]
    assert [bytes(ids).decode() for ids in choice["token_ids"]] == choice["turns"]
    assert choice["index"] == 0 and choice["cut"] is None


def test_a_later_turn_holds_the_models_own_answer_to_the_earlier_one(tmp_path):
    settings, bench = make_settings(tmp_path), FakeBench()
    run(settings, bench)
    (first, *_) = records(settings.output_dir / "baseline.jsonl")
    expected = f"u: Name a colour.\na: {first['choices'][0]['turns'][0]}\nu: Another one.\n"
    assert bytes(bench.decoders["baseline"].prompts[1]).decode() == expected


@pytest.mark.parametrize("unfinished", ["", '{"question_id": 2, "cat', '{"question_id": 2}'])
def test_a_killed_run_goes_on_where_it_stopped(tmp_path, unfinished):
    settings, whole = make_settings(tmp_path), make_settings(tmp_path, output_dir=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(settings, FakeBench(kill_at=3))
    with (settings.output_dir / "baseline.jsonl").open("a") as file:
        file.write(unfinished)
    bench = FakeBench()
    _, printed = run(settings, bench)
    run(whole)
    assert len(bench.decoders["baseline"].prompts) == 3
    assert "baseline: 1 of 3 answers found" in printed
    for method in settings.methods:
        name = f"{method}.jsonl"
        assert without_times(settings.output_dir / name) == without_times(whole.output_dir / name)


def test_a_finished_run_is_reported_again_without_loading_a_model(tmp_path):
    settings = make_settings(tmp_path)
    first, _ = run(settings)
    assert runner.run(settings, load=no_load, console=Console(file=io.StringIO())) == first


@pytest.mark.parametrize(("changes", "difference"), [
    ({"max_new_tokens": 10}, "max_new_tokens 9 there and 10 here"),
    ({"models": Models(draft_length=2)}, "draft_length 4 there and 2 here"),
    ({"models": Models(precision="w4a16")}, "precision 'as stored' there and 'w4a16' here"),
    ({"question_end": 2}, "questions 'questions.jsonl 0:3"),
    ({"reproducible": True}, "reproducible None there and True here"),
])
def test_answers_of_other_settings_are_neither_mixed_nor_lost(tmp_path, changes, difference):
    settings = make_settings(tmp_path)
    run(settings)
    before = (settings.output_dir / "spec.jsonl").read_bytes()
    changed = dataclasses.replace(settings, methods=("spec",), **changes)
    with pytest.raises(UserError) as error:
        runner.run(changed, load=no_load)
    assert difference in str(error.value) and "--noresume" in str(error.value)
    assert (settings.output_dir / "spec.jsonl").read_bytes() == before
    run(dataclasses.replace(changed, resume=False))
    assert (settings.output_dir / "spec.jsonl").read_bytes() != before


def test_each_difference_is_recorded_with_the_targets_gap_behind_the_common_text(tmp_path):
    settings, bench = make_settings(tmp_path), FakeBench(slip=True)
    results, _ = run(settings, bench)
    recorded = results[1].measured["differences"]
    assert [(d["question_id"], d["turn"], d["position"]) for d in recorded] == [(1, 0, 3), (2, 0, 3), ("c", 1, 3)]
    base, spec = (records(settings.output_dir / f"{method}.jsonl") for method in settings.methods)
    for entry, place in zip(recorded, (0, 1, 2), strict=True):
        ours, theirs = (side[place]["choices"][0]["token_ids"][entry["turn"]][3] for side in (spec, base))
        assert entry["tokens"] == [theirs, ours] and entry["gap"] == 0.25 and entry["top_two"]
    said = base[2]["choices"][0]["turns"]
    assert bytes(bench.decoders["spec"].scored[2]).decode() == (
        f"u: What is 1 + 1?\na: {said[0]}\nu: And 2 + 2?\n{said[1][:3]}")
    assert "differences" not in results[0].measured
    assert runner.run(settings, load=no_load, console=Console(file=io.StringIO())) == results


def test_differences_are_measured_whichever_run_made_the_baseline(tmp_path):
    whole = make_settings(tmp_path, output_dir=tmp_path / "whole")
    expected = run(whole, FakeBench(slip=True))[0][1].measured["differences"]
    settings = make_settings(tmp_path)
    for methods in (("spec",), ("baseline",)):
        results, _ = run(dataclasses.replace(settings, methods=methods), FakeBench(slip=True))
        assert "differences" not in results[0].measured
    bench = FakeBench(slip=True)
    results, _ = run(settings, bench)
    assert results[1].measured["differences"] == expected and not bench.decoders["baseline"].prompts
    backwards = make_settings(tmp_path, output_dir=tmp_path / "backwards", methods=("spec", "baseline"))
    assert run(backwards, FakeBench(slip=True))[0][0].measured["differences"] == expected


def test_sampled_answers_are_not_searched_for_ties(tmp_path):
    results, _ = run(make_settings(tmp_path, sampling=sm.Sampling()), FakeBench(slip=True))
    assert "differences" not in results[1].measured


def test_other_draft_settings_keep_the_baselines_answers(tmp_path):
    settings, bench = make_settings(tmp_path, methods=("baseline",)), FakeBench()
    run(settings)
    run(dataclasses.replace(settings, methods=("baseline", "spec"), models=Models(draft_length=2)), bench)
    assert list(bench.decoders) == ["spec"]


def test_answers_without_their_settings_are_refused(tmp_path):
    settings = make_settings(tmp_path)
    run(settings)
    (settings.output_dir / "baseline.settings.json").unlink()
    with pytest.raises(UserError, match="missing or damaged"):
        runner.run(settings, load=no_load)


def test_a_damaged_answer_in_the_middle_is_named(tmp_path):
    settings = make_settings(tmp_path)
    run(settings)
    path = settings.output_dir / "baseline.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[1][:30] + "\n", lines[2]]))
    with pytest.raises(UserError, match=r"baseline.jsonl, line 2: no answer of this format"):
        runner.run(settings, load=no_load)


def test_a_first_turn_longer_than_the_cache_is_found_before_the_first_question(tmp_path):
    settings = make_settings(tmp_path)
    bench = FakeBench(max_length=len("u: What is 6 times 7?\n"))
    with pytest.raises(UserError, match="the first turn of question 2 has 22 tokens, the cache holds 22"):
        run(settings, bench)
    assert not (settings.output_dir / "baseline.jsonl").exists()


def test_a_later_turn_longer_than_the_cache_ends_its_question_and_is_told(tmp_path):
    settings = make_settings(tmp_path)
    results, printed = run(settings, FakeBench(max_length=40))
    cuts = [(answer.question_id, len(answer.new_tokens)) for answer in results[0].answers if answer.cut]
    assert cuts == [(1, 1), ("c", 1)]
    assert "baseline: question 1 ends early: turn 2 has a prompt of 47 tokens, the cache holds 40" in printed


def test_an_unwritable_directory_is_found_before_a_model_is_loaded(tmp_path):
    (tmp_path / "file").write_text("")
    settings = make_settings(tmp_path, output_dir=tmp_path / "file" / "out")
    with pytest.raises(UserError, match="can't be written to: Not a directory"):
        runner.run(settings, load=no_load)


def test_the_memory_that_is_needed_is_printed_before_a_model_is_loaded(tmp_path):
    printed = io.StringIO()

    def load(settings):
        assert printed.getvalue() == "memory: target 2.0 GB, baseline 80.0 MB, spec 80.0 MB: 2.2 GB\n"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run(make_settings(tmp_path), load=load, plan=fake_plan, console=Console(file=printed, width=20))
    settings = make_settings(tmp_path)
    run(dataclasses.replace(settings, methods=("baseline",)))
    assert "memory: target 2.0 GB, spec 80.0 MB: 2.1 GB\n" in run(settings)[1]  # of what is still to be done


def test_too_little_memory_is_found_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "room", lambda: memory.Room(free=2 * 10**9, limit=3 * 10**9))
    printed = io.StringIO()
    with pytest.raises(UserError) as error:
        runner.run(make_settings(tmp_path), load=no_load, plan=fake_plan, console=Console(file=printed, width=500))
    assert "takes 2.2 GB of device memory" in str(error.value) and "has 2.0 GB free of 3.0 GB" in str(error.value)
    assert "\n" not in str(error.value) and "2.2 GB of 2.0 GB free" in printed.getvalue()


def test_progress_off_a_terminal_is_plain_lines(tmp_path):
    _, printed = run(make_settings(tmp_path))
    assert "spec: question 3 of 3 (math), 45.0 tokens/s\n" in printed
    assert "\x1b" not in printed
