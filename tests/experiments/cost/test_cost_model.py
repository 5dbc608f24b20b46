"""The cost model: acceptance seen once tells that of every setting, times add up, and what is chosen is run."""

import dataclasses
import functools
import io
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

import specmq_jax as sm
from experiments import cost_model
from experiments.cost import auto, cost_plots, cost_search, predict
from experiments.cost.acceptance import Count, Seen, SmallModel, agreement, count_rounds, text_ranks, tree_lengths
from experiments.cost.cost_study import Bounds, Findings, Study
from experiments.cost.observation import Watch
from experiments.running.methods import Choice, Models
from experiments.running.methods import load as load_models
from experiments.running.settings import Settings
from experiments.timing.random_models import random_head
from specmq_jax.decoding.costs.stopwatch import Ladder
from specmq_jax.decoding.costs.table import Costs, Curve
from specmq_jax.decoding.costs.traffic import rounds_ahead
from specmq_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[3]
TOP_K, DEPTH, TOKENS, FEW_TOKENS = 4, 3, 40, 20
CONFIG = sm.LlamaConfig(vocab_size=61, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2,
                        head_dim=16, max_position=512)
DECODE = sm.DecodeConfig(max_len=256)
PROMPTS = [list(range(3, 20)), [7, 7, 30, 2, 11]]


@dataclasses.dataclass(frozen=True, eq=False)
class TinyBench:
    """The part of `methods.Workbench` that a study uses, over random weights whose drafts are sometimes right."""

    target: sm.Model
    models: Models = Models(tree=sm.TreeConfig(depth=2, top_k=TOP_K, size=6), min_draft_length=2, draft_length=2)
    config: sm.DecodeConfig = DECODE

    max_length: int = 256
    precision: str = "fp32"

    @functools.cached_property
    def small_model(self):
        return self.target.with_precision("w4a16-g32")

    def drafter(self, method, choice=None):
        models = self.models
        choice = choice or Choice(method=method, tree=models.tree, draft_length=models.draft_length,
                                  min_draft_length=models.min_draft_length)
        small = self.small_model
        if method == "spec":
            return sm.ChainDrafter(small, choice.draft_length)
        if method == "hier":
            inner = sm.EagleDrafter(random_head(small, 2, seed=5), choice.tree)
            return sm.HierarchicalDrafter(small, inner, choice.min_draft_length, models.draft_model_start)
        return sm.EagleDrafter(random_head(self.target, 2, seed=4), choice.tree)


@pytest.fixture(scope="module")
def bench():
    return TinyBench(sm.random_model(CONFIG, "fp32", seed=1))


def bounds(**changes):
    ladder = Ladder(rows=(1, 12), depths=(1, DEPTH), lengths=(1, 3), runs=1)
    return Bounds(**(dict(ladder=ladder, min_draft_length=3) | changes))


def study(bench, **changes):
    return Study(bench, bounds(**changes), PROMPTS, FEW_TOKENS, lambda text: None)


TREES = [sm.TreeConfig(depth=depth, top_k=TOP_K, size=size) for depth, size in ((1, 3), (2, 9), (DEPTH, 5), (DEPTH, 30))]


@pytest.mark.slow
@pytest.mark.parametrize(("sampling", "trees"), [(sm.Greedy(), TREES), (sm.Sampling(temperature=0.8), TREES[1:3])])
def test_one_run_tells_every_trees_accept_lengths(bench, sampling, trees):
    config = dataclasses.replace(DECODE, sampling=sampling, seed=3)
    deep = bench.drafter("eagle2", Choice(method="eagle2", tree=sm.TreeConfig(depth=DEPTH, top_k=TOP_K, size=2)))
    watch, plain = Watch(bench.target, config, deep, TOKENS - 1), sm.Decoder(bench.target, None, config)
    answers, right = [watch.answer(prompt) for prompt in PROMPTS], 0
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer.tokens.tolist() == plain.generate(prompt, TOKENS).tokens.tolist()
    for tree in trees:
        decoder = sm.Decoder(bench.target, sm.EagleDrafter(deep.head, tree), config)
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            lengths, place = tree_lengths(text_ranks(answer.seen, answer.tokens), tree.depth, tree.size), 0
            real = decoder.generate(prompt, TOKENS).accept_lengths
            assert count_rounds(lengths) == len(real)
            for length in real[:-1]:  # the last one may go past the end
                assert lengths[place] == length, (tree, place)
                place += length
            right += sum(real[:-1] > 1)
    assert right > 5


@pytest.fixture(scope="module")
def small_ranks(bench):
    made = study(bench)
    made._answers = made._watched(bench.target, None)
    return made._small_ranks(bench.drafter("hier"))


@pytest.mark.slow
@pytest.mark.parametrize(("tree", "length", "model_start"), [
    (sm.TreeConfig(depth=1, top_k=TOP_K, size=3), 1, False), (sm.TreeConfig(depth=3, top_k=TOP_K, size=12), 2, True),
    (sm.TreeConfig(depth=DEPTH, top_k=TOP_K, size=30), 3, False)])
def test_a_hierarchys_rounds_are_told_from_what_its_parts_do(bench, small_ranks, tree, length, model_start):
    bench = dataclasses.replace(bench, models=dataclasses.replace(bench.models, draft_model_start=model_start))
    drafter = bench.drafter("hier", Choice(method="hier", tree=tree, min_draft_length=length))
    decoder = sm.Decoder(bench.target, drafter, DECODE)
    for prompt, answer in zip(PROMPTS, small_ranks, strict=True):
        real, count = decoder.generate(prompt, FEW_TOKENS), answer.shaped(tree).count(length, always_ahead=model_start)
        everything = rounds_ahead(drafter, real.accept_lengths, real.draft_accept_lengths)
        assert abs(everything - count.ahead) <= 2
        # what lies behind the end of an answer is not seen, so that the last round may differ
        assert abs(count.rounds - len(real.accept_lengths)) <= 1 and count.rounds < FEW_TOKENS - 1
        assert abs(count.inner_rounds - len(real.draft_accept_lengths)) <= length


@pytest.mark.parametrize("length", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_a_chains_rounds_are_told_from_the_models_agreement(bench, length):
    drafter = bench.drafter("spec", Choice(method="spec", draft_length=length))
    made = study(bench)
    made._answers = made._watched(bench.target, None)
    decoder = sm.Decoder(bench.target, drafter, DECODE)
    for prompt, answer in zip(PROMPTS, made._answers, strict=True):
        lengths = np.minimum(made._agreement(drafter.model, answer), length) + 1
        assert count_rounds(lengths) == len(decoder.generate(prompt, FEW_TOKENS).accept_lengths)


def seen(scores, tokens, parents, top_k=2):
    return Seen(top_k=top_k, scores=np.float32([scores]), tokens=np.int32([tokens]), parents=np.int32([parents]))


def test_a_tree_holds_the_best_candidates_of_its_levels_and_ties_go_to_the_earlier_one():
    #                level 1      children of 0   children of 1
    found = seen([-1.0, -2.0, -1.5, -2.0, -2.5, -3.0], [5, 6, 7, 8, 7, 9], [-1, -1, 0, 0, 1, 1])
    assert found.depth == 2
    ranks = found.ranks(0, [6, 7, 1])  # candidate 1, then candidate 4
    never = np.iinfo(np.int32).max
    assert ranks.tolist() == [[1, 2], [never, 4]]  # of depth 1 only candidate 0 goes before; of depth 2 also candidate 2
    assert [int(tree_lengths(ranks, 1, size)) for size in (2, 3)] == [1, 2]
    assert [int(tree_lengths(ranks, 2, size)) for size in (2, 3, 4, 5, 6, 7)] == [1, 1, 2, 2, 3, 3]
    assert (found.ranks(0, [4]) == never).all()


def test_agreement_counts_tokens_up_to_the_first_difference():
    assert agreement(np.int32([1, 2, 9, 4]), np.int32([0, 1, 2, 3, 4])).tolist() == [2, 1, 0, 1]
    assert count_rounds([3, 1, 1, 2, 9]) == 2 and count_rounds([]) == 0
    assert (Count(tokens=9, rounds=3) + Count(tokens=3, rounds=1)).accept_length == 3


def test_a_hierarchy_drafts_on_where_it_has_strayed_until_its_least_length():
    # the small model is right at 2 places and wrong at the third; its head adds 2 tokens a round, 1 where that has strayed
    small = SmallModel(agreement=np.int32([2, 1, 0, 3, 2, 1]), lengths=np.int32([2] * 6), strayed={2: np.int32([1] * 4)})
    # drafts 2 + 2 and keeps 2; from place 3 on drafts 2 + 2 and keeps 3
    assert small.count(3) == Count(tokens=6, rounds=2, inner_rounds=4, drafted=8, ahead=0)
    # drafts 2 + 2 + 1, the last where it has strayed; then 2 + 2 + 2, the last past the end, where the mean is taken
    assert small.count(5) == Count(tokens=6, rounds=2, inner_rounds=6, drafted=11, ahead=0)
    # after a round whose drafts were all right the small model is a token ahead, which is draft enough
    assert small.count(1) == Count(tokens=6, rounds=3, inner_rounds=1, drafted=2, ahead=3)


COSTS = Costs(plain=10.0, verify=Curve(at=(1, 3, 5), seconds=(10.0, 12.0, 20.0)), draft=Curve(at=(1, 3), seconds=(1.0, 3.0)),
              rest=0.5, small_verify=Curve(at=(1, 5), seconds=(2.0, 4.0)), small_rest=0.25)


def test_the_time_a_token_takes_is_the_papers_formula_with_the_rest_of_a_round_added():
    assert COSTS.verify(4) == 16.0 and COSTS.verify(9) == 20.0
    (chain,) = cost_search.chains(COSTS, [np.int32([2, 1, 0, 1, 0])], [2])
    assert chain.accept_length == 5 / 2 and chain.seconds == 2.0 + 12.0 + 0.5
    assert chain.speedup == pytest.approx(10.0 * 2.5 / 14.5)
    ranks = text_ranks(seen([-1.0, -2.0], [5, 6], [-1, -1]), [0, 6])
    found = {p.choice.tree.size: p for p in cost_search.trees("eagle2", COSTS, [ranks], 2, range(2, 9), [1])}
    assert set(found) == {2, 3}  # a tree of depth 1 has no more candidates
    assert found[2].seconds == 1.0 + 11.0 + 0.5 and found[3].seconds == 1.0 + 12.0 + 0.5
    small = cost_search.SmallRanks(agreement=np.int32([1, 0]), ranks=np.zeros((2, 1, 1), np.int32), strayed={})
    (hier,) = cost_search.hierarchies(COSTS, [small], 2, [2], [1], [1])
    # one inner round drafts two tokens, of which the second is past the end
    assert hier.seconds == (1.0 + 2.5 + 0.25) + 0.0 * 2.5 + COSTS.verify(3) + 0.5 and hier.inner_accept_length == 2


@pytest.fixture(scope="module")
def findings(bench):
    return study(bench).run(["baseline", "spec", "eagle2", "hier"], precisions=["w4a16-g32"])


@pytest.mark.slow
def test_a_study_looks_at_every_setting_and_times_add_up(bench, findings):
    chosen = [prediction.choice for prediction in findings.predictions]
    assert chosen[0].method == "baseline" and findings.predictions[0].speedup == 1.0
    assert [choice.draft_length for choice in chosen if choice.method == "spec"] == [1, 2, 3]
    looked = {(choice.tree.depth, choice.tree.size) for choice in chosen if choice.method == "eagle2"}
    assert looked == {(depth, size) for depth in range(1, DEPTH + 1) for size in range(2, 13)
                      if size - 1 <= TOP_K + (depth - 1) * TOP_K**2}
    assert {choice.min_draft_length for choice in chosen if choice.method == "hier"} == {1, 2, 3}
    assert all(prediction.seconds > 0 for prediction in findings.predictions)
    assert findings.best() == max(findings.predictions, key=lambda p: p.speedup)
    assert set(findings.verify) == {"fp32", "small model, w4a16-g32", "w4a16-g32"}
    assert findings.answers == 2 and findings.tokens == 2 * FEW_TOKENS


@pytest.mark.slow
def test_the_curves_are_drawn_and_the_best_settings_told(findings, tmp_path):
    cost_plots.plot(findings, "tiny", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    curve = cost_plots.best_by_nodes(findings, "eagle2")
    assert list(curve) == list(range(2, 13)) and max(curve.values()) == findings.best("eagle2").speedup
    console = Console(file=io.StringIO(), width=200)
    console.print(cost_model.table(findings, {}))
    for method in ("baseline", "spec", "eagle2", "hier"):
        assert f"{findings.best(method).speedup:.2f}x" in console.file.getvalue()


def test_a_setting_is_described_by_the_flags_that_ask_for_it():
    tree = sm.TreeConfig(depth=3, top_k=4, size=12)
    assert predict.describe(Choice(method="baseline")) == "--method=baseline"
    assert predict.describe(Choice(method="spec", draft_length=3)) == "--method=spec --draft_length=3"
    assert predict.describe(Choice(method="hier", tree=tree, min_draft_length=2)) == (
        "--method=hier --tree_depth=3 --tree_top_k=4 --tree_size=12 --min_draft_length=2")


SOURCE = ROOT / "tests" / "data" / "checkpoints" / "fp16"
HEAD = ROOT / "tests" / "data" / "eagle" / "eagle2_head"


def asked(**models):
    """Settings of a run with method auto."""
    fields = dict(target=str(SOURCE), tree=sm.TreeConfig(depth=2, top_k=4, size=6), draft_precision="w4a16-g64") | models
    return Settings(models=Models(**fields), methods=("auto",), question_file=pathlib.Path("none"), max_new_tokens=8,
                    max_length=300, output_dir=pathlib.Path("none"))


@pytest.fixture
def studied(monkeypatch, tmp_path):
    """The settings of every study that was made, each of which finds a tree of 5 nodes; caches lie in a new directory."""
    made = []

    def study(settings, bench, limits, say):
        made.append(settings)
        best = cost_search.Prediction(choice=Choice(method=settings.methods[-1], tree=sm.TreeConfig(depth=2, top_k=4, size=5)),
                                      accept_length=2.0, seconds=0.1, speedup=1.5)
        return Findings(predictions=(best,), verify={}, answers=1, tokens=2)

    monkeypatch.setenv("SPECMQ_CACHE", str(tmp_path))
    monkeypatch.setattr(predict, "study", study)
    return made


def test_auto_measures_once_for_each_device_model_precision_and_sampling(studied, tmp_path):
    said = Console(file=io.StringIO(), width=500)
    settings = asked(eagle=(str(HEAD),))
    choice = auto.choose(settings, said)
    assert choice == Choice(method="eagle2", tree=sm.TreeConfig(depth=2, top_k=4, size=5)) and len(studied) == 1
    assert studied[0].methods == ("baseline", "eagle2")  # on a CPU a copy of the target is not worth drafting with
    assert "auto: spec is left out: on a CPU" in said.file.getvalue()
    assert "auto: eagle3 is left out: method eagle3 drafts with an EAGLE-3 head" in said.file.getvalue()
    assert auto.choose(settings, said) == choice and len(studied) == 1
    for other in (asked(eagle=(str(HEAD),), precision="w4a16-g64"), dataclasses.replace(settings, sampling=sm.Sampling())):
        auto.choose(other, said)
    assert len(studied) == 3
    for file in (tmp_path / "cost_model").iterdir():
        file.write_text(file.read_text()[:40])
    assert auto.choose(settings, said) == choice and len(studied) == 4  # a damaged file counts as none


def test_auto_is_the_baseline_where_nothing_can_draft(studied):
    assert auto.choose(asked(), Console(file=io.StringIO())) == Choice(method="baseline") and not studied


def test_auto_decodes_with_what_was_chosen():
    tree = sm.TreeConfig(depth=3, top_k=4, size=7)
    models = dataclasses.replace(asked(eagle=(str(HEAD),)).models, auto=Choice(method="eagle2", tree=tree))
    bench = load_models(models, max_length=300, sampling=sm.Greedy(), seed=0, reproducible=False)
    drafter = bench.decoder("auto").drafter
    assert isinstance(drafter, sm.EagleDrafter) and drafter.tree == tree
    assert bench.plan(["auto"]).parts["EAGLE heads"] > 0
    assert bench.decoder("eagle2").drafter.tree == models.tree
    chain = dataclasses.replace(models, auto=Choice(method="spec", draft_length=7))
    assert dataclasses.replace(bench, models=chain).decoder("auto").drafter.length == 7


@pytest.mark.slow
def test_a_benchmark_runs_what_auto_found_before(studied, tmp_path):
    cpu_tree = sm.TreeConfig(depth=3, top_k=2, size=4)
    auto.choose(asked(eagle=(str(HEAD),), tree=cpu_tree, draft_precision=None, min_draft_length=3), Console(file=io.StringIO()))
    result = subprocess.run(
        [sys.executable, "-m", "experiments.mt_bench", f"--model={SOURCE}", f"--eagle={HEAD}", "--methods=baseline,auto",
         "--max_new_tokens=12", "--max_length=600", "--question_end=1", f"--output_dir={tmp_path / 'out'}"], cwd=ROOT,
        text=True, capture_output=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert "auto: --method=eagle2 --tree_depth=2 --tree_top_k=4 --tree_size=5" in result.stderr
    assert "auto: measuring" not in result.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(summary["methods"]) == ["baseline", "auto"] and summary["methods"]["auto"]["identical_share"] == 1
    kept = json.loads((tmp_path / "out" / "auto.settings.json").read_text())["settings"]
    assert "method='eagle2', tree=TreeConfig(depth=2, top_k=4, size=5)" in kept["auto"]


def test_bounds_that_do_not_go_together_are_one_line(bench):
    tight = dataclasses.replace(bench, max_length=40)
    with pytest.raises(UserError, match="prompts of up to 17 tokens with 30, and the cache holds 40; raise --max_length"):
        Study(tight, bounds(), PROMPTS, 30, print)
    with pytest.raises(UserError, match="found --max_new_tokens=1, give at least 2"):
        Study(bench, bounds(), PROMPTS, 1, print)
    with pytest.raises(UserError, match="drafts of up to 14 nodes are looked at, and verification is timed for 12"):
        bounds(min_draft_length=10).check()
    predict.bounds().check()
    assert predict.bounds(nodes=7, depth=2, draft_tokens=3).ladder.rows[-1] == 7
