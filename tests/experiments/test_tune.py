"""The tuner: what it chooses, what it keeps, and that the ops read their tables under the keys it writes."""

import dataclasses
import itertools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typed import commands

from experiments.kernels import cases, problems, timing
from experiments.kernels.cases import Case
from experiments.kernels.problems import Problem
from experiments.kernels.search import Search, best
from experiments.timing.sizes import SHAPES
from experiments.tune import Tables, run
from pallas_kernels import launch
from specmq_jax.errors import UserError

TINY = SHAPES["tiny"]
SLOW = 4000


@dataclasses.dataclass(frozen=True, kw_only=True)
class FakeConfig:
    """`work` is what a call costs; `fault` is what is wrong with it."""

    work: int = SLOW
    fault: str | None = None


def doubled(config: FakeConfig | None, implementation: str, x: jax.Array) -> tuple[jax.Array]:
    if implementation == "reference":
        return (2 * x,)
    if config.fault == "refused":
        raise ValueError(f"no room for {config.work}\nand more")
    zero = 0 * jnp.abs(jax.lax.fori_loop(0, config.work, lambda _, y: jnp.sin(y), x))
    return (x * {None: 2.0, "wrong": 3.0, "nan": jnp.nan}[config.fault] + zero,)


def problem(key: str, *candidates: FakeConfig, heuristic: FakeConfig = FakeConfig(), run=doubled) -> Problem:
    case = Case(label=key, rows=1, traffic=8192, make=lambda key: (jax.random.normal(key, (1024,)),), run=run)
    return Problem(op="fake", keys=(key,), cases=(case,), heuristic=heuristic, candidates=candidates)


@pytest.fixture
def package(tmp_path, monkeypatch) -> pathlib.Path:
    """Where the package's own tables are looked for."""
    monkeypatch.setattr(launch, "__file__", str(tmp_path / "package" / "launch.py"))
    return tmp_path / "package"


@pytest.fixture
def keys(monkeypatch) -> list[tuple[str, str]]:
    """The op and the key of every look-up in a table."""
    asked = []
    monkeypatch.setattr(launch, "tuned", lambda op, key: asked.append((op, key)))
    return asked


def table(tables: Tables) -> dict:
    return json.loads(tables.path("fake").read_text())


@pytest.mark.parametrize("op", problems.OPS)
def test_an_op_looks_up_the_key_that_the_tuner_writes(op, keys):
    for found in problems.find(op, [TINY], (1, 5, 64), (128, -1)):
        for case in found.cases:
            jax.eval_shape(case.step(None, "kernel"), *case.abstract_operands(1)[0])
        assert {key for asked, key in keys if asked == op} == {found.keys[0]}
        keys.clear()


@pytest.mark.parametrize("op", problems.OPS)
def test_every_problem_of_a_real_model_has_a_choice(op):
    rows = (1, 2, 4, 8, 16, 32, 64)
    found = problems.find(op, [SHAPES[name] for name in ("llama3-8b", "llama3-70b", "demo")], rows, (128,))
    assert found and all(len(set(each.candidates) - {each.heuristic}) > 1 for each in found)
    assert len({key for each in found for key in each.keys}) == sum(len(each.keys) for each in found)


@pytest.mark.parametrize("op", ["w4a16", "w4a8", "w8a8", "w8a16"])
def test_a_wide_product_may_be_left_whole_by_programs_of_any_size(op):
    for rows in (1, 32, 64):
        [gate_up, *_] = [each for each in problems.find(op, [SHAPES["llama3-70b"]], (rows,), (128,))
                         if "8192x57344" in each.keys[0]]
        shapes = {(config.block_n, config.num_warps) for config in gate_up.candidates if config.split_k == 1}
        assert shapes == {(config.block_n, config.num_warps) for config in gate_up.candidates}


def test_a_kernel_finds_what_was_tuned(package):
    [found] = problems.find("norm", [TINY], (1,), (128,))
    found = dataclasses.replace(found, candidates=found.candidates[:2])
    tables = Tables(None)
    run([found], tables, Search(implementation="interpret"))
    assert tables.path("norm").is_relative_to(package)
    config = type(found.heuristic)(**launch.tuned("norm", found.keys[0]))
    assert config in {found.heuristic, *found.candidates}


@pytest.mark.parametrize("count", [1, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("op", problems.OPS)
def test_heuristics_give_what_the_references_do(op, count):
    for found in problems.find(op, [TINY], (3,), (32,))[:count]:
        result = best(dataclasses.replace(found, candidates=()), Search(implementation="interpret"))
        assert result.config == found.heuristic


def test_the_fastest_config_with_the_right_result_is_chosen():
    result = best(problem("k", FakeConfig(work=SLOW // 2), FakeConfig(work=3), FakeConfig(work=1, fault="wrong"),
                          FakeConfig(work=1, fault="nan"), FakeConfig(work=7, fault="refused")), Search())
    assert result.config == FakeConfig(work=3)
    assert result.seconds < result.heuristic_seconds
    assert (result.tried, result.wrong, result.failed) == (6, 2, ("no room for 7",))


def test_a_machine_that_slows_down_while_it_is_measured_favours_nobody(monkeypatch):
    calls, costs, compile_loop = itertools.count(), {}, timing.compile_loop

    def compile_known(step, *operands, **options):
        loop = compile_loop(step, *operands, **options)
        costs[id(loop)] = (step.args[0] or FakeConfig()).work
        return loop

    monkeypatch.setattr(timing, "compile_loop", compile_known)
    monkeypatch.setattr(timing, "run_time", lambda loop, operands: costs[id(loop)] * (1 + 0.01 * next(calls)))
    assert best(problem("a", FakeConfig(work=10), heuristic=FakeConfig(work=11)), Search()).config == FakeConfig(work=10)


def test_the_heuristic_stays_where_nothing_is_faster():
    result = best(problem("k", FakeConfig(), heuristic=FakeConfig(work=1)), Search())
    assert result.config == FakeConfig(work=1) and result.tried <= 2


def test_a_large_space_is_searched_from_a_sample(capsys):
    candidates = [FakeConfig(work=work) for work in range(1, SLOW, SLOW // 50)]
    result = best(problem("k", *candidates), Search(most=12))
    assert result.tried <= 13 and result.config.work < SLOW // 2


def test_known_problems_are_skipped_until_they_are_asked_for(package, capsys):
    tables, found = Tables(None), [problem("a", FakeConfig(work=1)), problem("b", FakeConfig(work=1))]
    run(found[:1], tables, Search())
    before = table(tables)
    assert before == {"a": {"work": 1, "fault": None}}
    tables.path("fake").write_text(json.dumps({"a": {"work": 5, "fault": None}}))
    capsys.readouterr()
    run(found, tables, Search())
    assert table(tables) == {"a": {"work": 5, "fault": None}} | {"b": before["a"]}
    assert capsys.readouterr().out.startswith("1 of 2 problems skipped")
    run(found, tables, Search(), retune=True)
    assert table(tables)["a"] == before["a"]


def test_an_output_directory_gets_the_packages_table_and_leaves_that_alone(package, tmp_path):
    own = launch.table_path("fake")
    own.parent.mkdir(parents=True)
    own.write_text('{"a": {"work": 5}}')
    tables = Tables(tmp_path / "out")
    run([problem("a", FakeConfig(work=1)), problem("b", FakeConfig(work=1))], tables, Search())
    assert tables.path("fake") == tmp_path / "out" / "fake" / "tuned" / own.name
    assert table(tables) == {"a": {"work": 5}, "b": {"work": 1, "fault": None}}
    assert own.read_text() == '{"a": {"work": 5}}'


def test_an_interrupted_run_keeps_what_it_had_decided(package):
    def interrupted(config, implementation, x):
        raise KeyboardInterrupt

    tables = Tables(None)
    with pytest.raises(KeyboardInterrupt):
        run([problem("a", FakeConfig(work=1)), problem("b", FakeConfig(work=1), run=interrupted)], tables, Search())
    assert table(tables) == {"a": {"work": 1, "fault": None}}


def test_a_problem_without_time_or_yardstick_is_left(package, capsys):
    tables, found = Tables(None), problem("a", FakeConfig(work=1))
    run([found], tables, Search(deadline=time.monotonic()))
    assert "a: the time is up; 1 problem is left" in capsys.readouterr().out
    for fault, told in (("refused", "fails: no room"), ("wrong", "is not the reference's")):
        run([problem("b", heuristic=FakeConfig(fault=fault)), found], tables, Search(), retune=True)
        assert "fake b: not tuned, " in (out := capsys.readouterr().out) and told in out
    assert list(table(tables)) == ["a"]


def test_a_damaged_table_is_named(package):
    own = launch.table_path("fake")
    own.parent.mkdir(parents=True)
    own.write_text("{")
    with pytest.raises(UserError, match=f"{own} is no JSON object"):
        run([problem("a")], Tables(None), Search())


MISTAKES = [
    (["--ops=w4a16,w3"], "--ops names 'w3', which is not known; choose of w4a16"),
    (["--rows=1,x"], "--rows=1,x must list whole numbers above 0"),
    (["--group_sizes=48"], "--group_sizes names '48'"),
    ([], "tables are tuned on a GPU, and JAX sees none here"),
]


@pytest.fixture(scope="module")
def mistaken():
    return commands(*(("experiments.tune", *arguments) for arguments, _ in MISTAKES), environment={"JAX_PLATFORMS": "cpu"})


@pytest.mark.parametrize("place", range(len(MISTAKES)), ids=[fault for _, fault in MISTAKES])
def test_a_mistake_ends_in_one_line(mistaken, place):
    result = mistaken[place]
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.startswith(f"error: {MISTAKES[place][1]}") and len(result.stderr.splitlines()) == 1


def test_a_loop_makes_every_call_and_hands_on_what_is_updated_in_place():
    def step(x, weight, count):
        return x * weight, count + 1

    x, count = jnp.arange(3.0), jnp.int32(0)
    copies = [(x, jnp.float32(weight), count) for weight in (2, 3)]
    plan = timing.Plan(copies=2, repeats=3, rounds=4)
    loop = timing.compile_loop(step, copies, plan, carried={2: 1})
    product, calls = loop(copies)
    np.testing.assert_array_equal(product, x * 2)
    assert int(calls) == loop.calls == 24
    assert 0 < timing.median_time(loop, copies, 5).median < 1


@pytest.mark.gpu
def test_weights_come_from_memory_and_no_call_is_left_out_on_gpu():
    case = cases.dense_product(16, 4096, 4096)
    plan = timing.Plan.of(cold_bytes=case.cold_bytes, traffic=case.traffic, seconds=1e-2)
    copies = case.operands(plan.copies)
    loop = timing.compile_loop(case.step(None, None), copies, plan)
    bandwidth = case.traffic / timing.median_time(loop, copies, 20).median
    assert 1e11 < bandwidth < 8e12  # no GPU's memory is faster
