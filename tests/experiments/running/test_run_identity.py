"""Results belong to what made them: contents are compared, not paths, and one run at a time writes to a directory."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from benches import FakeBench, fake_plan, make_settings
from rich.console import Console
from safetensors.numpy import load_file, save_file

from checkpoints_tools.conversion import convert
from experiments.answers import answer_files, scoring
from experiments.cost import auto
from experiments.running import claims, runner
from experiments.running.contents import Contents
from experiments.running.methods import Models
from experiments.timing import device
from specmq_jax.errors import UserError
from specmq_jax.loading import contents

ROOT = pathlib.Path(__file__).parents[3]
DATA = ROOT / "tests" / "data"
SOURCE, HEAD = DATA / "checkpoints" / "fp16", DATA / "eagle" / "eagle2_head"


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SPECMQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(device, "device_bandwidth", lambda: 1e11)


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    return convert(SOURCE, tmp_path_factory.mktemp("native") / "model")


def copy(source, target):
    shutil.rmtree(target, ignore_errors=True)
    return pathlib.Path(shutil.copytree(source, target))


def run(settings, bench=None):
    return runner.run(settings, load=lambda _: bench or FakeBench(), plan=fake_plan, console=Console(quiet=True))


def finished(tmp_path, method="eagle2", **models):
    """Settings of a finished run, and the bytes of its answers."""
    settings = make_settings(tmp_path, methods=(method,), models=Models(**models))
    run(settings)
    return settings, settings.answers(method).read_bytes()


def change_tensor(file):
    """Another value in the file, whose size and time of change stay."""
    before, held = file.stat(), dict(load_file(file))
    name = sorted(held)[0]
    held[name] = held[name].copy()
    held[name].flat[0] += np.asarray(1, held[name].dtype)
    save_file(held, file, metadata={"format": "pt"})
    assert file.stat().st_size == before.st_size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def refused(settings, what, kept):
    """No model is loaded, the message names `what` and a way out, and the answers stay."""
    with pytest.raises(UserError, match=rf"made with other settings \(.*{what} content '\w+' there and '\w+' here.*--noresume"):
        runner.run(settings, load=None, plan=None, console=Console(quiet=True))
    assert settings.answers(settings.methods[0]).read_bytes() == kept


def other_weights(model):
    return copy(convert(SOURCE, model.parent / "other", "bf16"), model)


CHANGES = {
    "weights": other_weights,
    "configuration": lambda model: edit(model / "config.json", '"rms_norm_eps": 1e-0', '"rms_norm_eps": 3e-0'),
    "tokenizer": lambda model: (model / "tokenizer.json").write_text((model / "tokenizer.json").read_text() + " "),
    "template": lambda model: (model / "chat_template.jinja").write_text("{{ messages }}"),
    "ends": lambda model: (model / "generation_config.json").write_text('{"eos_token_id": 7}'),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_replaced_in_place_is_another(tmp_path, native, change):
    model = copy(native, tmp_path / "model")
    settings, kept = finished(tmp_path, "baseline", target=str(model))
    CHANGES[change](model)
    refused(settings, "model", kept)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer_config.json"])
def test_a_foreign_model_edited_in_place_is_another(tmp_path, file):
    model = copy(SOURCE, tmp_path / "model")
    settings, kept = finished(tmp_path, "baseline", target=str(model))
    if file.endswith(".safetensors"):
        change_tensor(model / file)
        os.utime(model / file)
    elif file == "config.json":
        edit(model / file, '"rms_norm_eps": 1e-0', '"rms_norm_eps": 3e-0')
    else:
        edit(model / file, "{", '{"chat_template": "{{ messages }}", ')
        os.utime(model / "config.json")
    refused(settings, "model", kept)


def test_a_head_replaced_in_place_is_another_though_size_and_time_are_the_same(tmp_path, native):
    head = copy(HEAD, tmp_path / "head")
    settings, kept = finished(tmp_path, target=str(native), eagle=(str(head),))
    change_tensor(head / "model.safetensors")
    refused(settings, "eagle", kept)


@pytest.mark.parametrize("method", ["spec", "hier"])
def test_a_drafter_replaced_in_place_is_another(tmp_path, native, method):
    drafter = copy(native, tmp_path / "drafter")
    settings, kept = finished(tmp_path, method, target=str(native), drafter=str(drafter), eagle=(str(HEAD),))
    other_weights(drafter)
    refused(settings, "drafter", kept)


def test_a_vocabulary_replaced_in_place_is_another(tmp_path, native):
    vocabulary = tmp_path / "vocabulary.json"
    vocabulary.write_text('{"token_ids": [1, 2]}')
    settings, kept = finished(tmp_path, target=str(native), eagle=(str(HEAD),), vocabulary=str(vocabulary))
    vocabulary.write_text('{"token_ids": [2, 1]}')
    refused(settings, "vocabulary", kept)


def moved(tmp_path, source, settings):
    """The settings with model and head in another place, under other names."""
    models = Models(target=str(copy(source, tmp_path / "elsewhere" / "renamed")),
                    eagle=(str(copy(HEAD, tmp_path / "elsewhere" / "its_head")),))
    shutil.rmtree(settings.models.target)
    return dataclasses.replace(settings, models=models)


@pytest.mark.parametrize("foreign", [False, True])
def test_a_moved_model_goes_on_in_one_run(tmp_path, native, foreign):
    source = SOURCE if foreign else native
    models = Models(target=str(copy(source, tmp_path / "model")), eagle=(str(copy(HEAD, tmp_path / "head")),))
    settings = make_settings(tmp_path, methods=("eagle2",), models=models)
    with pytest.raises(KeyboardInterrupt):
        run(settings, FakeBench(kill_at=3))
    (result,) = run(moved(tmp_path, source, settings))
    assert [answer.question_id for answer in result.answers] == [1, 2, "c"]
    assert {answer.model_id for answer in result.answers} == {"model-fp16-eagle2"}


def test_where_models_lie_can_be_read_beside_the_answers(tmp_path, native):
    settings, _ = finished(tmp_path, target=str(native), eagle=(str(HEAD),))
    sidecar = json.loads((settings.output_dir / "eagle2.settings.json").read_text())
    assert sidecar["places"] == {"model": str(native), "eagle": str(HEAD)}


def test_a_model_that_is_gone_is_told_where_answers_lie(tmp_path, native):
    model = copy(native, tmp_path / "model")
    settings, _ = finished(tmp_path, "baseline", target=str(model))
    shutil.rmtree(model)
    with pytest.raises(UserError, match=r"model content '\w+' there and '.*model does not exist' here"):
        run(settings)


def test_a_digest_is_the_contents_alone(tmp_path, native):
    again = convert(SOURCE, tmp_path / "again")
    assert contents.checkpoint_digest(again) == contents.checkpoint_digest(native)
    assert contents.checkpoint_digest(convert(SOURCE, tmp_path / "low", "w4a16-g32")) != contents.checkpoint_digest(native)
    assert contents.head_digest(copy(HEAD, tmp_path / "head")) == contents.head_digest(HEAD)
    assert contents.head_digest(DATA / "eagle" / "eagle3_head") != contents.head_digest(HEAD)


def test_every_block_of_a_large_file_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "_BLOCK_BYTES", 100)
    file, found = tmp_path / "file", set()
    for place in (None, 0, 99, 100, 250, 449):
        held = bytearray(450)
        if place is not None:
            held[place] = 1
        file.write_bytes(held)
        found.add(contents.file_digest(file))
    file.write_bytes(bytes(451))
    assert len(found | {contents.file_digest(file)}) == 7


def test_a_checkpoint_without_a_content_digest_counts_by_its_files(tmp_path, native):
    model = copy(native, tmp_path / "model")
    metadata = json.loads((model / "specmq.json").read_text())
    del metadata["content"]
    (model / "specmq.json").write_text(json.dumps(metadata))
    before = contents.checkpoint_digest(model)
    assert contents.checkpoint_digest(copy(model, tmp_path / "copy")) == before
    next(iter(metadata["files"].values()))[1] ^= 1
    (model / "specmq.json").write_text(json.dumps(metadata))
    assert contents.checkpoint_digest(model) != before


def test_weights_of_another_size_are_no_longer_the_checkpoints(tmp_path, native):
    model = copy(native, tmp_path / "model")
    settings, _ = finished(tmp_path, "baseline", target=str(model))
    file = max((model / "weights").rglob("*"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(UserError, match=r"model content '\w+' there and '.* bytes, expected \d+; convert the .*' here"):
        run(settings)


def test_auto_knows_models_by_their_contents(tmp_path, native):
    head = copy(HEAD, tmp_path / "head")
    settings = make_settings(tmp_path, models=Models(target=str(native), eagle=(str(head),)))
    about = auto._about(settings, Contents())
    elsewhere = Models(target=str(copy(native, tmp_path / "b")), eagle=(str(copy(HEAD, tmp_path / "c")),))
    assert auto._about(dataclasses.replace(settings, models=elsewhere), Contents()) == about
    change_tensor(head / "model.safetensors")
    assert auto._about(settings, Contents()) != about


@pytest.mark.parametrize("lock", ["run", "answers"])
def test_a_second_run_in_one_directory_is_refused(tmp_path, native, lock):
    out = tmp_path / "out"
    out.mkdir()
    claim = claims.reported(out) if lock == "run" else claims.answered([out])
    command = [sys.executable, "-m", "experiments.mt_bench", f"--model={native}", "--method=baseline", f"--output_dir={out}"]
    with claim:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"another run is writing into {out}; wait until it has ended, or give another --output_dir" in result.stderr
    assert not list(out.glob("*.jsonl"))


def test_a_mistake_in_the_questions_makes_no_directory(tmp_path, native):
    command = [sys.executable, "-m", "experiments.mt_bench", f"--model={native}", "--method=baseline",
               f"--output_dir={tmp_path / 'out'}", f"--question_file={tmp_path / 'none'}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and "does not exist" in result.stderr and not (tmp_path / "out").exists()


def test_the_directory_of_an_answer_file_is_claimed_too(tmp_path):
    settings = make_settings(tmp_path, methods=("baseline",), answer_file=tmp_path / "kept" / "a.jsonl")
    run(settings)
    with claims.answered([tmp_path / "kept"]), pytest.raises(UserError, match="another run is writing into .*kept"):
        run(settings)


def test_a_killed_run_leaves_no_lock(tmp_path):
    code = ("import os, pathlib, sys; from experiments.running import claims\n"
            f"with claims.answered([pathlib.Path({str(tmp_path)!r})]): os.kill(os.getpid(), 9)")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == -9
    with claims.answered([tmp_path]):
        pass


def test_a_cell_of_a_sweep_writes_below_the_directory_that_the_sweep_claims(tmp_path):
    settings = make_settings(tmp_path, methods=("baseline",), answer_file=tmp_path / "out" / "fp16" / "baseline.jsonl")
    (tmp_path / "out").mkdir()
    with claims.reported(tmp_path / "out"):
        assert len(run(settings)[0].answers) == 3


def test_replaced_answers_take_their_scores_with_them(tmp_path):
    settings = make_settings(tmp_path, methods=("baseline",))
    run(settings)
    file = scoring.score_file(settings.answers("baseline"))
    file.write_text("[]")
    run(settings)
    assert file.exists()
    run(dataclasses.replace(settings, resume=False))
    assert not file.exists() and answer_files.read(settings.answers("baseline"))
