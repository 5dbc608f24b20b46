"""Perplexity is exp of the mean loss over windows of the text."""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from sources import DATA, TINY, write_hf

import specmq_jax as sm
from checkpoints_tools import perplexity as module
from checkpoints_tools.conversion import convert
from checkpoints_tools.perplexity import perplexity
from checkpoints_tools.quantizers.calibration import read_tokens
from specmq_jax.errors import UserError
from specmq_jax.tokenizer import load_tokenizer

MODEL = DATA / "checkpoints" / "fp16"
TEXT = "In the harbour three boats lay side by side, and none of them had been painted since the war. " * 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    source = tmp_path_factory.mktemp("model")
    write_hf(source / "source")
    return sm.load(convert(source / "source", source / "made"))


def losses(model, window) -> np.ndarray:
    scores = np.asarray(jax.nn.log_softmax(sm.logits(model, window)), np.float64)
    return -scores[np.arange(len(window) - 1), window[1:]]


@pytest.mark.parametrize(("count", "rows"), [(48, 256), (53, 7), (49, 7)],
                         ids=["whole windows", "a shorter last one", "a last one with nothing to score"])
def test_it_is_the_mean_loss_of_every_token_but_a_windows_first(model, monkeypatch, count, rows):
    monkeypatch.setattr(module, "_ROWS", rows)
    module._losses.clear_cache()
    tokens = np.random.default_rng(0).integers(0, TINY["vocab_size"], count)
    expected = np.concatenate([losses(model, tokens[start:start + 16]) for start in range(0, count, 16)])
    found = perplexity(model, tokens, 16)
    assert found.tokens == len(expected)
    assert found.value == pytest.approx(np.exp(expected.mean()), rel=1e-5)


@pytest.mark.parametrize(("tokens", "length", "message"), [
    ([1, 2, 3], 1, "choose a length from 2 to the model's 256 positions"),
    ([1, 2, 3], 257, "choose a length from 2 to the model's 256 positions"),
    ([1], 16, "the text has one token"),
    ([1, 97], 16, "token id 97 lies outside the vocabulary of 97"),
])
def test_a_text_or_a_length_that_can_not_be_scored(model, tokens, length, message):
    with pytest.raises(UserError, match=message):
        perplexity(model, tokens, length)


def command(*arguments):
    return subprocess.run([sys.executable, "-m", "checkpoints_tools.perplexity", *map(str, arguments)], capture_output=True,
                          text=True, cwd=pathlib.Path(__file__).parents[2], env=os.environ)


def test_the_command_prints_perplexity_tokens_and_precision(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    made = convert(MODEL, tmp_path / "made")
    result = command(made, f"--text={tmp_path / 'text.txt'}", "--length=32", "--precision=w8a16")
    assert result.returncode == 0, result.stderr
    value, count = re.fullmatch(r"perplexity ([\d.]+) \| (\d+) tokens in windows of 32 \| w8a16 \| [\d.]+ s\n",
                                result.stdout).groups()
    tokens = read_tokens(tmp_path / "text.txt", load_tokenizer(made))
    expected = perplexity(sm.load(made, "w8a16"), tokens, 32)
    assert float(value) == pytest.approx(expected.value, abs=1e-4) and int(count) == expected.tokens


def test_a_missing_text_is_one_line():
    result = command(MODEL)
    assert result.returncode == 2 and "--text=FILE is missing" in result.stderr and "Traceback" not in result.stderr


def test_scores_that_are_not_finite_end_it_and_name_the_token(model):
    table = model.params["params"]["embed"]["table"]
    params = {"params": {**model.params["params"], "embed": {"table": table.at[7].set(np.nan)}}}
    tokens = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    with pytest.raises(UserError, match=r"scores behind token 7 of the text \(id 7\) are not finite"):
        perplexity(dataclasses.replace(model, params=params), tokens, 5)
