"""Frequency-ranked vocabularies: the output stays what it was, and the ranking counts what the text holds."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from fakes import DATA
from test_eagle import prompts

import specmq_jax as sm
from specmq_jax.decoding.drafters import vocabulary

BASE, HEAD = DATA / "checkpoints" / "fp16", DATA / "eagle" / "eagle2_head"
TREE = sm.TreeConfig(depth=3, top_k=4, size=12)


@pytest.fixture(scope="module")
def base():
    return sm.load(BASE, expand=True)


@pytest.fixture(scope="module")
def head(base):
    return sm.load_head(HEAD, base)


GREEDY, SAMPLED = sm.Greedy(), sm.Sampling(temperature=0.9, top_k=50)


@pytest.mark.parametrize(("size", "hierarchical", "sampling"), [
    (16, False, SAMPLED), (200, True, GREEDY),
    *(pytest.param(*case, marks=pytest.mark.slow)
      for case in ((16, False, GREEDY), (200, False, GREEDY), (200, False, SAMPLED), (200, True, SAMPLED)))])
def test_a_cut_vocabulary_changes_no_token(base, head, size, hierarchical, sampling):
    config = sm.DecodeConfig(max_len=128, sampling=sampling)
    plain = sm.Decoder(base, config=config)
    expected = [plain.generate(prompt, 24, seed=seed).tokens.tolist() for seed, prompt in enumerate(prompts())]
    ranked = vocabulary.rank(expected[:3], base.config.vocab_size)
    drafter = sm.EagleDrafter(vocabulary.cut_vocabulary(head, ranked, size), TREE)
    if hierarchical:
        drafter = sm.HierarchicalDrafter(base, drafter, 3)
    decoder = sm.Decoder(base, drafter, config)
    lengths = []
    for seed, (prompt, tokens) in enumerate(zip(prompts(), expected, strict=True)):
        found = decoder.generate(prompt, 24, seed=seed)
        assert found.tokens.tolist() == tokens
        assert [t for part in decoder.stream(prompt, 24, seed=seed) for t in part] == tokens
        lengths.extend(found.accept_lengths)
    assert max(lengths) > 1, "drafts must have been accepted"


def test_the_whole_vocabulary_gives_the_same_tree_and_a_part_only_its_tokens(base, head):
    whole = np.random.default_rng(0).permutation(512).astype(np.int32)
    trees = []
    for cut in (head, vocabulary.cut_vocabulary(head, whole, 512), vocabulary.cut_vocabulary(head, whole, 40)):
        drafter = sm.EagleDrafter(cut, TREE)
        state = sm.Decoder(base, drafter, sm.DecodeConfig(max_len=128)).prefill([5, 9, 77, 300])
        trees.append(jax.jit(drafter.propose)(drafter.params, state.drafter, state.tokens[state.length - 1])[0])
    assert trees[0].tokens.tolist() == trees[1].tokens.tolist() and trees[0].parent.tolist() == trees[1].parent.tolist()
    assert set(trees[2].tokens[1:].tolist()) <= set(whole[:40].tolist())


def test_the_command_ranks_what_the_text_holds(tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text('{"turns": ["the the the", "a"], "id": 3}\n\n{"turns": ["the a"]}\n')
    command = [sys.executable, "-m", "checkpoints_tools.rank_vocabulary", str(BASE), str(tmp_path / "out.json")]
    done = subprocess.run([*command, f"--text={text}"], capture_output=True, text=True, cwd=DATA.parents[1])
    assert done.returncode == 0, done.stderr
    ranked, size = vocabulary.read_ranking(tmp_path / "out.json")
    from specmq_jax.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(BASE)
    counts = np.bincount([t for line in ("the the the", "a", "the a")
                          for t in tokenizer.encode(line, add_special_tokens=False)], minlength=512)
    assert size == 512 and np.all(np.diff(counts[ranked]) <= 0) and sorted(ranked.tolist()) == list(range(512))
    again = subprocess.run([*command, f"--text={text}"], capture_output=True, text=True, cwd=DATA.parents[1])
    assert again.returncode == 2 and "exists already" in again.stderr


def test_errors_say_what_does_not_fit(head, tmp_path):
    ranked = np.arange(512, dtype=np.int32)
    with pytest.raises(sm.UserError, match="a vocabulary of 600 tokens can't be cut from 512 ranked ids"):
        vocabulary.cut_vocabulary(head, ranked, 600)
    with pytest.raises(sm.UserError, match="which can't be cut"):
        vocabulary.cut_vocabulary(vocabulary.cut_vocabulary(head, ranked, 50), ranked, 40)
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(sm.UserError, match="is no ranked vocabulary"):
        vocabulary.read_ranking(tmp_path / "x.json")
