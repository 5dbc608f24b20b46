"""What is not finite ends a head's training with a sentence, and is neither learnt from nor kept."""

import io

import numpy as np
import pytest
from rich.console import Console

import specmq_jax as sm
from checkpoints_tools.training import trainer
from checkpoints_tools.training.sampler import Request, Sampler

CONFIG = sm.LlamaConfig(vocab_size=61, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2,
                        head_dim=16, max_position=512)
PROMPT = (5, 17, 40, 3)


@pytest.fixture(scope="module")
def target():
    return sm.random_model(CONFIG, "fp32", seed=1)


def sampler(target, **changes):
    return Sampler(**{"module": target.dense().module, "slots": 2, "max_len": 64, "max_new_tokens": 20, "stop_tokens": (),
                      "admitted": 2, "steps": 5} | changes)


def poisoned(params, token):
    parts = params["params"]
    return {"params": parts | {"embed": {"table": parts["embed"]["table"].at[token].set(np.nan)}}}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_prompt_whose_state_is_not_finite_gets_no_answer(target, temperature):
    params = poisoned(target.params, 17)
    with pytest.raises(sm.NotFiniteError, match="the model's state at a token of a prompt of 4 is not finite"):
        list(sampler(target, temperature=temperature).run(params, [Request(key=0, prompt=PROMPT)]))


def test_an_answer_ends_at_the_token_whose_state_is_not_finite(target):
    params = target.params
    (whole,) = sampler(target).run(params, [Request(key=0, prompt=PROMPT)])
    tokens = whole.tokens.tolist()
    place = next(i for i, token in enumerate(tokens) if i > 2 and token not in tokens[:i] and token not in PROMPT)
    with pytest.raises(sm.NotFiniteError, match=rf"token {place + 1} of an answer \(id {tokens[place]}\)") as caught:
        list(sampler(target).run(poisoned(params, tokens[place]), [Request(key=0, prompt=PROMPT)]))
    assert list(caught.value.tokens) == tokens[:place + 1]


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path):
    schedule = trainer.Schedule(steps=300, batch=1, length=64)
    made = trainer.Trainer(None, schedule, {}, None, tmp_path, Console(file=io.StringIO()))
    sums = {"counts": np.ones((2, 4)), "loss": np.float32(np.nan)}
    with pytest.raises(sm.UserError, match="training has diverged by update 50: its loss is not finite; lower --learning_rate"):
        made._tell(50, sums, 50, 1.0)
    assert not list(tmp_path.iterdir())
