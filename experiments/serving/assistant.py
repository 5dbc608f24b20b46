"""What a chat and a server share: flags, and the models that answer, one method at a time."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

from absl import flags as absl_flags
from rich.console import Console

import specmq_jax as sm
from experiments.cost import auto
from experiments.running import flags, methods, runner
from experiments.running.settings import Settings
from experiments.serving.answer_text import AnswerText
from specmq_jax.errors import UserError
from specmq_jax.loading.model import check_tokens

absl_flags.disclaim_key_flags()  # what `declare_flags` declares belongs to the command that calls it
USED = ("model", "method", "drafter", "precision", "draft_precision", "draft_length", "eagle", "tree_depth", "tree_top_k",
        "tree_size", "vocabulary", "vocabulary_size", "min_draft_length", "draft_model_start", "max_length", "temperature",
        "top_k", "top_p", "seed", "reproducible")
"""The shared flags that these commands know."""
UNUSED = "it belongs to benchmarks, and this command answers what it is asked"
"""Why these commands refuse the others."""

Stream = Callable[[Sequence[int], int | None], Iterator[list[int]]]
"""Of a prompt's ids and the most new ones: ids a round."""


def declare_flags() -> None:
    """Shows the shared flags that are of use in the command's --help."""
    for name in USED:
        absl_flags.declare_key_flag(name)


def settings(command: str) -> Settings:
    """Reads the shared flags; the one method is --method's, or suits the models given.

    Raises:
      UserError: as `flags.settings`.
    """
    return auto.resolved(flags.settings(command, default=(flags.one_method(),), offered=flags.fitting_methods()))


@dataclasses.dataclass(frozen=True, eq=False)
class Assistant:
    """A loaded target and its decoders, each made when first asked for.

    Attributes:
      settings: what was asked for.
      bench: the target and its tokenizer.
    """

    settings: Settings
    bench: methods.Workbench

    @classmethod
    def load(cls, settings: Settings, console: Console) -> "Assistant":
        """Prints the device memory that the method takes, then loads the target and what drafts for it.

        Raises:
          UserError: too little device memory, or models that can't be loaded or don't fit together.
        """
        (method,) = settings.methods
        memory = runner.plan(settings, [method])
        console.print(memory.describe(), highlight=False, markup=False, soft_wrap=True)
        memory.check()
        return cls(settings, runner.load(settings))

    @functools.cached_property
    def _decoders(self) -> dict[str, sm.Decoder]:
        return {}

    @functools.cached_property
    def _compiled(self) -> set[str]:
        return set()

    @property
    def name(self) -> str:
        """The target's."""
        return self.settings.models.target_name

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods; auto is one of them where the command began with it."""
        return (*methods.NAMES, methods.AUTO) if self.settings.models.auto else methods.NAMES

    @property
    def max_length(self) -> int:
        """Tokens of prompt and answer that the cache holds."""
        return self.bench.max_length

    def decoder(self, method: str) -> sm.Decoder:
        """The method's decoder.

        Raises:
          UserError: the method is not known, lacks a head, or what it drafts with doesn't fit.
        """
        if method not in self.methods:
            raise UserError(f"method {method!r} is not known here; choose of {', '.join(self.methods)}")
        if method not in self._decoders:
            self.settings.models.check([method])
            self._decoders[method] = self.bench.decoder(method)
        return self._decoders[method]

    def ready(self, method: str) -> sm.Decoder:
        """The method's decoder, compiled; errors as in `decoder`."""
        decoder = self.decoder(method)
        if method not in self._compiled:
            self.compile(decoder, lambda prompt, most: decoder.stream(prompt, most, rounds=1))
            self._compiled.add(method)
        return decoder

    def encode(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a dialogue, up to where the assistant answers.

        Raises:
          UserError: the template refuses it, it holds what is no text, a token that the model doesn't know, or none at all.
        """
        tokens = self.bench.encode(messages)
        if not tokens:
            raise UserError("the messages have no token; say something")
        check_tokens(tokens, self.bench.target.config)
        return tokens

    def compile(self, decoder: sm.Decoder, stream: Stream) -> None:
        """Compiles what answers will need: the passes over prompts of every length, and the round."""
        prompt = self.bench.encode([{"role": "user", "content": "?"}])
        for length in decoder.prefill_chunks:
            for _ in stream((prompt * length)[:min(length, self.max_length - 3)], 3):
                pass

    def answer_text(self, stop_strings: Sequence[str] = ()) -> AnswerText:
        """Collects one answer's text."""
        return AnswerText(self.bench.tokenizer, self.bench.config.stop_tokens, stop_strings)
