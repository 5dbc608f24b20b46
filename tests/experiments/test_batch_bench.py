"""The benchmark of many sequences on a model small enough for a CPU."""

import io
import json

import pytest
from fakes import tiny_config
from rich.console import Console

import specmq_jax as sm
from experiments import batch_bench
from experiments.timing import batches, random_models


@pytest.mark.parametrize("batch", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_batches_are_timed_told_kept_and_drawn(tmp_path, batch):
    config, tree = tiny_config(num_layers=1), sm.TreeConfig(depth=3, top_k=2, size=7)
    settings = batches.Settings(
        config=config, precisions=("fp32",), methods=("baseline", "eagle2"), batches=(batch,), contexts=(9,), tokens=(30, 60),
        drafting=random_models.Drafting(tree=tree, small=config), accept_length=2.5, budget=False)
    console, file, picture = Console(file=io.StringIO(), width=160), tmp_path / "a.json", tmp_path / "a.png"
    measures = batch_bench.run(settings, {"shape": "tiny", "device": "CPU", "jax": "", "python": ""}, file=file,
                               picture=picture, console=console)
    assert [(measure.method, measure.batch) for measure in measures] == [("baseline", batch), ("eagle2", batch)]
    plain, eagle = measures
    assert plain.accept_length == 1 and eagle.accept_length == pytest.approx(2.5, abs=0.15)
    for measure, kept in zip(measures, json.loads(file.read_text())["measures"], strict=True):
        assert kept["tokens_per_second"] == measure.tokens_per_second > 0
        assert 0 <= measure.host <= 1 and measure.seconds > 0
    assert plain.drafted == 0 and eagle.drafted == 1
    assert plain.tokens_per_second_of_a_user == pytest.approx(plain.decoding_tokens_per_second / batch)
    assert "eagle2" in console.file.getvalue() and picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_drafts_that_are_never_right_are_left(tmp_path):
    config, file = tiny_config(num_layers=1), tmp_path / "a.json"
    settings = batches.Settings(
        config=config, precisions=("fp32",), methods=("eagle2",), batches=(1,), contexts=(9,), tokens=(40, 80),
        drafting=random_models.Drafting(tree=sm.TreeConfig(depth=3, top_k=2, size=7), small=config), accept_length=1)
    [measure] = batch_bench.run(settings, {"shape": "tiny", "device": "CPU", "jax": "", "python": ""}, file=file,
                                console=Console(file=io.StringIO(), width=160))
    assert measure.drafted < 0.5 and sum(measure.calls.values()) >= 79 // 8
    [kept] = json.loads(file.read_text())["measures"]
    assert kept["drafted"] == measure.drafted and kept["calls"] == {str(nodes): n for nodes, n in measure.calls.items()}
