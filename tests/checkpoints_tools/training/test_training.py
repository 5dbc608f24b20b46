"""Training of heads: slots answer as decoding does, and a run can be killed, resumed and loaded."""

import io
import json
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import specmq_jax as sm
from checkpoints_tools import train_eagle
from checkpoints_tools.training import answers, rows, trainer
from checkpoints_tools.training.sampler import Request, Sampler
from specmq_jax import tokenizer as tk

DATA = pathlib.Path(__file__).parents[2] / "data"
BASES = {2: DATA / "checkpoints" / "fp16", 3: DATA / "eagle" / "eagle3_base"}


def test_a_low_bit_target_is_trained_for_as_it_computes():
    config = sm.LlamaConfig(vocab_size=61, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2,
                            head_dim=16, max_position=512)
    target = sm.random_model(config, "w4a16-g32", seed=1)
    params = target.dense().params["params"]
    for name, part in (("qkv", "attention"), ("down", "mlp")):
        packed = target.params["params"]["layers_1"][part][name]["w"]
        weight = params["layers_1"][part][name]["w"].values
        np.testing.assert_array_equal(weight, target.module.format.unpack(packed, weight.shape).astype(jnp.float16))


def test_slots_answer_as_the_decoder_does():
    base = sm.load(BASES[2], expand=True)
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(0, 512, size).tolist()) for size in (3, 40, 9, 17, 1, 64, 5)]
    decoder = sm.Decoder(base, config=sm.DecodeConfig(max_len=96))
    expected = {prompt: decoder.generate(prompt, 24).tokens.tolist() for prompt in prompts}
    stop = expected[prompts[1]][5]
    sampler = Sampler(module=base.dense().module, slots=3, max_len=96, max_new_tokens=24, stop_tokens=(stop,), admitted=2,
                      steps=5)
    again = iter([Request(key="again", prompt=prompts[0])])
    found = list(sampler.run(base.params, [Request(key=i, prompt=p) for i, p in enumerate(prompts)],
                             follow_up=lambda _: next(again, None)))
    assert {c.request.key for c in found} == {*range(len(prompts)), "again"}
    for completion in found:
        tokens = expected[completion.request.prompt]
        cut = tokens.index(stop) + 1 if stop in tokens else len(tokens)
        assert completion.tokens.tolist() == tokens[:cut]


def test_packed_rows_hold_every_token_once_and_keep_sequences_apart():
    rng = np.random.default_rng(0)
    tokens = [rng.integers(1, 500, rng.integers(4, 90)).astype(np.int32) for _ in range(200)]
    made = answers.Sequences(tokens=tokens, prompts=np.int32([len(ids) // 3 for ids in tokens]),
                             dialogues=np.int32(np.arange(200) // 2))
    inside, outside = rows.split(made, held_out=0.1, seed=0)
    assert len(inside) + len(outside) == 200 and not set(made.dialogues[inside]) & set(made.dialogues[outside])
    packed = rows.pack(made, inside, 64)
    assert np.count_nonzero(packed.segments) == sum(min(64, len(tokens[i])) for i in inside)
    seen = []
    for row in range(len(packed)):
        for segment in range(1, packed.segments[row].max() + 1):
            where = packed.segments[row] == segment
            assert packed.positions[row][where].tolist() == list(range(where.sum()))
            seen.append((tuple(packed.tokens[row][where].tolist()), int(packed.answer[row][where].sum())))
    assert sorted(seen) == sorted((tuple(tokens[i][:64].tolist()), max(0, min(64, len(tokens[i])) - int(made.prompts[i])))
                                  for i in inside)


def command(base, destination, prompts, *more):
    return subprocess.run(
        [sys.executable, "-m", "checkpoints_tools.train_eagle", str(base), str(destination), f"--prompts={prompts}",
         "--max_new_tokens=24", "--length=64", "--batch=4", "--slots=8", *more], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [{"turns": [f"Say {word} {number}", "and again"]} for word in ("this", "that") for number in range(12)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("version", [2, 3])
def test_a_head_is_trained_from_one_command_and_drafts_what_it_learned(version, prompt_file, tmp_path):
    base, destination = BASES[version], tmp_path / "head"
    options = f"--version={version}", "--epochs=40", "--learning_rate=3e-3", "--draft_vocabulary=200", "--drafts=3"
    found = command(base, destination, prompt_file, *options)
    assert found.returncode == 0, found.stderr
    log = [json.loads(line) for line in (tmp_path / "head.work" / "log.jsonl").read_text().splitlines()]
    assert log[-2]["loss"] < log[0]["loss"] and log[-2]["accept_length"] > log[0]["accept_length"] + 0.3
    assert log[-1]["held_out_accept_length"] >= 1
    target = sm.load(base)
    head = sm.load_head(destination, target)
    assert head.config.version == version and (head.params["ids"] is None) == (version == 2)
    decoder = sm.Decoder(target, sm.EagleDrafter(head, sm.TreeConfig(depth=3, top_k=4, size=16)),
                         sm.DecodeConfig(max_len=128))
    tokenizer = tk.load_tokenizer(base)
    learned = [decoder.generate(tk.encode_chat(tokenizer, [{"role": "user", "content": f"Say this {number}"}]), 24)
               for number in range(12)]
    assert np.mean(np.concatenate([found.accept_lengths for found in learned])) > 1.3
    again = command(base, destination, prompt_file, *options)
    assert again.returncode == 2 and "exists and is not empty" in again.stderr


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_at_the_same_head(prompt_file, tmp_path, monkeypatch):

    def settings(name):
        return train_eagle.Settings(prompts=prompt_file, work_dir=tmp_path / name, answers=tmp_path / "answers", version=2,
                                    slots=8, max_new_tokens=24, length=64, batch=4, epochs=4, drafts=2)

    console = Console(file=io.StringIO())
    train_eagle.train(str(BASES[2]), tmp_path / "whole", settings("a"), console)
    saved = trainer.Checkpoints.save

    def dies(self, step, state):
        saved(self, step, state)
        if step == 10:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Schedule, "__init__", _with(trainer.Schedule.__init__, save_every=5))
        patch.setattr(trainer.Checkpoints, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            train_eagle.train(str(BASES[2]), tmp_path / "parts", settings("b"), console)
    assert not (tmp_path / "parts").exists()
    train_eagle.train(str(BASES[2]), tmp_path / "parts", settings("b"), console)
    whole, parts = (np.fromfile(tmp_path / name / "model.safetensors", np.uint8) for name in ("whole", "parts"))
    assert whole.shape == parts.shape and np.mean(whole == parts) > 0.99


def _with(function, **changes):
    return lambda *arguments, **options: function(*arguments, **{**options, **changes})


def test_answers_are_resumed_and_a_full_disk_loses_none(tmp_path, monkeypatch):
    base = sm.load(BASES[2], expand=True)
    console = Console(file=io.StringIO())
    tokenizer, params = tk.load_tokenizer(base.directory), base.params
    sampler = Sampler(module=base.dense().module, slots=4, max_len=64, max_new_tokens=8, stop_tokens=())
    dialogues = [(f"number {i}", "more") for i in range(10)]
    made = {"model": "x"}
    monkeypatch.setattr(answers, "PART", 4)
    store, write, calls = answers.AnswerStore(tmp_path / "answers", made), np.savez_compressed, []

    def fills_up(*arguments, **arrays):
        calls.append(1)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        write(*arguments, **arrays)

    monkeypatch.setattr(np, "savez_compressed", fills_up)
    with pytest.raises(sm.UserError, match="No space left on device; the answers it holds are kept"):
        answers.make(store, sampler, params, tokenizer, dialogues, console)
    monkeypatch.setattr(np, "savez_compressed", write)
    kept = answers.AnswerStore(tmp_path / "answers", made)
    assert len(list(kept.found())) == 8 and not list(tmp_path.glob("answers/*.partial"))
    answers.make(kept, sampler, params, tokenizer, dialogues, console)
    assert sorted(row[:2] for row in kept.found()) == [(i, turn) for i in range(10) for turn in (0, 1)]
    with pytest.raises(sm.UserError, match="holds answers made otherwise"):
        answers.AnswerStore(tmp_path / "answers", {"model": "y"})


def test_prompts_of_its_own_are_written_once(tmp_path):
    base = sm.load(BASES[2], expand=True)
    tokenizer, params = tk.load_tokenizer(base.directory), base.params
    sampler = Sampler(module=base.dense().module, slots=4, max_len=256, max_new_tokens=8, stop_tokens=tuple(range(60)))
    ask = lambda seed: answers.own_prompts(tmp_path / f"{seed}.jsonl", sampler, params, tokenizer, 12, seed,  # noqa: E731
                                           Console(file=io.StringIO()))
    with pytest.raises(sm.UserError, match="whose tokenizer has a chat template"):
        ask(0)
    tokenizer.chat_template = "{% for message in messages %}user: {{ message.content }} end{% endfor %}"
    found = ask(0)
    assert 0 < len(found) <= 12 and len(set(found)) == len(found) and all(text.strip() for (text,) in found)
    assert ask(0) == found and ask(1) != found


def test_what_a_target_does_not_allow_is_one_line(prompt_file, tmp_path):
    for option, message in (("--version=3", "reads three layers of a target of at least 4; this one has 2"),
                            ("--length=100000", "exceeds the model's limit of")):
        found = command(BASES[2], tmp_path / "head", prompt_file, "--version=2", option)
        assert found.returncode == 2 and message in found.stderr and "Traceback" not in found.stderr
    assert not (tmp_path / "head.work").exists()


def test_bad_prompt_files_are_one_line(tmp_path):
    def message(text):
        path = tmp_path / "prompts.jsonl"
        path.write_text(text)
        with pytest.raises(sm.UserError) as found:
            answers.read_prompts(path)
        return str(found.value)

    assert "line 2: a prompt is empty" in message('{"prompt": "x"}\n{"turns": ["x", " "]}\n')
    assert "line 1: expected" in message("{}\n")
    assert "line 1: expected a list of at least one text" in message('{"turns": []}\n')
    assert "holds no prompts" in message("\n")
    with pytest.raises(sm.UserError, match="does not exist"):
        answers.read_prompts(tmp_path / "nothing")
    with pytest.raises(sm.UserError, match="holds no prompts"):
        (tmp_path / "empty").write_text("")
        answers.read_prompts(tmp_path / "empty")
