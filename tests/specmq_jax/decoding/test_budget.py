"""What a call drafts: the choice, given times and accept lengths, and that the tokens don't depend on it."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import DATA, tiny_config

import specmq_jax as sm
from experiments.timing.random_models import random_head
from specmq_jax.decoding import budget, slots
from specmq_jax.decoding.budget import Budget
from specmq_jax.decoding.costs.table import Curve
from specmq_jax.decoding.request_sampling import RequestKey, RequestSampling
from specmq_jax.network import side_by_side
from specmq_jax.network.cache import KVCache

CONFIG = sm.DecodeConfig(max_len=160, prefill_chunks=(16,))
WHOLE, SMALLER, PLAIN = 0, 1, 2
ROUNDS = 8


def level(times):
    """Times by the choice that no length changes."""
    return {choice: Curve(at=(1,), seconds=(seconds,)) for choice, seconds in times.items()}


def taught(times, lengths):
    """A budget of trees of depth 5 and 3, and none, that was told times by the choice and such accept lengths of each."""
    made = Budget((5, 3, 0))
    made.measured(4, False, level(times))
    for choice, length in lengths.items():
        made.learn(choice, round(length * 1000), 1000)
    return made


def test_the_choice_commits_most_tokens_a_second():
    for times, lengths, best in [
            ({0: 2.0, 1: 1.5, 2: 1.0}, {0: 3.0, 1: 2.0}, WHOLE),  # 1.5, 1.33 and 1 tokens a second
            ({0: 3.0, 1: 1.5, 2: 1.0}, {0: 3.0, 1: 2.0}, SMALLER),  # 1, 1.33, 1
            ({0: 4.0, 1: 2.5, 2: 1.0}, {0: 3.0, 1: 2.0}, PLAIN),  # 0.75, 0.8, 1
            ({0: 1.0, 1: 1.0, 2: 1.0}, {0: 1.0, 1: 1.0}, PLAIN),
            ({1: 1.5, 2: 1.0}, {0: 9.0, 1: 2.0}, SMALLER),  # the first is none for so many
            ({2: 1.0}, {0: 9.0, 1: 9.0}, PLAIN)]:
        assert taught(times, lengths).choose(4, False, 10) == best


def test_drafting_that_is_no_faster_than_the_margin_is_left():
    assert taught({0: 2.0, 2: 1.0}, {0: 2.018}).choose(4, False, 10) == PLAIN
    assert taught({0: 2.0, 2: 1.0}, {0: 2.022}).choose(4, False, 10) == WHOLE


def test_what_long_sequences_take_counts():
    made = taught({}, {0: 3.0, 1: 2.0})
    made.measured(4, False, {WHOLE: Curve(at=(0, 1000), seconds=(4.0, 14.0)), PLAIN: Curve(at=(0, 1000), seconds=(1.0, 11.0))})
    assert [made.choose(4, False, length) for length in (0, 40, 60, 1000, 2000)] == [PLAIN, PLAIN, WHOLE, WHOLE, WHOLE]


def test_without_times_the_whole_tree_is_drafted():
    assert taught({0: 9.0, 1: 9.0, 2: 1.0}, {0: 1.0, 1: 1.0}).choose(2, False, 10) == WHOLE
    drawing = taught({0: 9.0, 1: 9.0, 2: 1.0}, {0: 1.0, 1: 1.0})
    assert drawing.choose(4, True, 10) == PLAIN  # the greedy ones' times, where only they were measured
    drawing.measured(4, True, level({0: 0.1, 1: 1.0, 2: 1.0}))
    assert drawing.choose(4, True, 10) == WHOLE


def test_half_of_the_depth_is_expected_at_first_and_of_smaller_trees_no_more_than_of_larger_ones():
    made = Budget((5, 3, 0))
    assert [made.accept_length(choice) for choice in range(3)] == [3.5, 2.5, 1.0]
    made.learn(WHOLE, 12, 10)
    assert [made.accept_length(choice) for choice in range(3)] == [1.2, 1.2, 1.0]
    made.learn(SMALLER, 15, 10)
    assert [made.accept_length(choice) for choice in range(3)] == [1.2, 1.5, 1.0]


def test_new_rounds_count_more_than_old_ones():
    made = Budget((5, 0))
    for _ in range(200):
        made.learn(0, 30, 10)
    for _ in range(32):
        made.learn(0, 10, 10)
    assert made.accept_length(0) == pytest.approx(1 + 2 * (1 - 1 / 32) ** 32, abs=0.01)
    for _ in range(100):
        made.learn(1, 10, 10)
    made.learn(0, 40, 10)  # most of what is known by then
    assert made.accept_length(0) > 2.2
    for _ in range(100_000):
        made.learn(1, 10, 10)
    assert made.accept_length(0) > 1


def run(made, times, real, calls):
    """Seconds and tokens of so many calls whose rounds really accept so many tokens."""
    seconds, tokens, chosen = 0.0, 0.0, []
    for _ in range(calls):
        choice = made.choose(4, False, 10)
        made.learn(choice, round(real[choice] * 1000), 1000)
        seconds, tokens = seconds + times[choice], tokens + real[choice]
        chosen.append(choice)
    return seconds, tokens, chosen


@pytest.mark.parametrize("real", [(1.0, 1.0), (1.9, 1.3), (2.6, 1.9)])
@pytest.mark.parametrize("whole", [1.5, 2.0, 4.0, 9.0])
def test_trials_lose_little_and_drafting_comes_back(whole, real):
    times, made = {0: whole, 1: 1.4, 2: 1.0}, Budget((5, 3, 0))
    made.measured(4, False, level(times))
    real = (*real, 1.0)
    best = max(real[choice] / times[choice] for choice in times)
    run(made, times, real, 20)
    seconds, tokens, _ = run(made, times, real, 20_000)
    assert tokens / seconds > 0.99 * best
    _, _, chosen = run(made, times, (9.5, 1.0, 1.0), 20_000)
    assert chosen[-1] == WHOLE and chosen.index(WHOLE) < 1000 * whole


def test_the_same_calls_give_the_same_choices():
    def chosen():
        made = Budget((5, 3, 0))
        made.measured(4, False, level({0: 2.0, 1: 1.4, 2: 1.0}))
        return [run(made, {0: 2.0, 1: 1.4, 2: 1.0}, real, 300)[2] for real in ((1.0, 1.0, 1.0), (2.0, 1.9, 1.0))]

    assert chosen() == chosen()


def test_a_pass_of_many_rows_has_no_large_trees():
    trees = [sm.NoDrafter(tree_size=size) for size in (60, 15, 1)]
    for size, expected in [(1, (0, 1, 2)), (8, (0, 1, 2)), (9, (1, 2)), (34, (1, 2)), (35, (2,)), (1000, (2,))]:
        assert budget.affordable(trees, size) == expected
    assert budget.affordable(trees[:1], 1000) == (0,)


# on models

@pytest.fixture(scope="module")
def target():
    return sm.random_model(tiny_config(num_layers=1), "fp32", seed=0)


@pytest.fixture(scope="module")
def pairs(target):
    """Targets and their drafters; where a model drafts for itself drafts are accepted, heads guess at random."""
    tree, deep = sm.TreeConfig(depth=3, top_k=4, size=12), sm.random_model(tiny_config(num_layers=4), "fp32", seed=2)
    inner = sm.EagleDrafter(random_head(target, 2, seed=3), sm.TreeConfig(depth=2, top_k=2, size=4))
    return {"chain": (target, sm.ChainDrafter(target, 3)),
            "eagle2": (target, sm.EagleDrafter(random_head(target, 2, seed=3), tree)),
            "eagle3": (deep, sm.EagleDrafter(random_head(deep, 3, seed=3), tree)),
            "hierarchical": (target, sm.HierarchicalDrafter(target, inner, 2))}


NAMES = ("eagle2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("chain", "eagle3", "hierarchical")))


@pytest.mark.parametrize("name", ["chain", "eagle2", "eagle3", "hierarchical"])
def test_choices_share_a_state_and_end_with_none(pairs, name):
    _, drafter = pairs[name]
    found = budget.choices(drafter)
    assert found[0] is drafter and found[-1].tree_size == 1
    sizes = [each.tree_size for each in found]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes) == (2 if name == "hierarchical" else 3)
    states = [jax.eval_shape(lambda each=each: each.init(64)) for each in found[:-1]]
    assert all(state == states[0] for state in states)
    for each in found[:-1]:
        assert each.scratch_rows <= drafter.scratch_rows
        weights = zip(jax.tree.leaves(each.params), jax.tree.leaves(drafter.params), strict=True)
        assert all(one is other for one, other in weights)


def test_the_smallest_drafts_have_no_smaller_ones(target, pairs):
    plain = sm.NoDrafter()
    assert budget.choices(plain) == (plain,)
    assert len(budget.choices(sm.ChainDrafter(target, 1))) == 2
    _, drafter = pairs["eagle2"]
    for tree in (sm.TreeConfig(depth=1, top_k=7, size=7), sm.TreeConfig(depth=2, top_k=1, size=3)):
        assert len(budget.choices(dataclasses.replace(drafter, tree=tree))) == 2
    for tree in (sm.TreeConfig(depth=7, top_k=1, size=8), sm.TreeConfig(depth=1, top_k=9, size=8), sm.TreeConfig()):
        _, smaller, _ = budget.choices(dataclasses.replace(drafter, tree=tree))
        assert smaller.tree_size < tree.size and smaller.max_depth <= tree.depth


def scheduled(engine, monkeypatch, choices):
    """Makes calls take these choices, the last of them to the end."""
    taken, last = iter(choices), len(engine._choices) - 1
    monkeypatch.setattr(engine._budget, "choose", lambda *_: min(last, next(taken, choices[-1])))


def alone(target, drafter, config, asked):
    decoder = sm.Decoder(target, drafter, dataclasses.replace(config, sampling=RequestSampling()))
    prompt, count, sampling = asked
    state = decoder.prefill(prompt, count, key=RequestKey.of(**{"seed": 0, **sampling}, start=len(prompt)))
    state = decoder.loop(decoder.params, state, jnp.int32(1000))
    return state.tokens[len(prompt):int(state.length)].tolist()


def rows(state, slot, length):
    """Of every cache of a drafter the first rows of a slot, or of one sequence."""
    for part in jax.tree.leaves(state, is_leaf=lambda part: isinstance(part, KVCache)):
        if isinstance(part, KVCache):
            yield from (np.asarray(each if slot is None else each[slot])[:length] for each in jax.tree.leaves(part.layers))


def same(drafter, engine, ticket, fresh):
    """A slot's drafter is as one that has taken in the same tokens as a prompt, and drafts the same."""
    part = side_by_side.take(engine._state.drafter, ticket.slot)
    length = len(ticket.request.prompt) + len(ticket.tokens) - 1
    length -= int(getattr(part, "behind", 0))  # a chain's newest row, which its next draft writes
    for found, expected in zip(rows(part, ticket.slot, length), rows(fresh, None, length), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    root, propose = jnp.int32(ticket.tokens[-1]), jax.jit(drafter.propose)
    drafts = [propose(drafter.params, state, root)[0] for state in (part, fresh)]
    assert drafts[0].tokens.tolist() == drafts[1].tokens.tolist()


@pytest.mark.parametrize("count", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_the_same_and_the_drafter_is_up_to_date_whatever_calls_draft(pairs, name, count, monkeypatch):
    (target, drafter), rng = pairs[name], np.random.default_rng(count)
    asked = [(rng.integers(0, 61, length).tolist(), count, sampling) for length, count, sampling in
             ((3, 90, {"temperature": 1.2, "top_k": 7, "seed": 5}), (20, 110, {"temperature": 0.8, "seed": 3}), (9, 101, {}))]
    asked = asked[-max(2, count):]
    with sm.Engine(target, drafter, CONFIG, slots=count) as engine:
        for order in ((PLAIN,), (WHOLE, PLAIN, PLAIN, SMALLER, PLAIN), (PLAIN, SMALLER, WHOLE, PLAIN)):
            scheduled(engine, monkeypatch, order)
            tickets = [engine.submit(prompt, count, **sampling) for prompt, count, sampling in asked]
            for ticket, request in zip(tickets, asked, strict=True):
                assert ticket.result().tokens.tolist() == alone(target, drafter, CONFIG, request)
                assert (ticket.result().accept_lengths.sum() >= len(ticket.tokens) - 1)
            ticket, (prompt, _, _) = tickets[-1], asked[-1]
            taken = [*prompt, *ticket.tokens][:-1]
            engine._take_in_lag([ticket.slot])
            fresh = sm.Decoder(target, drafter, CONFIG).prefill(taken).drafter
            same(drafter, engine, ticket, fresh)


def test_a_drafter_that_lags_too_far_behind_takes_in_what_it_missed(pairs, monkeypatch):
    (target, drafter), taken_in = pairs["eagle2"], []
    monkeypatch.setattr(slots, "MOST_LAG", 24)
    with sm.Engine(target, drafter, CONFIG, slots=1) as engine:
        scheduled(engine, monkeypatch, (PLAIN,))
        catch_up = engine._catch_up
        monkeypatch.setattr(engine, "_catch_up", lambda *given: taken_in.append(int(given[1].lag[0])) or catch_up(*given))
        prompt, tokens = [5, 6, 7], engine.submit([5, 6, 7], 81).result().tokens.tolist()
        assert tokens == alone(target, drafter, CONFIG, (prompt, 81, {})) and taken_in == [24, 24, 24]
        # the next turn of a chat goes on behind what the slot holds, and the drafter behind what it has missed
        chat = [*prompt, *tokens, 1, 2, 3]
        ticket = engine.submit(chat, 9)
        assert ticket.result().tokens.tolist() == alone(target, drafter, CONFIG, (chat, 9, {}))
        assert taken_in == [24, 24, 24, 8] and ticket.reused == 3 + 81 - 3
        engine._take_in_lag([0])
        same(drafter, engine, ticket, sm.Decoder(target, drafter, CONFIG).prefill([*chat, *ticket.tokens][:-1]).drafter)


@pytest.mark.parametrize(("room", "count"), [(8, 3), (8, 8)])
def test_a_chain_whose_drafts_were_all_right_takes_in_what_it_lacks(target, room, count):
    drafter, rng = sm.ChainDrafter(target, 3), np.random.default_rng(0)
    prompt, following = (jnp.asarray(rng.integers(0, 61, size), jnp.int32) for size in (10, room))
    state = drafter.prefill(drafter.params, drafter.init(64), prompt, prompt, None, jnp.int32(10))
    tree, state = drafter.propose(drafter.params, state, jnp.int32(7))
    state = drafter.advance(drafter.params, state, tree.accept(jnp.append(tree.tokens[1:], 5)))
    assert state.behind and state.cache.length == 14
    state = drafter.prefill(drafter.params, state, following, following, None, jnp.int32(count))
    taken = jnp.concatenate([prompt, tree.tokens, following[:count]])
    fresh = drafter.prefill(drafter.params, drafter.init(64), taken, taken, None, jnp.int32(len(taken)))
    assert state.cache.length == fresh.cache.length == 14 + count and state.previous == fresh.previous
    assert bool(state.behind) == (room == count)  # with no room for the last row, which the next draft writes
    for found, expected in zip(rows(state, None, 13 + count), rows(fresh, None, 13 + count), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    root = jnp.int32(9)
    assert drafter.propose(drafter.params, state, root)[0].tokens.tolist() == drafter.propose(
        drafter.params, fresh, root)[0].tokens.tolist()


@pytest.mark.parametrize("name", ["chain", pytest.param("eagle2", marks=pytest.mark.slow)])
def test_warm_up_compiles_every_choice_and_measures_it(pairs, name, monkeypatch):
    target, drafter = pairs[name]
    with sm.Engine(target, drafter, CONFIG, slots=2) as engine:
        engine.warm_up(draws=False)
        compiled = engine._run._cache_size()
        assert compiled == len(engine.buckets) * len(engine._choices) == 6
        assert engine._catch_up._cache_size() == len(engine.buckets)
        for size in engine.buckets:
            curves = engine._budget._curves[size, False]
            assert sorted(curves) == [WHOLE, SMALLER, PLAIN] and min(curve(50) for curve in curves.values()) > 0
        turns = itertools.cycle((0, 1, 2))
        monkeypatch.setattr(engine._budget, "choose", lambda *_: next(turns))
        engine.generate([[1, 2, 3], [4] * 20, [5, 6]], 60)
        assert engine._catch_up._cache_size() == len(engine.buckets)
        assert engine._run._cache_size() == compiled and set(engine.calls) == {each.tree_size for each in engine._choices}


def test_an_engine_drafts_while_that_pays(pairs):
    target, drafter = pairs["chain"]
    with sm.Engine(target, drafter, CONFIG, slots=1) as engine:
        engine.generate([[1, 2, 3]], 100)
        assert set(engine.calls) == {4}  # for nothing was measured
        engine._budget.measured(1, False, level({WHOLE: 2.0, SMALLER: 1.8, PLAIN: 1.0}))  # all of its 3 drafts are right
        engine.generate([[1, 2, 3]], 100)
        assert set(engine.calls) == {4}
        engine._budget.measured(1, False, level({WHOLE: 5.0, SMALLER: 3.0, PLAIN: 1.0}))
        engine.generate([[1, 2, 3]], 100)
        assert set(engine.calls) == {4, 1}
        engine._budget.measured(1, False, level({WHOLE: 5.0, SMALLER: 1.4, PLAIN: 1.0}))
        before = engine.calls.total()
        engine.generate([[1, 2, 3]], 100)
        assert engine.calls[2] == engine.calls.total() - before


def test_without_a_budget_every_call_drafts_the_whole_tree(pairs):
    target, drafter = pairs["chain"]
    with sm.Engine(target, drafter, CONFIG, slots=1, budget=False) as engine:
        engine.warm_up(draws=False)
        assert engine._run._cache_size() == 1
        engine._budget.measured(1, False, level({WHOLE: 5.0}))
        engine.generate([[1, 2, 3]], 40)
        assert set(engine.calls) == {4}
    with pytest.raises(sm.UserError, match="'budget'"):
        sm.Engine(target, slots=1, budget=1)


@pytest.mark.slow
def test_activations_of_eight_bits_leave_the_plain_tokens_and_cache(monkeypatch):
    target = sm.load(DATA / "checkpoints" / "fp16", precision="w8a8")
    head = sm.load_head(DATA / "eagle" / "eagle2_head", target)
    drafter = sm.EagleDrafter(head, sm.TreeConfig(depth=3, top_k=4, size=12))
    config = dataclasses.replace(CONFIG, prefill_chunks=(32,))
    prompts = [np.random.default_rng(seed).integers(0, target.config.vocab_size, 30).tolist() for seed in range(2)]
    plain = sm.Decoder(target, config=config)
    with sm.Engine(target, drafter, config, slots=2) as engine:
        scheduled(engine, monkeypatch, (PLAIN, WHOLE, PLAIN, SMALLER, PLAIN))
        tickets = [engine.submit(prompt, 60) for prompt in prompts]
        for prompt, ticket in zip(prompts, tickets, strict=True):
            state = plain.loop(plain.params, plain.prefill(prompt, 60), jnp.int32(100))
            assert ticket.result().tokens.tolist() == state.tokens[30:90].tolist()
            for found, expected in zip(rows(engine._state.cache, ticket.slot, 89), rows(state.cache, None, 89), strict=True):
                np.testing.assert_array_equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "w4a16", "w8a8"])
def test_reproducible_tokens_do_not_depend_on_what_calls_draft_on_gpu(precision, monkeypatch):
    config = tiny_config(vocab_size=4096, hidden_size=512, intermediate_size=1024, head_dim=64, num_heads=8, num_kv_heads=4,
                         num_layers=4)
    target = sm.random_model(config, precision, seed=0)
    drafter = sm.EagleDrafter(random_head(target, 3, seed=1), sm.TreeConfig(depth=3, top_k=4, size=8))
    how, rng = sm.DecodeConfig(max_len=400, reproducible=True), np.random.default_rng(5)
    asked = [rng.integers(0, 4096, length).tolist() for length in rng.integers(1, 40, 12)]
    one_by_one = sm.Decoder(target, config=how)
    with sm.Engine(target, drafter, how, slots=8) as engine:
        turns = itertools.cycle((PLAIN, WHOLE, PLAIN, PLAIN, SMALLER))
        monkeypatch.setattr(engine._budget, "choose", lambda *_: next(turns))
        tickets = [engine.submit(prompt, 90) for prompt in asked]
        for prompt, ticket in zip(asked, tickets, strict=True):
            assert ticket.result().tokens.tolist() == one_by_one.generate(prompt, 90).tokens.tolist()
        engine._take_in_lag(range(8))
        assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(engine._state.drafter))
