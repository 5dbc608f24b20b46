"""What a run's methods will hold on the device, told without loading them."""

import dataclasses
import gc
import pathlib

import jax
import pytest

import specmq_jax as sm
from experiments.running import methods
from experiments.running.methods import Models
from specmq_jax.errors import UserError
from specmq_jax.loading import memory

DATA = pathlib.Path(__file__).parents[2] / "data"
NAMES = ("baseline", "spec", "eagle2", "hier")
MODELS = Models(target=str(DATA / "checkpoints" / "fp16"), draft_precision="w4a16-g64",
                eagle=(str(DATA / "eagle" / "eagle2_head"),), tree=sm.TreeConfig(depth=3, top_k=4, size=12))


def load(models=MODELS, **changes):
    return methods.load(models, max_length=300, sampling=sm.Greedy(), seed=0, reproducible=False, **changes)


def test_a_plan_counts_what_the_decoders_then_hold():
    plan, bench = load(only_outline=True).plan(NAMES), load()
    decoders = [bench.decoder(name) for name in NAMES]
    arrays = {leaf.unsafe_buffer_pointer(): leaf.nbytes for leaf in jax.tree.leaves([decoder.params for decoder in decoders])}
    assert sum(plan.parts[part] for part in ("target", "draft model", "EAGLE heads")) == sum(arrays.values())
    assert plan.parts["caches"] == max(decoder.state_bytes for decoder in decoders)
    assert plan == bench.plan(NAMES)  # nothing is loaded twice


@pytest.mark.parametrize("drafter", [None, str(DATA / "checkpoints" / "fp16")])
def test_planning_puts_nothing_on_the_device(monkeypatch, drafter):
    def no_load(*arguments, **options):
        raise AssertionError("something was loaded")

    for name in ("load", "load_head"):
        monkeypatch.setattr(sm, name, no_load)
    gc.collect()
    before = len(jax.live_arrays())
    plan = load(dataclasses.replace(MODELS, drafter=drafter), only_outline=True).plan(NAMES)
    assert len(jax.live_arrays()) <= before
    assert plan.parts["draft model"] > 0 and plan.parts["EAGLE heads"] > 0


def test_a_drafter_that_does_not_fit_is_found_while_planning():
    other = dataclasses.replace(MODELS, eagle=(str(DATA / "eagle" / "eagle3_head"),))
    with pytest.raises(UserError, match="this target has 2, at least 4 are needed"):
        load(other, only_outline=True).plan(["baseline", "eagle3"])


def test_a_plan_names_its_parts_in_one_line(monkeypatch):
    monkeypatch.setattr(memory, "room", lambda: memory.Room(free=10**6, limit=2 * 10**6))
    plan = load(only_outline=True).plan(["hier"])
    for part in ("target", "draft model", "EAGLE heads", "caches", "working memory"):
        assert f"{part} " in plan.describe()
    assert plan.describe().endswith("MB of 1.0 MB free")
    with pytest.raises(UserError, match=r"the device has 1.0 MB free of 2.0 MB"):
        plan.check()
