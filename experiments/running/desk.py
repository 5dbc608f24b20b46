"""Questions to a model, turn by turn: one question behind the other, or several side by side."""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import specmq_jax as sm
from experiments.answers.answer_format import Turn
from experiments.benchmarks import stop_strings
from experiments.benchmarks.benchmark import Bench, Benchmark
from experiments.inputs.questions import Question
from specmq_jax import tokenizer as tokens
from specmq_jax.words import count


@dataclasses.dataclass(eq=False)
class Dialogue:
    """A question, its turns so far, and why the others are missing, if any are."""

    question: Question
    turns: list[Turn] = dataclasses.field(default_factory=list)
    cut: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Desk:
    """A bench as one benchmark uses it."""

    bench: Bench
    benchmark: Benchmark

    def encode(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return self.benchmark.encode(self.bench, messages)

    def first_prompt(self, question: Question) -> list[int]:
        return self.encode(question.messages([]))

    def converse(self, decoder: sm.Decoder, question: Question, max_new_tokens: int) -> Dialogue:
        """The turns of one dialogue."""
        dialogue = Dialogue(question)
        while prompt := self._next_prompt(dialogue):
            if self.benchmark.stop_strings:
                generation = stop_strings.generate(decoder, prompt, max_new_tokens, self.benchmark.stop_strings, self._spelled)
            else:
                generation = decoder.generate(prompt, max_new_tokens=max_new_tokens)
            self._note(dialogue, prompt, generation)
        return dialogue

    def converse_side_by_side(self, engine: sm.Engine, questions: Sequence[Question], max_new_tokens: int
                              ) -> Iterator[Dialogue]:
        """The dialogues of all questions, each as soon as it has its turns; twice as many are begun as the engine has slots, so
        that none is idle."""
        until = self._completion if self.benchmark.stop_strings else None
        waiting, begun = collections.deque(map(Dialogue, questions)), dict[sm.Ticket, tuple[Dialogue, list[int]]]()
        while waiting or begun:
            while waiting and len(begun) < 2 * engine.slots:
                dialogue = waiting.popleft()
                if prompt := self._next_prompt(dialogue):
                    begun[engine.submit(prompt, max_new_tokens, until=until)] = dialogue, prompt
                else:
                    yield dialogue
            engine.step()
            for ticket in [ticket for ticket in begun if ticket.is_done]:
                dialogue, prompt = begun.pop(ticket)
                self._note(dialogue, prompt, ticket.result())
                waiting.appendleft(dialogue)

    def _next_prompt(self, dialogue: Dialogue) -> list[int] | None:
        """That of its next turn; None where there is none, or, but for the first, the cache is too short for it."""
        question, turns = dialogue.question, dialogue.turns
        if len(turns) == len(question.turns):
            return None
        prompt = self.encode(question.messages([turn.text for turn in turns]))
        if turns and len(prompt) >= self.bench.max_length:
            dialogue.cut = (f"turn {len(turns) + 1} has a prompt of {count(len(prompt), 'token')}, the cache holds "
                            f"{self.bench.max_length}")
            return None
        return prompt

    def _note(self, dialogue: Dialogue, prompt: Sequence[int], generation: sm.Generation) -> None:
        text = self.benchmark.text(self.bench, generation)
        dialogue.turns.append(Turn(prompt_tokens=len(prompt), generation=generation, text=text))

    def _completion(self, token_ids: Sequence[int]) -> int | None:
        return stop_strings.completion(token_ids, self.benchmark.stop_strings, self._spelled)

    def _spelled(self, token_ids: Sequence[int]) -> str:
        return tokens.decode(self.bench.tokenizer, token_ids)
