"""Rebuilds a Hugging Face tokenizer from GGUF metadata.

Pre-tokenizers follow llama.cpp's `llm_tokenizer_bpe` and the models' own tokenizer.json; SentencePiece models become BPE
with byte fallback, as in transformers' `convert_slow_tokenizer.py`.
"""

import dataclasses
import pathlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from checkpoints_tools.readers.gguf.gguf_file import Metadata
from specmq_jax.entries import shown
from specmq_jax.errors import UserError
from specmq_jax.files import put_json

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
"""Token types of gguf.TokenType. SentencePiece's unknown token is special as well."""
_IDS = ("bos", "eos", "eot", "eom", "unknown", "padding")
_LONGEST_PIECE = 4096
"""In characters. Every way to cut a piece in two is tried; real pieces have at most some dozens."""
_LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
           r"|\s+(?!\S)|\s+")

Value = Callable[..., Any]
"""value(key, default=None): a metadata entry's contents."""


@dataclasses.dataclass(frozen=True)
class _Vocabulary:
    """What the file holds of a tokenizer, checked.

    Attributes:
      metadata: the entries that only one kind of tokenizer has.
      tokens: by id, all different.
      types: of gguf.TokenType, one a token.
      ids: of `_IDS`, as far as the file has them.
    """

    metadata: Metadata
    tokens: list[str]
    types: list[int]
    ids: dict[str, int]


def describe(value: Value, where: str = "the GGUF", vocab_size: int | None = None) -> str | None:
    """The kind of tokenizer that the file holds, in words; None without one.

    Args:
      value: the file's metadata.
      where: what messages call the file.
      vocab_size: rows of the model's embedding; the tokens may not be more.

    Raises:
      UserError: entries that are missing, of the wrong kind or of lengths that do not fit, or an id that no token has.
    """
    found = _read(Metadata(value, where))
    if found is None:
        return None
    if vocab_size is not None and len(found.tokens) > vocab_size:
        raise UserError(f"{where} has {len(found.tokens)} tokens and a vocabulary of {vocab_size}")
    model = found.metadata.text("tokenizer.ggml.model")
    return model and f"{model}, pre-tokenizer {found.metadata.text('tokenizer.ggml.pre', 'default')}"


def save(value: Value, directory: pathlib.Path, where: str = "the GGUF") -> None:
    """Writes tokenizer.json, tokenizer_config.json and generation_config.json; none if the file holds no tokenizer.

    Raises:
      UserError: a tokenizer model or pre-tokenizer that is not known, or what `describe` refuses.
    """
    found = _read(Metadata(value, where))
    if found is None:
        return
    metadata, tokens, types = found.metadata, found.tokens, found.types
    model = metadata.text("tokenizer.ggml.model")
    build = {"gpt2": _byte_level, "llama": _sentence_piece}.get(model)
    if build is None:
        raise UserError(f"{where}'s tokenizer model {shown(model)} is not supported; known: gpt2, llama")
    tokenizer, adds_bos = build(found)
    special = {f"{name}_token": tokens[found.ids[key]]
               for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
               if key in found.ids}
    tokenizer.add_tokens([AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
                          for token, kind in zip(tokens, types, strict=True)
                          if kind in (_CONTROL, _USER_DEFINED, _UNKNOWN)])
    if metadata.flag("tokenizer.ggml.add_bos_token", adds_bos) and "bos_token" in special:
        after = _begin_with(special["bos_token"], found.ids["bos"])
        plain = processors.ByteLevel(trim_offsets=False)
        tokenizer.post_processor = after if adds_bos else processors.Sequence([plain, after])
    template = metadata.text("tokenizer.chat_template")
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    put_json(directory / "tokenizer_config.json", config | ({"chat_template": template} if template else {}))
    ends = list(dict.fromkeys(found.ids[name] for name in ("eos", "eot", "eom") if name in found.ids))
    if ends:
        put_json(directory / "generation_config.json", {"eos_token_id": ends})


def _read(metadata: Metadata) -> _Vocabulary | None:
    where, model = metadata.where, metadata.text("tokenizer.ggml.model")
    tokens = metadata.items("tokenizer.ggml.tokens", str, "texts")
    if tokens is None and model in (None, "none", "no_vocab"):
        return None
    if not tokens:
        raise UserError(f"{where} has a tokenizer of model {shown(model)} without tokens (tokenizer.ggml.tokens)")
    if len(set(tokens)) < len(tokens):
        token, count = Counter(tokens).most_common(1)[0]
        raise UserError(f"{where} has the token {shown(token)} {count} times; expected different ones")
    types = metadata.items("tokenizer.ggml.token_type", int, "integers", len(tokens))
    ids = {name: metadata.integer(f"tokenizer.ggml.{name}_token_id", low=0) for name in _IDS}
    for name, found in ids.items():
        if found is not None and found >= len(tokens):
            raise UserError(f"{where} has tokenizer.ggml.{name}_token_id {found} and {len(tokens)} tokens")
    scores = metadata.items("tokenizer.ggml.scores", (int, float), "numbers", len(tokens))
    if scores is not None and not np.isfinite(scores).all():
        raise UserError(f"{where} has scores of tokens (tokenizer.ggml.scores) that are not finite")
    return _Vocabulary(metadata, tokens, types or [_NORMAL] * len(tokens),
                       {name: found for name, found in ids.items() if found is not None})


def _begin_with(token: str, token_id: int) -> processors.TemplateProcessing:
    """The token stands under another name in the template, which its own characters can't break."""
    return processors.TemplateProcessing(single="bos $A", pair="bos $A bos $B",
                                         special_tokens=[{"id": "bos", "ids": [token_id], "tokens": [token]}])


def _byte_level(found: _Vocabulary) -> tuple[Tokenizer, bool]:
    where, pre = found.metadata.where, found.metadata.text("tokenizer.ggml.pre", "default")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    known = {
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain]),
        "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_LLAMA3), behavior="isolated"), split]),
        "llama3": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_LLAMA3), behavior="isolated"), split]),
        "default": plain,
        "gpt-2": plain,
    }
    if pre not in known:
        raise UserError(f"{where}'s pre-tokenizer {shown(pre)} is not supported; known: {', '.join(known)}")
    vocabulary = {token: i for i, token in enumerate(found.tokens)}
    merges = [merge.partition(" ")[::2] for merge in found.metadata.items("tokenizer.ggml.merges", str, "texts") or []]
    for left, right in merges:
        if not {left, right, left + right} <= vocabulary.keys():
            raise UserError(f"{where} has a merge of {shown(left)} and {shown(right)}; expected tokens that make a token")
    llama3 = pre in ("llama-bpe", "llama3")
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=llama3))
    tokenizer.pre_tokenizer = known[pre]
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, llama3


def _sentence_piece(found: _Vocabulary) -> tuple[Tokenizer, bool]:
    where, tokens = found.metadata.where, found.tokens
    scores = found.metadata.items("tokenizer.ggml.scores", (int, float), "numbers")
    if scores is None:
        raise UserError(f"{where}'s tokenizer of model 'llama' has no scores (tokenizer.ggml.scores)")
    if max(map(len, tokens)) > _LONGEST_PIECE:
        raise UserError(f"{where} has a token of {max(map(len, tokens))} characters; at most {_LONGEST_PIECE} are supported")
    normal = {token: score for token, score, kind in zip(tokens, scores, found.types, strict=True)
              if kind in (_NORMAL, _USER_DEFINED)}
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=_merges(normal, vocabulary), fuse_unk=True,
                                     byte_fallback=True,
                                     unk_token=tokens[found.ids["unknown"]] if "unknown" in found.ids else None))
    prefix = found.metadata.flag("tokenizer.ggml.add_space_prefix", True)
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return tokenizer, True


def _merges(scores: dict[str, float], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, the piece of the highest score first."""
    found = []
    for piece, score in scores.items():
        ways = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in scores and piece[i:] in scores]
        ways.sort(key=lambda way: (vocabulary[way[0]], vocabulary[way[1]]))
        found.extend((score, left, right) for left, right in ways)
    found.sort(key=lambda entry: (entry[0], len(entry[1]), len(entry[2])), reverse=True)
    return [(left, right) for _, left, right in found]
