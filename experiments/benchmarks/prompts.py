"""Prompts and answers that are not plain chat."""

from collections.abc import Mapping, Sequence
from typing import Any

import specmq_jax as sm
from experiments.benchmarks.benchmark import Bench
from specmq_jax import tokenizer as tokens
from specmq_jax.errors import UserError

_MARK = "<begin-the-answer-here>"
"""A text that no template and no question holds."""


def encode_begun(tokenizer: Any, messages: Sequence[Mapping[str, str]], begun: str) -> list[int]:
    """Ids of a conversation whose last turn, the assistant's, begins with the text `begun` and is to be gone on with.

    The template marks the beginning of a text where it should be marked, and the tokenizer adds no second mark. Templates trim
    what they are given, so that the turn is rendered with more behind `begun` and cut there, as evalplus does.

    Raises:
      UserError: the template refuses the messages or does not render the assistant's turn.
    """
    answer = {"role": "assistant", "content": f"{begun}{_MARK}"}
    try:
        text = tokenizer.apply_chat_template([*messages, answer], tokenize=False)
    except Exception as error:  # templates raise what they like
        raise UserError(f"the chat template refuses the conversation: {error}") from None
    before, mark, _ = text.partition(_MARK)
    if not mark:
        raise UserError("the chat template leaves out the beginning of the assistant's turn; this benchmark needs one that "
                        "renders it")
    return tokenizer.encode(before, add_special_tokens=False)


def whole_text(bench: Bench, generation: sm.Generation) -> str:
    """What was generated, white space at both ends included, without the stop token that may end it."""
    ids = generation.tokens[:-1] if generation.stopped and len(generation.tokens) else generation.tokens
    return tokens.decode(bench.tokenizer, ids)
