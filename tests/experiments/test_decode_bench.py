"""The decoding benchmark on a model small enough for a CPU."""

import dataclasses
import io
import json
import pathlib
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from typed import commands

import specmq_jax as sm
from experiments import decode_bench
from experiments.running.methods import NAMES
from experiments.timing import random_models, step_times
from specmq_jax.decoding.costs import traffic
from specmq_jax.decoding.costs.timing import time_loop
from specmq_jax.errors import UserError
from specmq_jax.network.cache import KVCache

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = {"architectures": ["LlamaForCausalLM"], "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96,
          "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY = sm.LlamaConfig.from_hf(CONFIG)
TREE = sm.TreeConfig(depth=2, top_k=3, size=6)
DRAFTING = random_models.Drafting(tree=TREE, small=dataclasses.replace(TINY, num_layers=1), precision="fp32", length=2,
                                  inner=TREE, min_length=2, vocabulary=40)


def settings(**changes):
    few = dict(config=TINY, precisions=("fp32",), methods=("baseline",), drafting=DRAFTING, parts=step_times.PARTS,
               contexts=(16,), rows=(1, 4), prefill=(20,), runs=3)
    return step_times.Settings(**(few | changes))


def run(asked, file=None):
    """The figures, and what was printed."""
    printed = Console(file=io.StringIO(), width=200)
    try:
        return decode_bench.run(asked, {"shape": "tiny"}, bandwidth=1e11, file=file, console=printed,
                                progress=Console(file=io.StringIO())), printed.file.getvalue()
    except UserError:
        return None, printed.file.getvalue()


@pytest.mark.slow
def test_every_part_of_every_method_is_timed_told_and_kept(tmp_path):
    asked = settings(methods=NAMES, contexts=(16, 40))
    measures, printed = run(asked, tmp_path / "figures.json")
    kept = json.loads((tmp_path / "figures.json").read_text())
    behind = {"T_v(1)", "T_v(4)", "baseline step", "hier inner round",
              *(f"{method} {what}" for method in NAMES[1:] for what in ("draft", "verify", "step"))}
    expected = {(name, context) for name in behind for context in asked.contexts} | {("prefill of 20", 0)}
    assert {(entry["name"], entry["context"]) for entry in kept["measures"]} == expected
    assert len(kept["measures"]) == len(expected) == len(measures)
    assert kept["settings"]["config"]["hidden_size"] == 64 and kept["settings"]["drafting"]["tree"]["size"] == 6
    for entry in kept["measures"]:
        assert len(entry["runs"]) == (step_times.PREFILL_RUNS if entry["part"] == "prefill" else 3)
        assert 0 < min(entry["runs"]) <= entry["p10"] <= entry["median"] <= entry["p90"] <= max(entry["runs"]) < 10
        assert 0 < entry["share_of_floor"] < 1.5 and entry["steps_per_run"] >= 1
        assert entry["achieved_bandwidth"] * entry["median"] == pytest.approx(entry["bytes"])
        assert entry["name"] in printed
        if entry["name"].endswith(("step", "inner round")):
            assert 1 <= entry["accept_length"] <= 5
        if entry["name"] in ("hier draft", "hier step"):
            assert 1 <= entry["inner_rounds"] <= DRAFTING.min_length


def test_what_was_measured_before_an_error_is_told_and_kept(tmp_path):
    asked = settings(config=dataclasses.replace(TINY, num_layers=2), methods=("eagle3",), parts=("verify", "step"), rows=(1,))
    assert run(asked, tmp_path / "figures.json")[0] is None
    kept = json.loads((tmp_path / "figures.json").read_text())
    assert [entry["name"] for entry in kept["measures"]] == ["T_v(1)"]
    assert "T_v(1)" in run(asked)[1]
    with pytest.raises(UserError, match="an EAGLE-3 head reads"):
        list(step_times.measure(asked))


def test_the_weights_of_one_precision_are_gone_when_the_next_are_made(monkeypatch):
    made, make = [], sm.random_model

    def watched(config, precision, head):
        assert not any(reference() for reference in made)
        model = make(config, precision, head=head)
        made.append(weakref.ref(model))
        return model

    monkeypatch.setattr(sm, "random_model", watched)
    list(step_times.measure(settings(precisions=("fp32", "fp16"), parts=("step",), runs=1)))
    assert len(made) == 2


@pytest.fixture(scope="module")
def target():
    return sm.random_model(TINY, "fp32")


def drafting_weights(drafter):
    match drafter:
        case sm.EagleDrafter():
            return TREE.depth * drafter.head.weight_bytes
        case sm.ChainDrafter():
            return DRAFTING.length * drafter.model.weight_bytes
        case sm.HierarchicalDrafter():
            return drafter.model.weight_bytes + drafting_weights(drafter.inner)
    return 0


@pytest.mark.parametrize("method", NAMES)
def test_bytes_of_a_round_are_the_weights_of_its_passes_and_the_live_rows(target, method):
    drafter = DRAFTING.drafter(method, target)
    decoder = sm.Decoder(target, drafter, sm.DecodeConfig(max_len=64))
    weights = drafting_weights(drafter) + target.weight_bytes
    # fc of an EAGLE-3 head works on the target's states alone, at one level
    weights -= 3 * 64 * 64 * 4 * (TREE.depth - 1) if method == "eagle3" else 0
    if method == "hier":  # and a pass that advances the inner head behind the target's verification
        weights += traffic.round_bytes(target, drafter.inner, 0) - traffic.draft_bytes(drafter.inner, 0) - target.weight_bytes
    assert decoder.bytes_per_round(0) == traffic.round_bytes(target, drafter, 0, 1) == weights
    row = 2 * 2 * 16 * 4  # keys and values of two heads of 16 in f32, in a layer
    passes = {"baseline": 0, "spec": DRAFTING.length, "eagle2": TREE.depth, "eagle3": TREE.depth, "hier": 1 + TREE.depth + 1}
    live = decoder.bytes_per_round(10) - decoder.bytes_per_round(0)
    assert live == 10 * row * (TINY.num_layers + passes[method])


def test_a_hierarchys_bytes_count_every_round_and_every_pass_of_its_small_model(target):
    drafter = DRAFTING.drafter("hier", target)
    decoder, small = sm.Decoder(target, drafter, sm.DecodeConfig(max_len=64)), drafter.model
    inner = sm.Decoder(small, drafter.inner, sm.DecodeConfig(max_len=64)).bytes_per_round(10)
    one = decoder.bytes_per_round(10)
    assert decoder.bytes_per_round(10, inner_rounds=3) == one + 2 * inner
    ahead = small.weight_bytes + 10 * 2 * 2 * 16 * 4 * small.config.num_layers
    assert decoder.bytes_per_round(10, inner_rounds=3, ahead=1) == one + 2 * inner + ahead


@pytest.mark.parametrize("method", [pytest.param("eagle2", marks=pytest.mark.slow), "hier"])
def test_each_run_begins_where_the_first_began_and_drafts_change_no_token(target, method):
    config = sm.DecodeConfig(max_len=128)
    decoder = sm.Decoder(target, DRAFTING.drafter(method, target), config)
    prompt = list(range(30))
    timing, end, state = time_loop(decoder._run, decoder.params, decoder.prefill(prompt), runs=2, most=5)
    assert len(timing.seconds) == 2 and int(end.rounds) == timing.steps <= 5
    assert int(state.length) == 31 and int(state.rounds) == 0
    for _ in range(6):
        state = decoder.round(state)
    found = np.asarray(state.tokens)[30:int(state.length)].tolist()
    assert found == sm.Decoder(target, config=config).generate(prompt, len(found)).tokens.tolist()


@pytest.mark.parametrize(("version", "vocabulary", "scored"), [
    (2, None, 96), (2, 40, 40), (3, None, 96), (3, 40, 40), (3, 0, 96)])
def test_random_heads_score_the_vocabulary_that_is_asked_for(target, version, vocabulary, scored):
    head = random_models.random_head(target, version, vocabulary)
    assert head.config.layer.vocab_size == scored
    assert jax.tree.leaves(head.params["head"]["params"]["lm_head"])[0].shape[-1] == scored
    ids = head.params["ids"]
    assert (ids is None) == (scored == 96) and (ids is None or len(set(ids.tolist())) == scored)


def test_a_head_that_scores_more_than_there_is_is_refused(target):
    with pytest.raises(UserError, match="scores 97 tokens does not fit a target of 96"):
        random_models.random_head(target, 2, 97)


@pytest.mark.parametrize(("precision", "tied"), [("fp16", True), ("w4a16", False)])
def test_random_weights_have_the_shapes_of_the_module_and_sane_scores(precision, tied):
    model = sm.random_model(dataclasses.replace(TINY, tie_embeddings=tied), precision)
    cache = KVCache.create(model.config, 128, model.module.format.dtype)
    expected = jax.eval_shape(lambda: model.module.init(jax.random.key(0), jnp.zeros(1, jnp.int32), cache,
                                                        method="everything"))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), model.params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), expected)
    assert 0.5 < float(jnp.std(sm.logits(model, [1, 2, 3]))) < 2


def command(*arguments):
    return subprocess.run([sys.executable, "-m", "experiments.decode_bench", *arguments], cwd=ROOT, text=True,
                          capture_output=True, timeout=300)


def test_the_command_measures_a_directory_of_sizes(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    result = command(f"--shape={tmp_path}", "--precision=w4a16,fp32", "--parts=verify", "--contexts=16,20", "--rows=2",
                     "--runs=2", "--bandwidth=10", f"--json={tmp_path / 'figures.json'}")
    assert result.returncode == 0, result.stderr
    kept = json.loads((tmp_path / "figures.json").read_text())
    assert [(entry["precision"], entry["name"], entry["context"]) for entry in kept["measures"]] == [
        (precision, "T_v(2)", context) for precision in ("w4a16", "fp32") for context in (16, 20)]
    assert kept["measures"][0]["formats"] == {"linear": "w4a16", "head": "fp16", "embed": "fp16"}
    assert kept["bandwidth"] == 1e10 and kept["shape"] == str(tmp_path)
    assert "given as 10 GB/s" in result.stdout and result.stdout.count("T_v(2)") == 4


@pytest.mark.slow
def test_a_rounded_lm_head_is_the_targets_and_its_eagle2_heads():
    asked = settings(precisions=("w4a16",), methods=("eagle2",), parts=("verify", "draft"), rows=(2,), runs=1,
                     drafting=dataclasses.replace(DRAFTING, vocabulary=None))
    measures, printed = run(dataclasses.replace(asked, head_precision="w8a16"))
    dense, _ = run(asked)
    assert "tiny at w4a16, lm_head at w8a16: weights" in printed
    assert [measure.formats["head"] for measure in measures] == ["w8a16"] * 2
    saved = 96 * 64 * 2 - 96 * (64 + 4)  # of f16 values against bytes with a scale for each token
    (verify, draft), (dense_verify, dense_draft) = measures, dense
    assert dense_verify.moved - verify.moved == saved
    assert dense_draft.moved - draft.moved == saved * TREE.depth
    with pytest.raises(UserError, match="the embedding table serves as the lm_head here"):
        sm.random_model(dataclasses.replace(TINY, tie_embeddings=True), "fp16", head="w8a16")


MISTAKES = [
    (["--shape=llama9"], "shape 'llama9' is neither one of llama3-8b, llama3-70b, llama3-1b, demo, tiny nor a directory"),
    (["--parts=verify,sleep"], "--parts names 'sleep', which is not known; choose of verify, draft, step, prefill"),
    (["--rows=1,0"], "--rows=1,0 must list whole numbers above 0"),
    (["--eagle=somewhere"], "--eagle has no use here"),
    (["--json=/nowhere/figures.json"], "/nowhere/figures.json can't be written to"),
]


@pytest.fixture(scope="module")
def mistaken():
    typed = (("experiments.decode_bench", *arguments) for arguments, _ in MISTAKES)
    return commands(*typed, shared="experiments.running.methods")


@pytest.mark.parametrize("place", range(len(MISTAKES)), ids=[fault for _, fault in MISTAKES])
def test_a_mistake_ends_in_one_line(mistaken, place):
    result = mistaken[place]
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.startswith(f"error: {MISTAKES[place][1]}") and len(result.stderr.splitlines()) == 1
