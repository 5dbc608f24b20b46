"""Text to token ids and back, with the model's own tokenizer and chat template."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from specmq_jax.config import read_json
from specmq_jax.errors import UserError
from specmq_jax.text_stream import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

__all__ = ["TextStream", "decode", "encode_chat", "load_tokenizer", "stop_tokens"]

_END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end_of_text|>")
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(directory: str | pathlib.Path) -> "Tokenizer":
    """The tokenizer of a native checkpoint or Hugging Face directory.

    Raises:
      UserError: there is none, or its files are broken.
    """
    directory = pathlib.Path(directory)
    if not any((directory / name).is_file() for name in _FILES):
        raise UserError(f"{directory} has no tokenizer: expected one of {', '.join(_FILES)}")
    # transformers announces at import that PyTorch is absent, which is as it should be here
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        return transformers.AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception over a malformed tokenizer.json
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the tokenizer of {directory} can't be loaded: {reason[:160]}") from None
    finally:
        transformers.logging.set_verbosity(verbosity)


def encode_chat(tokenizer: "Tokenizer", messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Ids of a conversation, ready for the assistant's answer.

    Args:
      tokenizer: with a chat template; without one the messages' contents are joined by blank lines.
      messages: {"role": "system" | "user" | "assistant", "content": text}.

    Raises:
      UserError: the template refuses the messages.
    """
    if not tokenizer.chat_template:
        return tokenizer.encode("\n\n".join(message["content"] for message in messages))
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise what they like
        raise UserError(f"the chat template refuses the conversation: {error}") from None
    return tokenizer.encode(text, add_special_tokens=False)


def stop_tokens(tokenizer: "Tokenizer", directory: str | pathlib.Path) -> tuple[int, ...]:
    """Ids that end an answer: the tokenizer's, those of generation_config.json and config.json, ends of a turn."""
    found: set[Any] = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        path = pathlib.Path(directory) / name
        ends = read_json(path).get("eos_token_id") if path.is_file() else None
        found |= set(ends) if isinstance(ends, list) else {ends}
    vocabulary = tokenizer.get_vocab()
    found |= {vocabulary[token] for token in _END_OF_TURN if token in vocabulary}
    return tuple(sorted(token for token in found if isinstance(token, int)))


def decode(tokenizer: "Tokenizer", token_ids: Sequence[int]) -> str:
    """The text of an answer, without special tokens."""
    return tokenizer.backend_tokenizer.decode([int(token) for token in token_ids], skip_special_tokens=True)
