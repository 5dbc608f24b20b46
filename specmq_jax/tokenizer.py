"""Text to token ids and back, with the model's own tokenizer and chat template."""

import contextlib
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from specmq_jax.errors import UserError
from specmq_jax.json_files import read_json
from specmq_jax.text_stream import TextStream
from specmq_jax.tokenizer_files import chat_template, special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as Tokenizer

__all__ = ["TextStream", "decode", "encode_chat", "load_tokenizer", "stop_tokens"]

_END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end_of_text|>")
_FILE = "tokenizer.json"
_OTHER_FILES = ("tokenizer.model", "vocab.json", "tiktoken.model", "tekken.json")
_REASON_LENGTH = 160


def load_tokenizer(directory: str | pathlib.Path) -> "Tokenizer":
    """The tokenizer of a native checkpoint or Hugging Face directory.

    Its ids are those of tokenizer.json, whatever class or added tokens the other files name, and it cuts or pads no text.
    Special tokens that tokenizer.json lacks are left out. No code of the directory is run.

    Raises:
      UserError: there is no tokenizer.json, or its files are broken.
    """
    directory = pathlib.Path(directory)
    if not (directory / _FILE).is_file():
        raise UserError(_without_file(directory))
    # transformers announces at import that PyTorch is absent, which is as it should be here
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with _refused(f"the tokenizer of {directory} can't be loaded"):
            tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(directory / _FILE),
                                                             clean_up_tokenization_spaces=False)
    finally:
        transformers.logging.set_verbosity(verbosity)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    for name, text in special_tokens(directory).items():
        if tokenizer.backend_tokenizer.token_to_id(text) is not None:
            setattr(tokenizer, name, text)
    tokenizer.chat_template = chat_template(directory)
    return tokenizer


def encode_chat(tokenizer: "Tokenizer", messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Ids of a conversation, ready for the assistant's answer; threads may call it at once.

    Args:
      tokenizer: with a chat template; without one the messages' contents are joined by blank lines.
      messages: {"role": "system" | "user" | "assistant", "content": text}.

    Raises:
      UserError: the template refuses the messages, or they hold what is no text.
    """
    if not tokenizer.chat_template:
        return _encode(tokenizer, "\n\n".join(message["content"] for message in messages), add_special_tokens=True)
    with _refused("the chat template refuses the conversation"):
        text = tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False,
                                             add_generation_prompt=True)
    return _encode(tokenizer, cast(str, text), add_special_tokens=False)


def stop_tokens(tokenizer: "Tokenizer", directory: str | pathlib.Path) -> tuple[int, ...]:
    """Ids that end an answer: the tokenizer's, those of generation_config.json and config.json, ends of a turn.

    Raises:
      UserError: an entry eos_token_id of these files is no id of the vocabulary and no list of them.
    """
    directory, vocabulary = pathlib.Path(directory), tokenizer.get_vocab()
    found = {vocabulary[token] for token in (tokenizer.eos_token, *_END_OF_TURN) if token in vocabulary}
    for name in ("generation_config.json", "config.json"):
        found |= set(_ends(directory / name, _vocabulary_size(directory, vocabulary)))
    return tuple(sorted(found))


def decode(tokenizer: "Tokenizer", token_ids: Sequence[int]) -> str:
    """The text of an answer, without special tokens."""
    return tokenizer.backend_tokenizer.decode([int(token) for token in token_ids], skip_special_tokens=True)


def _without_file(directory: pathlib.Path) -> str:
    other = next((name for name in _OTHER_FILES if (directory / name).is_file()), None)
    if other is None:
        return f"{directory} has no tokenizer: expected {_FILE}"
    return (f"{directory} has {other} and no {_FILE}, which alone says what the ids are; copy the {_FILE} of the model's "
            "publisher there, or write one with save_pretrained of the model's own tokenizer class in transformers")


@contextlib.contextmanager
def _refused(what: str) -> Iterator[None]:
    """Whatever is raised within, a Rust panic as well, becomes a `UserError` of one line: templates raise what they like."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic is no Exception
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{what}: {reason[:_REASON_LENGTH]}") from None


def _encode(tokenizer: "Tokenizer", text: str, *, add_special_tokens: bool) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the text holds {text[error.start]!r}, half of a surrogate pair, which is no character; leave it "
                        "out or give the whole character") from None
    with _refused("the tokenizer can't encode the text"):
        # not the tokenizer's own `encode`, which sets what threads share; a batch lets other threads run, one text doesn't
        (found,) = tokenizer.backend_tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return found.ids


def _vocabulary_size(directory: pathlib.Path, vocabulary: Mapping[str, int]) -> int:
    """Ids that there may be: a model's vocabulary is often larger than its tokenizer's."""
    path = directory / "config.json"
    size = read_json(path).get("vocab_size") if path.is_file() else None
    return max([size if isinstance(size, int) else 0, *(token + 1 for token in vocabulary.values())])


def _ends(path: pathlib.Path, vocabulary_size: int) -> Iterator[int]:
    value: Any = read_json(path).get("eos_token_id") if path.is_file() else None
    for token in value if isinstance(value, list) else [] if value is None else [value]:
        if type(token) is not int or not 0 <= token < vocabulary_size:
            raise UserError(f"{path}: eos_token_id must be a token's id or a list of ids, each from 0 to "
                            f"{vocabulary_size - 1}; found {value!r:.80}")
        yield token
