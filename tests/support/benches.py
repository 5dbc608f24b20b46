"""A model made of arithmetic: characters are tokens, and answers follow from the prompt alone."""

import dataclasses

import numpy as np
from fakes import tiny_config

import specmq_jax as sm
from experiments.running import methods
from experiments.running.settings import Settings
from specmq_jax.loading.memory import Plan

QUESTIONS = """{"question_id": 1, "category": "writing", "turns": ["Name a colour.", "Another one."]}
{"question_id": 2, "category": "math", "turns": ["What is 6 times 7?"]}
{"question_id": "c", "category": "math", "turns": ["What is 1 + 1?", "And 2 + 2?"]}
"""


@dataclasses.dataclass
class FakeDecoder:
    """Accepts `accept` tokens a round and needs a tenth of a second for each round; with `slip`, the fourth token of every
    second answer is the target's second best, a quarter of a logit behind."""

    accept: int
    kill_at: int | None = None
    slip: bool = False
    prompts: list = dataclasses.field(default_factory=list)
    scored: list = dataclasses.field(default_factory=list)
    prefill_chunks: tuple = (32, 128)

    def generate(self, prompt_ids, max_new_tokens):
        if max_new_tokens > 2:  # not a warm-up
            self.prompts.append(list(prompt_ids))
            if len(self.prompts) == self.kill_at:
                raise KeyboardInterrupt
        tokens = np.array([97 + (sum(prompt_ids) + i) % 26 for i in range(max_new_tokens)], np.int32)
        if self.slip and len(self.prompts) % 2 and max_new_tokens > 2:
            tokens[3] = 97 + (tokens[3] - 96) % 26
        rounds = -(-(max_new_tokens - 1) // self.accept)
        return sm.Generation(
            tokens=tokens, accept_lengths=np.full(rounds, self.accept, np.int32), seconds=0.1 * rounds,
            prefill_seconds=0.5, draft_prefill_seconds=0.25, stopped=False, draft_accept_lengths=np.zeros(0, np.int32))

    def next_logits(self, token_ids):
        self.scored.append(list(token_ids))
        answer = len(token_ids) - 1 - list(token_ids)[::-1].index(ord("\n"))
        best = (sum(token_ids[:answer + 1]) + len(token_ids) - answer - 1) % 26
        logits = np.zeros(128, np.float32)
        logits[97 + best], logits[97 + (best + 1) % 26] = 2.0, 1.75
        return logits

    def phase_times(self, prompt_ids):
        return sm.PhaseTimes(prefill=0.5, draft=0.01 * (self.accept > 1), verify=0.1, round=0.1)

    def bytes_per_round(self, live_length):
        return 10**9 + live_length


@dataclasses.dataclass
class FakeBench:
    max_length: int = 256
    precision: str = "fp16"
    kill_at: int | None = None
    slip: bool = False
    decoders: dict = dataclasses.field(default_factory=dict)

    def encode(self, messages):
        return list("".join(f"{m['role'][0]}: {m['content']}\n" for m in messages).encode())

    def text(self, token_ids):
        return bytes(token_ids.tolist()).decode()

    def decoder(self, method):
        plain = method == "baseline"
        self.decoders[method] = FakeDecoder(accept=1 if plain else 4, kill_at=self.kill_at, slip=self.slip and not plain)
        return self.decoders[method]


@dataclasses.dataclass
class TinyBench(FakeBench):
    """A model with random weights, of which every byte is a token, and which drafts for itself."""

    def __post_init__(self):
        self.tokenizer = None
        self.target = sm.random_model(tiny_config(vocab_size=128, num_layers=1), "fp32", seed=0)
        self.config = sm.DecodeConfig(max_len=self.max_length, prefill_chunks=(256,))

    def decoder(self, method):
        drafter = sm.NoDrafter() if method == "baseline" else sm.ChainDrafter(self.target, 3)
        return sm.Decoder(self.target, drafter, self.config)


def fake_plan(settings, needed):
    return Plan({"target": 2 * 10**9, **{method: 8 * 10**7 for method in needed}})


def make_settings(directory, **changes):
    """Settings of a run over QUESTIONS with everything under `directory`."""
    file = directory / "questions.jsonl"
    if not file.exists():
        file.write_text(QUESTIONS)
    fields = dict(models=methods.Models(), methods=("baseline", "spec"), question_file=file, max_new_tokens=9,
                  max_length=256, output_dir=directory / "out")
    return Settings(**(fields | changes))
