"""What a command runs by default, and which heads its methods get."""

import pathlib

import jax
import pytest
from absl import flags as absl_flags
from absl.testing import flagsaver

from checkpoints_tools import demo_model
from experiments.running import flags
from specmq_jax.errors import UserError

HEADS = pathlib.Path(__file__).parents[2] / "data" / "eagle"
EAGLE2, EAGLE3 = str(HEADS / "eagle2_head"), str(HEADS / "eagle3_head")


@pytest.fixture(autouse=True)
def _demo_heads(monkeypatch):
    monkeypatch.setattr(demo_model, "head", lambda version: HEADS / f"eagle{version}_head", raising=False)


def settings(*arguments):
    with flagsaver.flagsaver():
        absl_flags.FLAGS(["mt_bench", *arguments])
        return flags.settings("mt_bench")


def heads(found):
    return {method: found.models.head(method) for method in found.methods}


def test_without_flags_a_cpu_compares_plain_decoding_with_what_is_fastest_there():
    found = settings()
    assert found.models.target is None and heads(found) == {"baseline": None, "eagle3": EAGLE3}


def test_without_flags_a_gpu_runs_every_method_on_the_demo_model_with_its_own_heads(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    found = settings()
    assert found.models.target is None
    assert heads(found) == {"baseline": None, "spec": None, "eagle2": EAGLE2, "eagle3": EAGLE3, "hier": EAGLE3}


def test_the_demo_heads_draft_for_no_other_small_model():
    assert settings("--drafter=small").methods == ("baseline", "spec", "eagle2", "eagle3")
    with pytest.raises(UserError, match="method hier drafts with an EAGLE head; give its directory with --eagle=DIR"):
        settings("--drafter=small", "--method=hier")


def test_an_own_model_is_not_given_the_demo_models_heads():
    assert settings("--model=own").methods == ("baseline", "spec")
    with pytest.raises(UserError, match="method eagle3 drafts with an EAGLE head; give its directory with --eagle=DIR"):
        settings("--model=own", "--methods=baseline,eagle3")


@pytest.mark.parametrize("given", [(EAGLE2, EAGLE3), (EAGLE3, EAGLE2)])
def test_heads_go_to_the_methods_of_their_version_and_hier_takes_the_first(given):
    found = settings("--model=own", "--methods=eagle2,eagle3,hier", f"--eagle={','.join(given)}")
    assert heads(found) == {"eagle2": EAGLE2, "eagle3": EAGLE3, "hier": given[0]}


@pytest.mark.parametrize(("method", "eagle", "fault"), [
    ("eagle3", EAGLE2, "method eagle3 drafts with an EAGLE-3 head, and --eagle=.* holds an EAGLE-2 head"),
    ("eagle2", f"{EAGLE2},{EAGLE2}/", "names two heads of one version"),
    ("hier", str(HEADS / "eagle3_base"), "holds no EAGLE head: tensor fc.weight is missing"),
    ("eagle2", str(HEADS), "holds neither model.safetensors nor pytorch_model.bin"),
])
def test_a_head_that_does_not_fit_is_found_before_a_model_is_loaded(method, eagle, fault):
    with pytest.raises(UserError, match=fault):
        settings("--model=own", f"--method={method}", f"--eagle={eagle}")


@pytest.mark.parametrize("name", ["tree_depth", "draft_length", "min_draft_length"])
def test_drafts_that_no_cache_holds_are_refused(name):
    with pytest.raises(UserError, match=f"--{name}=1000000 drafts more than the cache of 256 tokens holds"):
        settings("--model=own", f"--{name}=1000000", "--max_length=256")
    assert settings("--model=own", f"--{name}=20", "--max_length=256").max_length == 256


def test_a_small_tree_needs_no_flag_for_its_size():
    assert settings("--tree_depth=1", "--tree_top_k=2").models.tree.size == 3
