"""A tokenizer with a token for each byte, so that most characters beyond ASCII take several."""

import types

import tokenizers

from experiments.serving.answer_text import AnswerText


def _tokenizer():
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<end>"])
    return made


TOKENIZER = _tokenizer()
END = TOKENIZER.token_to_id("<end>")


def ids(text):
    return TOKENIZER.encode(text).ids


def answer_text(stop_strings=()):
    return AnswerText(types.SimpleNamespace(backend_tokenizer=TOKENIZER), (END,), stop_strings)
