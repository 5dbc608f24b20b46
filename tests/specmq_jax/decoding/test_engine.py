"""Many requests in one loop: each answer is the one that the request gives alone, whatever else is decoded beside it."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import tiny_config

import specmq_jax as sm
from experiments.timing.random_models import random_head
from specmq_jax.decoding.request_sampling import RequestKey, RequestSampling

CONFIG = sm.DecodeConfig(max_len=96, prefill_chunks=(16,))
SAMPLING = [{}, {"temperature": 0.8, "seed": 3}, {"temperature": 1.2, "top_k": 7, "seed": 4},
            {"temperature": 0.9, "top_p": 0.7, "seed": 5}, {"temperature": 1.0, "min_p": 0.1, "top_k": 9, "seed": 6},
            {"logit_bias": {3: 2.5, 17: -4.0}}, {"min_tokens": 6}, {"presence_penalty": 1.5, "frequency_penalty": 0.4},
            {"repetition_penalty": 1.8, "temperature": 0.7, "seed": 8}]
DRAFTERS = ("none", "chain", "eagle", "hierarchical")
FAST = ("none", "eagle", *(pytest.param(name, marks=pytest.mark.slow) for name in ("chain", "hierarchical")))


@pytest.fixture(scope="module")
def target():
    return sm.random_model(tiny_config(num_layers=1), "fp32", seed=0)


@pytest.fixture(scope="module")
def drafters(target):
    small = sm.random_model(tiny_config(num_layers=1, hidden_size=32), "fp32", seed=1)
    tree = sm.TreeConfig(depth=3, top_k=3, size=8)
    inner = sm.EagleDrafter(random_head(small, 2, seed=3), sm.TreeConfig(depth=2, top_k=2, size=4))
    # the target drafts for itself, so that drafts are accepted; heads guess at random
    return {"none": sm.NoDrafter(), "chain": sm.ChainDrafter(target, 3),
            "eagle": sm.EagleDrafter(random_head(target, 2, seed=3), tree),
            "hierarchical": sm.HierarchicalDrafter(dataclasses.replace(small, config=small.config), inner, 2)}


def requests(count, seed=0, vocab=61):
    rng = np.random.default_rng(seed)
    return [{"prompt_ids": rng.integers(0, vocab, rng.integers(1, 40)).tolist(), "max_new_tokens": int(rng.integers(1, 24)),
             "stop_tokens": rng.integers(0, vocab, rng.integers(0, 3)).tolist(), **SAMPLING[i % len(SAMPLING)]}
            for i in range(count)]


class Alone:
    """What each request gives without others."""

    def __init__(self, target, drafter, config=CONFIG):
        self.decoder = sm.Decoder(target, drafter, dataclasses.replace(config, sampling=RequestSampling()))

    def tokens(self, request):
        asked = {name: value for name, value in request.items() if name in (
            "seed", "temperature", "top_k", "top_p", "min_p", "logit_bias", "presence_penalty", "frequency_penalty",
            "repetition_penalty")}
        least = request.get("min_tokens", 0)
        key = RequestKey.of(**{"seed": 0, **asked}, start=len(request["prompt_ids"]), barred=request["stop_tokens"],
                            bar=len(request["prompt_ids"]) + least if least else 0)
        state = self.decoder.prefill(request["prompt_ids"], request["max_new_tokens"], key=key)
        state = self.decoder.loop(self.decoder.params, state, jnp.int32(1000))
        found = state.tokens[len(request["prompt_ids"]):int(state.length)].tolist()
        stops = [place for place, token in enumerate(found) if token in request["stop_tokens"]]
        return found[:stops[0] + 1] if stops else found


def check(engine, alone, asked, seed):
    """Requests join at random moments, and each gives its own tokens."""
    rng, tickets = np.random.default_rng(seed), []
    for request in asked:
        tickets.append(engine.submit(**request))
        for _ in range(rng.integers(0, 3)):
            engine.step()
    for request, ticket in zip(asked, tickets, strict=True):
        result = ticket.result()
        assert result.tokens.tolist() == alone.tokens(request)
        committed = len(result.tokens) - 1
        assert result.accept_lengths.sum() >= committed > result.accept_lengths[:-1].sum() or not committed
        assert result.stopped == (len(result.tokens) < request["max_new_tokens"]
                                  or int(result.tokens[-1]) in request["stop_tokens"])


@pytest.fixture(scope="module")
def pairs(target, drafters):
    """An engine of two slots for each drafter, and what its requests are compared with."""
    found = {}

    def pair(name):
        if name not in found:
            found[name] = sm.Engine(target, drafters[name], CONFIG, slots=2), Alone(target, drafters[name])
        return found[name]

    yield pair
    for engine, _ in found.values():
        engine.close()


@pytest.mark.parametrize("name", FAST)
def test_requests_that_join_and_leave_give_their_own_tokens(pairs, name):
    check(*pairs(name), requests(9), seed=0)


@pytest.mark.parametrize("name", ["none", pytest.param("eagle", marks=pytest.mark.slow)])
def test_log_probabilities_are_the_targets_own(target, pairs, name):
    (engine, _), asked = pairs(name), requests(4, seed=7)
    counts = [(3, 0), (1, 2), (0, 0), (0, 20)]
    for request in asked:
        request.update(max_new_tokens=20, stop_tokens=[], temperature=0.9, seed=1)
    tickets = [engine.submit(**request, logprobs=new, prompt_logprobs=old)
               for request, (new, old) in zip(asked, counts, strict=True)]
    for request, ticket, (new, old) in zip(asked, tickets, counts, strict=True):
        prompt, result = request["prompt_ids"], ticket.result()
        scores = np.asarray(jax.nn.log_softmax(sm.logits(target, [*prompt, *result.tokens.tolist()]), axis=-1))
        split = len(prompt) - 1
        for found, rows, tokens, most in ((result.logprobs, scores[split:-1], result.tokens, new),
                                          (result.prompt_logprobs, scores[:split], prompt[1:], old)):
            if not most:
                assert found is None
                continue
            best = np.argsort(-rows, axis=1, kind="stable")[:, :most]
            np.testing.assert_array_equal(found.best, best)
            np.testing.assert_allclose(found.best_logprobs, np.take_along_axis(rows, best, 1), atol=1e-4)
            np.testing.assert_allclose(found.tokens, rows[np.arange(len(rows)), tokens], atol=1e-4)
    with pytest.raises(sm.UserError, match="'logprobs'"):
        engine.submit([1], logprobs=21)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("penalties", [(1.5, 0.4, 1.0), (0.0, 0.0, 1.7), (-0.5, 0.8, 0.6)])
def test_penalties_are_those_of_their_definitions_on_every_path(target, pairs, name, penalties):
    presence, frequency, repetition = penalties
    engine, _ = pairs(name)
    prompt, made = requests(3, seed=2)[2]["prompt_ids"], []
    for _ in range(12):  # by the definitions, a token at a time
        scores = np.array(sm.logits(target, [*prompt, *made])[-1], np.float32)
        for token in {*prompt, *made}:
            scores[token] = scores[token] / repetition if scores[token] > 0 else scores[token] * repetition
        for token in made:
            scores[token] -= frequency
        for token in set(made):
            scores[token] -= presence
        made.append(int(scores.argmax()))
    found = engine.submit(prompt, 12, presence_penalty=presence, frequency_penalty=frequency, repetition_penalty=repetition)
    assert found.result().tokens.tolist() == made
    assert made != engine.submit(prompt, 12).result().tokens.tolist()


@pytest.mark.parametrize("name", ["none", *(pytest.param(name, marks=pytest.mark.slow) for name in DRAFTERS[1:])])
def test_short_prompts_that_wait_are_taken_in_together(target, drafters, name, monkeypatch):
    asked = [{"prompt_ids": list(range(1, 1 + length)), "max_new_tokens": 5, "stop_tokens": []}
             for length in (3, 16, 9, 40, 2, 11)]
    asked[4]["temperature"] = 1.0  # which is taken in alone
    config = dataclasses.replace(CONFIG, prefill_chunks=(16, 64))
    alone, passes = Alone(target, drafters[name], config), []
    with sm.Engine(target, drafters[name], config, slots=2) as engine:
        admit = engine._admit
        monkeypatch.setattr(engine, "_admit", lambda *given: passes.append(len(given[2])) or admit(*given))
        tickets = [engine.submit(**request) for request in asked]
        assert [ticket.result().tokens.tolist() for ticket in tickets] == [alone.tokens(request) for request in asked]
    assert passes[0] == 2 and sum(passes) == len(asked) and not set(passes) - {1, 2}


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 3, 8])
@pytest.mark.parametrize("name", DRAFTERS)
def test_any_number_of_slots_gives_the_same(target, drafters, name, slots):
    with sm.Engine(target, drafters[name], CONFIG, slots=slots) as engine:
        check(engine, Alone(target, drafters[name]), requests(40, seed=slots), seed=slots)


def test_lists_come_as_they_are_committed_and_a_cancelled_request_leaves_the_others_alone(pairs):
    (engine, alone), asked = pairs("none"), requests(5, seed=1)
    for request in asked:
        request.update(max_new_tokens=40, stop_tokens=[])
    first, second, third, _, last = (engine.submit(**request) for request in asked)
    parts = iter(first)
    begun = next(parts) + next(parts)
    first.cancel()
    last.cancel()  # which still waits
    for ticket in (first, last):
        with pytest.raises(sm.UserError, match="^the request was cancelled$"):
            ticket.result()
    assert [list(ticket.result().tokens) for ticket in (second, third)] == [alone.tokens(each) for each in asked[1:3]]
    assert begun == alone.tokens(asked[0])[:len(begun)] and 1 < len(begun) < 40
    while engine.step():
        pass
    assert engine.running == engine.waiting == 0


def test_a_bias_and_a_least_length_are_kept(pairs):
    engine, alone = pairs("none")
    prompt, plain = [1, 2, 3], alone.tokens({"prompt_ids": [1, 2, 3], "max_new_tokens": 20, "stop_tokens": []})
    often = engine.submit(prompt, 20, logit_bias={9: 1e4}).result().tokens.tolist()
    never = engine.submit(prompt, 20, logit_bias=dict.fromkeys(plain, -1e4), temperature=1.0).result().tokens.tolist()
    assert often == [9] * 20 and not set(never) & set(plain)
    stops = sorted(set(range(61)) - {5, 6})[:16]
    for least in (1, 7, 20):
        found = engine.submit(prompt, 20, stop_tokens=stops, min_tokens=least, logit_bias={stops[0]: 1e4}).result()
        early, rest = found.tokens[:least].tolist(), found.tokens[least:].tolist()
        assert not set(early) & set(stops) and rest == ([stops[0]] if least < 20 else [])


def test_requests_of_several_threads_are_all_answered(pairs):
    (engine, alone), asked, found = pairs("none"), requests(6, seed=2), {}

    def ask(place):
        found[place] = engine.submit(**asked[place]).result().tokens.tolist()

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[place] for place in range(len(asked))] == [alone.tokens(request) for request in asked]


@pytest.mark.parametrize("name", ["none", *(pytest.param(name, marks=pytest.mark.slow) for name in ("chain", "hierarchical"))])
def test_an_answer_ends_where_its_function_says(pairs, name):
    (engine, alone), asked = pairs(name), requests(5, seed=5)
    for request in asked:
        request.update(max_new_tokens=30, stop_tokens=[])
    wanted = [11, None, 1, 30, 7]
    tickets = [engine.submit(**request, until=end and (lambda tokens, end=end: end if len(tokens) >= end else None))
               for request, end in zip(asked, wanted, strict=True)]
    for request, ticket, end in zip(asked, tickets, wanted, strict=True):
        result, expected = ticket.result(), alone.tokens(request)
        assert result.tokens.tolist() == expected[:end] == ticket.tokens
        assert not result.stopped
        committed, count = 1 + np.cumsum(result.accept_lengths), len(result.tokens)
        assert count == 1 or committed[-1] >= count and not (committed[:-1] >= count).any()
    assert sorted(engine._free) == list(range(engine.slots))


def test_everything_is_compiled_by_warm_up(target):
    with sm.Engine(target, config=CONFIG, slots=2) as engine:
        before = engine.submit([5, 6, 7, 8, 9], 40)
        engine.step()
        engine.warm_up()  # answers what was asked before, and leaves nothing in its slot to go on behind
        assert before.is_done
        again = engine.submit([5, 6, 7, 8, 9, *before.tokens], 9)
        alone = Alone(target, sm.NoDrafter())
        assert again.result() and again.reused == 0
        for ticket, most in ((before, 40), (again, 9)):
            asked = {"prompt_ids": ticket.request.prompt.tolist(), "max_new_tokens": most, "stop_tokens": []}
            assert ticket.result().tokens.tolist() == alone.tokens(asked)
        functions = engine._run, engine._take_in, engine._admit
        assert engine.buckets == (1, 2)
        before = [function._cache_size() for function in functions]
        assert before == [2 * 3, 1, 3 + 1]  # a prompt that draws or not, or is penalised, two that don't draw
        for options in ({}, {"temperature": 0.5}, {"logit_bias": {1: 2.0}}, {"presence_penalty": 0.5}):
            engine.generate([request["prompt_ids"] for request in requests(5)], 12, **options)
        assert [function._cache_size() for function in functions] == before


def test_a_state_that_is_not_finite_ends_its_own_request_alone(target):
    table = target.params["params"]["embed"]["table"]
    params = {"params": target.params["params"] | {"embed": {"table": table.at[7].set(jnp.nan)}}}
    broken, asked = dataclasses.replace(target, params=params), requests(4, seed=3)
    for request in asked:
        request["prompt_ids"] = [token for token in request["prompt_ids"] if token != 7] or [1]
    asked[1]["prompt_ids"] = [*asked[1]["prompt_ids"], 7, 3]
    asked[1]["stop_tokens"] = []
    alone = Alone(broken, sm.NoDrafter())
    with sm.Engine(broken, config=CONFIG, slots=1) as engine:  # every request in the same slot
        tickets = [engine.submit(**request) for request in asked]
        with pytest.raises(sm.NotFiniteError, match=r"token \d+ of the prompt \(id 7\) is not finite"):
            tickets[1].result()
        for request, ticket in zip(asked, tickets, strict=True):
            if ticket is not tickets[1]:
                try:
                    assert ticket.result().tokens.tolist() == alone.tokens(request)
                except sm.NotFiniteError as error:  # it has drawn the token itself
                    assert list(error.tokens) == alone.tokens(request)


def test_what_no_engine_can_do_is_refused(target):
    engine = sm.Engine(target, config=CONFIG, slots=1)
    for slots in (0, -1, 1.5, True):
        with pytest.raises(sm.UserError, match="'slots'"):
            sm.Engine(target, slots=slots)
    with pytest.raises(sm.UserError, match="verifies at most 512 rows at once; 513 slots of 1 nodes are 513"):
        sm.Engine(target, config=dataclasses.replace(CONFIG, reproducible=True), slots=513)
    with pytest.raises(sm.UserError, match=r"sampled by Greedy\(\) or Sampling"):
        sm.Engine(target, config=dataclasses.replace(CONFIG, sampling=RequestSampling()))
    for prompt, message in [([], "at least one token id"), ([99], "99"), ([1] * 96, "96 tokens")]:
        with pytest.raises(sm.UserError, match=message):
            engine.submit(prompt)
    for options, message in [({"max_new_tokens": 0}, "max_new_tokens"), ({"temperature": -1.0}, "temperature"),
                             ({"top_p": 0}, "top_p"), ({"min_p": 2}, "min_p"),
                             ({"stop_tokens": range(17)}, "at most 16 stop tokens; found 17"),
                             ({"min_tokens": -1}, "min_tokens"),
                             ({"logit_bias": {61: 1.0}}, "logit_bias names token 61; the vocabulary has 61"),
                             ({"logit_bias": {1: float("nan")}}, r"numbers of at most 1e\+06 either way; found 1: nan"),
                             ({"logit_bias": {1: 1e39}}, r"found 1: 1e\+39"),
                             ({"logit_bias": [1]}, "logit_bias must map token ids"),
                             ({"temperature": ""}, "temperature"), ({"stop_tokens": 3}, "stop_tokens"),
                             ({"logit_bias": {-1: 1.0}}, "must map token ids")]:
        with pytest.raises(sm.UserError, match=message):
            engine.submit([1], **options)
    with pytest.raises(sm.UserError, match="at most 64 tokens with a bias; found 65"):
        RequestKey.of(seed=0, logit_bias=dict.fromkeys(range(65), 1.0))
    # more than there is of either counts as all
    assert len(engine.submit([1, 2], 3, temperature=1.0, top_k=2**40, min_tokens=2**31 - 1).result().tokens) == 3
    waiting = engine.submit([1, 2])
    engine.close()
    with pytest.raises(sm.UserError, match="^the engine is closed$"):
        waiting.result()
    with pytest.raises(sm.UserError, match="^the engine is closed$"):
        engine.submit([1])


@pytest.mark.parametrize("name", FAST)
def test_a_prompt_goes_on_behind_what_a_slot_holds(pairs, name):
    """The turns of two chats, and a prompt that shares only its beginning with one of them."""
    (engine, alone), rng = pairs(name), np.random.default_rng(9)
    chats, before = [rng.integers(0, 61, 18).tolist() for _ in range(2)], engine.reused
    for _ in range(2):
        asked = [{"prompt_ids": list(chat), "max_new_tokens": 7, "stop_tokens": []} for chat in chats]
        tickets = [engine.submit(**request) for request in asked]
        for chat, request, ticket in zip(chats, asked, tickets, strict=True):
            answer = ticket.result().tokens.tolist()
            assert answer == alone.tokens(request)
            chat += [*answer, *rng.integers(0, 61, 5).tolist()]
    # what was committed, but for its last two tokens and one that is taken in again
    assert [ticket.reused for ticket in tickets] == [18 + 7 - 3] * 2
    other = {"prompt_ids": chats[0][:10] + [1, 2, 3], "max_new_tokens": 9, "stop_tokens": []}
    ticket = engine.submit(**other)
    assert ticket.result().tokens.tolist() == alone.tokens(other) and ticket.reused in (9, 10, 11)
    assert engine.reused - before == 2 * 22 + ticket.reused


def test_a_reproducible_request_takes_its_prompt_in_as_if_alone(target):
    with sm.Engine(target, config=dataclasses.replace(CONFIG, reproducible=True), slots=1) as engine:
        first, second = engine.generate([[1, 2, 3, 4] * 5] * 2, 4)
        assert first.tokens.tolist() == second.tokens.tolist() and engine.reused == 0


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "w4a16", "w8a8", "w4a8-qqq-g128"])
def test_reproducible_answers_have_the_tokens_of_one_by_one_on_gpu(precision):
    config = tiny_config(vocab_size=4096, hidden_size=512, intermediate_size=1024, head_dim=64, num_heads=8, num_kv_heads=4,
                         num_layers=4)
    target = sm.random_model(config, precision, seed=0)
    for drafter in (sm.NoDrafter(), sm.EagleDrafter(random_head(target, 3, seed=1), sm.TreeConfig(depth=3, top_k=4, size=8))):
        how = sm.DecodeConfig(max_len=400, reproducible=True)
        alone = sm.Decoder(target, drafter, how)
        asked = [(request["prompt_ids"], 60) for request in requests(26, seed=5, vocab=4096)]
        expected = [alone.generate(*request).tokens.tolist() for request in asked]
        for slots in (8, 24):  # with trees 64 rows and 192
            with sm.Engine(target, drafter, how, slots=slots) as engine:
                tickets = [engine.submit(*request) for request in asked]
                assert [ticket.result().tokens.tolist() for ticket in tickets] == expected
