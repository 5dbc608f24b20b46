"""A number that is not finite ends the answer where it matters, and touches nothing where it does not."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import DATA, OracleDrafter, expanded, tiny_config
from flax import traverse_util

import specmq_jax as sm
from specmq_jax.errors import NotFiniteError

PROMPT, NEW, AT = [5, 17, 40, 3], 30, 12
VALUES = (np.nan, np.inf, -np.inf, 1e30)
CONFIG = sm.DecodeConfig(max_len=256, prefill_chunks=(4, 16))


def with_embedding(model: sm.Model, token: int, value: float) -> sm.Model:
    """The model with one vector of its embedding table filled with a value."""
    flat = traverse_util.flatten_dict(model.params["params"], sep="/")
    flat["embed/table"] = flat["embed/table"].at[token].set(value)
    return dataclasses.replace(model, params={"params": traverse_util.unflatten_dict(flat, sep="/")})


@pytest.fixture(scope="module")
def answer(tiny):
    """A greedy answer whose token at `AT` comes there for the first time and is not in the prompt."""
    tokens = sm.Decoder(tiny, config=CONFIG).generate(PROMPT, NEW).tokens.tolist()
    assert tokens[AT] not in PROMPT + tokens[:AT]
    return tokens


def drafters(model, draft, answer):
    truth = np.concatenate([PROMPT, answer])
    return {"none": None, "chain": sm.ChainDrafter(draft, 3),
            "tree": OracleDrafter.random(truth, size=23, vocab=61, skill=0.9, seed=1),
            "own chain": sm.ChainDrafter(model, 4)}


@pytest.mark.parametrize(("name", "value"), [
    *((name, np.nan) for name in ("none", "chain", "tree", "own chain")), ("none", 1e30), ("chain", 1e30),
    *(pytest.param(*case, marks=pytest.mark.slow)
      for case in (("tree", 1e30), ("own chain", 1e30), ("none", np.inf), ("chain", np.inf), ("tree", np.inf),
                   ("own chain", np.inf)))])
def test_an_answer_ends_at_the_token_whose_state_is_not_finite(tiny, tiny_draft, answer, name, value):
    """Squares of 1e30 are infinite in f32."""
    broken = with_embedding(tiny, answer[AT], value)
    decoder = sm.Decoder(broken, drafters(broken, tiny_draft, answer)[name], CONFIG)
    with pytest.raises(NotFiniteError, match=rf"at token {AT + 1} of the answer \(id {answer[AT]}\) is not finite") as caught:
        decoder.generate(PROMPT, NEW)
    assert list(caught.value.tokens) == answer[:AT + 1] and caught.value.position == len(PROMPT) + AT
    streamed = []
    with pytest.raises(NotFiniteError, match=f"at token {AT + 1} of the answer"):
        for part in decoder.stream(PROMPT, NEW, rounds=2):
            streamed += part
    assert streamed == answer[:AT + 1]
    # an answer that ends with that token needs no state of it, and the next one starts anew
    assert decoder.generate(PROMPT, AT + 1).tokens.tolist() == answer[:AT + 1]


def test_a_state_tells_its_fault(tiny, answer):
    decoder = sm.Decoder(with_embedding(tiny, answer[AT], np.nan), config=CONFIG)
    state = decoder.prefill(PROMPT, NEW)
    for _ in range(NEW):
        state = decoder.round(state)
    assert bool(state.done) and int(state.fault) == len(PROMPT) + AT and int(state.length) == len(PROMPT) + AT + 1


def test_a_stop_token_ends_an_answer_before_it(tiny, answer):
    config = dataclasses.replace(CONFIG, stop_tokens=(answer[AT],))
    found = sm.Decoder(with_embedding(tiny, answer[AT], np.nan), config=config).generate(PROMPT, NEW)
    assert found.stopped and found.tokens.tolist() == answer[:AT + 1]


@pytest.mark.parametrize("place", [0, 5, 21])
def test_a_prompt_names_its_token(tiny, place):
    """Prompts of several chunks, also where the chunk that follows is sound."""
    prompt = [1 + i % 50 for i in range(26)]
    prompt[place] = 60
    decoder = sm.Decoder(with_embedding(tiny, 60, np.nan), config=CONFIG)
    for ask in (decoder.prefill, decoder.next_logits):
        with pytest.raises(NotFiniteError, match=rf"at token {place + 1} of the prompt \(id 60\) is not finite"):
            ask(prompt)


@pytest.mark.parametrize("reproducible", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_rejected_draft_that_is_not_finite_reaches_nothing(tiny, tiny_draft, answer, reproducible):
    """Wrong nodes of a tree carry tokens whose vectors are not finite, beside and before the right ones."""
    poisoned = tiny
    used = {*PROMPT, *answer}
    for token, value in zip(sorted(set(range(61)) - used), itertools.cycle(VALUES)):
        poisoned = with_embedding(poisoned, token, value)
    config = dataclasses.replace(CONFIG, reproducible=reproducible)
    met = set()
    for seed in range(2):
        drafter = OracleDrafter.random(np.concatenate([PROMPT, answer]), size=40, vocab=61, skill=0.8, seed=seed)
        start = drafter.init(0).replace(position=jnp.int32(len(PROMPT)))
        tree, _ = drafter.propose(drafter.params, start, jnp.int32(answer[0]))
        met |= {str(value) for value in np.asarray(poisoned.params["params"]["embed"]["table"])[tree.tokens, 0]}
        assert sm.Decoder(poisoned, drafter, config).generate(PROMPT, NEW).tokens.tolist() == answer
    assert met >= {str(np.float32(value)) for value in VALUES}, "nodes carried each of them"
    for value in VALUES[:1] if reproducible else VALUES:
        chain = sm.Decoder(tiny, sm.ChainDrafter(with_embedding(tiny_draft, answer[AT], value), 3), config)
        assert chain.generate(PROMPT, NEW).tokens.tolist() == answer


@pytest.mark.parametrize("precision", ["w8a8", "w4a8-qqq", "w4a8-qqq-g128", "w4a8-qoq", "w4a8-qoq-g128", "w4a16-g32", "w8a16"])
@pytest.mark.parametrize("value", [np.nan, pytest.param(np.inf, marks=pytest.mark.slow)])
def test_no_precision_makes_a_number_of_it(precision, value):
    model = with_embedding(expanded(sm.random_model(tiny_config(hidden_size=128), "fp32", seed=1), precision), 40, value)
    with pytest.raises(NotFiniteError, match=r"at token 3 of the prompt \(id 40\)"):
        sm.Decoder(model, config=CONFIG).generate(PROMPT, 4)


@pytest.mark.parametrize("version", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_head_that_is_not_finite_drafts_nothing_and_changes_nothing(version):
    target = sm.load(DATA / ("eagle/eagle3_base" if version == 3 else "checkpoints/fp16"))
    head = sm.load_head(DATA / "eagle" / f"eagle{version}_head", target)
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan if leaf.dtype == jnp.float32 else leaf, head.params["head"])
    broken["params"]["embed"] = head.params["head"]["params"]["embed"]
    drafter = sm.EagleDrafter(dataclasses.replace(head, params=head.params | {"head": broken}),
                              sm.TreeConfig(depth=3, top_k=4, size=12))
    plain = sm.Decoder(target, config=CONFIG).generate(PROMPT, NEW)
    assert sm.Decoder(target, drafter, CONFIG).generate(PROMPT, NEW).tokens.tolist() == plain.tokens.tolist()
    if version == 2:
        hierarchy = sm.HierarchicalDrafter(target, drafter, 2)
        assert sm.Decoder(target, hierarchy, CONFIG).generate(PROMPT, NEW).tokens.tolist() == plain.tokens.tolist()


def scaled(model: sm.Model, part: str, factor: float) -> sm.Model:
    """The model with the weights at paths that end in `part` multiplied."""
    flat = traverse_util.flatten_dict(model.params["params"], sep="/")
    flat = {path: jax.tree.map(lambda leaf: leaf * jnp.asarray(factor, leaf.dtype), weight) if path.endswith(part) else weight
            for path, weight in flat.items()}
    return dataclasses.replace(model, params={"params": traverse_util.unflatten_dict(flat, sep="/")})


@pytest.mark.parametrize(("part", "factor"), [("mlp/gate_up/w", 600.0), ("attention/qkv/w", 60000.0), ("mlp_norm/scale", 1e5)])
def test_activations_past_half_precision_end_the_answer(part, factor):
    """Each weight is finite in f16; products of it are not, and f32 holds them."""
    model = scaled(sm.random_model(tiny_config(num_layers=1), "fp16", seed=1), part, factor)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(model.params))
    with pytest.raises(NotFiniteError, match="leave the range of float16, which --precision=bf16 or fp32 may hold"):
        sm.Decoder(model, config=CONFIG).generate(PROMPT, 4)
    wide = scaled(sm.random_model(tiny_config(num_layers=1), "fp32", seed=1), part, factor)
    assert len(sm.Decoder(wide, config=CONFIG).generate(PROMPT, 4).tokens) == 4
