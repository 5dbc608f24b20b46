"""What a training leaves goes on with the same settings alone, whatever was cut off, removed or damaged."""

import contextlib
import dataclasses
import io
import json
import pathlib
import shutil
import tempfile

import numpy as np
import pytest
from fuzzing import lengths, searching
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import specmq_jax as sm
from checkpoints_tools import train_eagle
from checkpoints_tools.conversion import convert
from checkpoints_tools.training import answer_parts, answers, rows, trainer
from checkpoints_tools.training.record import TrainingRecord
from checkpoints_tools.training.sampler import Completion, Request
from specmq_jax.errors import UserError

DATA = pathlib.Path(__file__).parents[2] / "data"
BASE = DATA / "checkpoints" / "fp16"
MADE = {"model content": "a", "prompts": "b"}


@pytest.mark.parametrize("steps", [1, 2, 3, 19, 20, 400])
def test_the_learning_rate_reaches_its_peak_and_falls_to_a_hundredth(steps):
    rate = trainer.Schedule(steps=steps, batch=1, length=64, learning_rate=0.5).rate()
    found = [float(rate(step)) for step in range(steps)]
    assert max(found) == pytest.approx(0.5) and found.index(max(found)) == (steps > 1) * max(1, steps // 20)
    if steps > 2:
        assert min(found[found.index(max(found)):]) == found[-1] and float(rate(steps)) == pytest.approx(0.005)


@pytest.mark.parametrize(("dialogues", "held_out", "expected"), [
    ([0], 0.02, 0), ([0, 0], 0.5, 0), ([0, 1], 0.02, 1), ([0, 1], 0.5, 1), ([0, 1, 2], 0.0, 0), (range(100), 0.02, 2),
    ([], 0.02, 0)])
def test_a_part_is_held_out_wherever_something_is_left_to_train_on(dialogues, held_out, expected):
    made = answers.Sequences(tokens=[np.arange(3, dtype=np.int32) for _ in dialogues],
                             prompts=np.ones(len(dialogues), np.int32), dialogues=np.int32(list(dialogues)))
    inside, outside = rows.split(made, held_out=held_out, seed=0)
    assert len(outside) == expected and sorted([*inside, *outside]) == list(range(len(dialogues)))


SETTINGS = {"model content": "a", "prompts": "b", "epochs": 4.0, "learning_rate": 1e-3, "batch": 4, "draft_vocabulary": None}


@pytest.fixture
def begun(tmp_path):
    """A work directory with a checkpoint."""
    TrainingRecord(tmp_path).begin(SETTINGS, extend=False)
    (tmp_path / "checkpoints" / "250").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(("key", "value"), [
    ("model content", "c"), ("prompts", "c"), ("learning_rate", 2e-3), ("batch", 8), ("draft_vocabulary", 100)])
@pytest.mark.parametrize("extend", [False, True])
def test_a_training_with_other_settings_is_refused_and_they_are_named(begun, key, value, extend):
    before = (begun / "training.json").read_bytes()
    with pytest.raises(UserError, match=rf"settings \({key} {SETTINGS[key]!r} there and {value!r} here\).* another --work_dir"):
        TrainingRecord(begun).begin(SETTINGS | {key: value}, extend=extend)
    assert (begun / "training.json").read_bytes() == before
    TrainingRecord(begun).begin(SETTINGS, extend=extend)


def test_more_epochs_are_an_extension_that_must_be_asked_for_and_fewer_are_none(begun):
    record = TrainingRecord(begun)
    record.finish(1000)
    assert TrainingRecord(begun).finished == 1000
    with pytest.raises(UserError, match="of 4 epochs, and --epochs=6 are asked for; add --extend to train on"):
        TrainingRecord(begun).begin(SETTINGS | {"epochs": 6.0}, extend=False)
    for extend in (False, True):
        with pytest.raises(UserError, match="of 4 epochs, and --epochs=3 are fewer; give --epochs=4"):
            TrainingRecord(begun).begin(SETTINGS | {"epochs": 3.0}, extend=extend)
    with pytest.raises(UserError, match="batch 4 there and 8 here"):
        TrainingRecord(begun).begin(SETTINGS | {"epochs": 6.0, "batch": 8}, extend=True)
    TrainingRecord(begun).begin(SETTINGS | {"epochs": 6.0}, extend=True)
    assert TrainingRecord(begun).finished is None
    TrainingRecord(begun).begin(SETTINGS | {"epochs": 6.0}, extend=False)  # once begun, the same command goes on


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"settings": 3}', '{"settings": {}, "finished": null}', "[" * 10**5,
                                     '{"settings": {"epochs": 1}, "finished": "x"}'])
def test_checkpoints_whose_settings_can_not_be_read_are_refused(begun, content):
    (begun / "training.json").unlink()
    if content is not None:
        (begun / "training.json").write_text(content)
    with pytest.raises(UserError, match="give another --work_dir") as caught:
        TrainingRecord(begun).begin(SETTINGS, extend=True)
    assert "\n" not in str(caught.value) and "training.json" in str(caught.value)


def test_settings_may_change_as_long_as_nothing_was_made(begun):
    shutil.rmtree(begun / "checkpoints")
    with pytest.raises(UserError, match="holds no training with checkpoints that --extend could go on with"):
        TrainingRecord(begun).begin(SETTINGS | {"epochs": 8.0}, extend=True)
    TrainingRecord(begun).begin(SETTINGS | {"batch": 8}, extend=False)
    (begun / "checkpoints" / "250").mkdir(parents=True)
    TrainingRecord(begun).begin(SETTINGS | {"batch": 8}, extend=False)


def completion(number, size=3):
    return Completion(request=Request(key=None, prompt=(number, 1)), tokens=np.arange(1, size, dtype=np.int32))


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store of four parts, each with the two turns of two dialogues."""
    monkeypatch.setattr(answers, "PART", 4)
    made = answers.AnswerStore(tmp_path / "answers", MADE)
    for dialogue in range(8):
        for turn in range(2):
            made.add(dialogue, turn, completion(dialogue))
    return tmp_path / "answers"


def places(store):
    return [row[:2] for row in answers.AnswerStore(store, MADE).found()]


def test_a_part_written_behind_a_removed_one_replaces_none(store):
    (store / "part_00001.npz").unlink()
    before = places(store)
    assert before == [(dialogue, turn) for dialogue in (0, 1, 4, 5, 6, 7) for turn in (0, 1)]
    again = answers.AnswerStore(store, MADE)
    for dialogue in (2, 3):
        for turn in (0, 1):
            again.add(dialogue, turn, completion(dialogue))
    assert places(store) == [(dialogue, turn) for dialogue in range(8) for turn in (0, 1)]


def test_a_second_turn_whose_first_is_gone_is_no_first_turn(store):
    rows_of = answer_parts.read_part(store / "part_00002.npz")
    answer_parts.write_part(store / "part_00002.npz", [row for row in rows_of if row[:2] != (4, 0)], "go on")
    assert (4, 1) not in places(store) and (5, 1) in places(store)
    made = answers.AnswerStore(store, MADE)
    made.add(4, 0, completion(4, 5))
    made.add(4, 1, completion(4, 6))
    made.flush()
    assert [len(row[3]) for row in answers.AnswerStore(store, MADE).found() if row[0] == 4] == [6, 7]  # the newer ones


def test_answers_whose_settings_are_gone_are_refused(store):
    (store / "settings.json").unlink()
    with pytest.raises(UserError, match="holds answers, and settings.json, which tells how they were made, is missing"):
        answers.AnswerStore(store, MADE)
    (store / "settings.json").write_text("{")
    with pytest.raises(UserError, match="settings.json is not valid JSON.*give another --answers"):
        answers.AnswerStore(store, MADE)
    assert len(list(store.glob("part_*"))) == 4


def test_what_is_known_of_the_settings_is_compared_before_the_prompts_are(store):
    answers.check_kept(store, {"model content": "a"})
    with pytest.raises(UserError, match=r"made otherwise \(model content 'a' there and 'c' here\); give another --answers"):
        answers.check_kept(store, {"model content": "c"})
    with pytest.raises(UserError, match=r"made otherwise \(prompts 'b' there and None here\)"):
        answers.AnswerStore(store, {"model content": "a"})


@pytest.mark.parametrize("damage", [
    lambda content: b"", lambda content: content[:100], lambda content: content[:-30], lambda content: b"PK" + content,
    lambda content: content[:len(content) // 2] + b"?" * 9 + content[len(content) // 2 + 9:]])
def test_a_damaged_part_is_one_line(store, damage):
    path = store / "part_00001.npz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="part_00001.npz is damaged .*; remove it, and the same command makes") as caught:
        places(store)
    assert "\n" not in str(caught.value)


def arrays(**changed):
    held = dict(dialogues=[0], turns=[0], prompts=[1], lengths=[2], tokens=[5, 6]) | changed
    return {name: np.int32(value) for name, value in held.items()}


@pytest.mark.parametrize("changed", [{"tokens": [5]}, {"lengths": [-2]}, {"tokens": [[5, 6]]}, {"turns": []}, {"prompts": [2]},
                                     {"tokens": [5, -1]}])
def test_a_part_whose_arrays_do_not_go_together_is_damaged(tmp_path, changed):
    np.savez_compressed(tmp_path / "part_00000.npz", **arrays())
    assert len(answer_parts.read_part(tmp_path / "part_00000.npz")) == 1
    np.savez_compressed(tmp_path / "part_00000.npz", **arrays(**changed))
    with pytest.raises(UserError, match="is damaged"):
        answer_parts.read_part(tmp_path / "part_00000.npz")


@lengths
def test_no_part_is_a_traceback(examples):
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch) / "part_00000.npz"
        answer_parts.write_part(path, [(0, 0, 1, np.int32([5, 6, 7])), (0, 1, 2, np.int32([5, 6, 7, 8]))], "go on")
        whole = path.read_bytes()

        @searching(examples)
        @given(st.integers(0, len(whole)), st.integers(0, 40), st.binary(max_size=12))
        def read(start, size, put):
            path.write_bytes(whole[:start] + put + whole[start + size:])
            with contextlib.suppress(UserError):
                answer_parts.read_part(path)

        read()


def test_answers_are_made_by_one_run_at_a_time(tmp_path):
    with answers.claimed(tmp_path), pytest.raises(UserError, match="another run is making answers in .*--answers"), \
            answers.claimed(tmp_path):
        pass
    with answers.claimed(tmp_path):
        pass


def test_a_work_directory_is_trained_in_by_one_run_at_a_time(tmp_path):
    with train_eagle._claimed(tmp_path / "work"), pytest.raises(UserError, match="another training is going on in .*--work"), \
            train_eagle._claimed(tmp_path / "work"):
        pass
    with train_eagle._claimed(tmp_path / "work"):
        pass


@pytest.mark.parametrize("line", ['{"prompt": "\\ud800"}', "[" * 10**5, '{"turns": [1]}', '"turns"', "7"])
def test_a_prompt_that_is_no_text_is_named(tmp_path, line):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "x"}\n' + line + "\n")
    with pytest.raises(UserError, match="prompts.jsonl, line 2: "):
        answers.read_prompts(tmp_path / "prompts.jsonl")


@pytest.mark.parametrize(("done", "expected"), [(0, []), (50, [50]), (100, [50, 100]), (250, [50, 100, 150])])
def test_the_log_goes_on_behind_the_checkpoint(tmp_path, done, expected):
    (tmp_path / "log.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in (50, 100, 150)) + "{}\n[\n"
                                        '{"step": 20')
    schedule = trainer.Schedule(steps=300, batch=1, length=64)
    trainer.Trainer(None, schedule, {}, None, tmp_path, Console(file=io.StringIO()))._mend_log(done)
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == expected


class Training:
    """One training of a small head in a directory, by the function behind the command."""

    def __init__(self, directory):
        self.directory, self.model = directory, convert(BASE, directory / "model")
        (directory / "prompts.jsonl").write_text('{"prompt": "Say this"}\n')
        self.settings = train_eagle.Settings(
            prompts=directory / "prompts.jsonl", work_dir=directory / "work", answers=directory / "answers", version=2, slots=2,
            max_new_tokens=8, length=64, batch=1, epochs=0.1, drafts=1)

    def run(self, name="head", **changes):
        """What was said while the head of that name was made."""
        said = Console(file=io.StringIO(), width=500)
        train_eagle.train(str(self.model), self.directory / name, dataclasses.replace(self.settings, **changes), said)
        return said.file.getvalue()

    @property
    def steps(self):
        return sorted(int(path.name) for path in (self.directory / "work" / "checkpoints").iterdir())


@pytest.mark.slow
def test_a_training_of_one_update_is_extended_and_belongs_to_its_model(tmp_path):
    training = Training(tmp_path)
    assert "1 answer of" in (said := training.run()) and "0 held out; 1 update" in said and training.steps == [1]
    assert sm.load_head(tmp_path / "head", sm.load(training.model)).config.version == 2
    with pytest.raises(UserError, match="exists and is not empty; .* has finished, after 1 update; another name with"):
        training.run()
    assert "training: finished before, after update 1" in training.run("again")
    first, again = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("head", "again"))
    assert first == again
    for changes, named in ((dict(learning_rate=0.1), "learning_rate"), (dict(batch=2), "batch"), (dict(seed=1), "seed"),
                           (dict(precision="w4a16-g32"), "precision"), (dict(version=3), None), (dict(epochs=9), "--extend")):
        with pytest.raises(UserError, match=named or "at least 4"):
            training.run("other", **changes)
    assert "3 updates" in training.run("more", epochs=3 * 64 / json.loads(tokens(tmp_path)), extend=True)
    assert training.steps[-1] == 3
    (tmp_path / "work" / "checkpoints" / "3" / "state.safetensors").write_text("{")
    with pytest.raises(UserError, match=r"3/state.safetensors is damaged .*remove .*checkpoints/3 to go on") as caught:
        training.run("other", epochs=3 * 64 / json.loads(tokens(tmp_path)))
    assert "\n" not in str(caught.value)
    shutil.rmtree(training.model)
    convert(BASE, training.model, "bf16")
    with pytest.raises(UserError, match=r"other settings \(model content '\w+' there and '\w+' here"):
        training.run("other", precision="fp16", epochs=3 * 64 / json.loads(tokens(tmp_path)))
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == [
        "again", "answers", "head", "model", "more", "prompts.jsonl", "work"]


def tokens(directory):
    """How many tokens the only answer has with its prompt."""
    return str(len(answer_parts.read_part(directory / "answers" / "part_00000.npz")[0][3]))
