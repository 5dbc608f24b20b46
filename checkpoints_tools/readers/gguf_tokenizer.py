"""Rebuilds a Hugging Face tokenizer from GGUF metadata.

Pre-tokenizers follow llama.cpp's `llm_tokenizer_bpe` and the models' own tokenizer.json; SentencePiece models become BPE
with byte fallback, as in transformers' `convert_slow_tokenizer.py`.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from specmq_jax.checkpoint import write_json
from specmq_jax.errors import UserError

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
"""Token types of gguf.TokenType. SentencePiece's unknown token is special as well."""
_LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
           r"|\s+(?!\S)|\s+")

Value = Callable[..., Any]
"""value(key, default=None): a metadata entry's contents."""


def describe(value: Value) -> str | None:
    """The kind of tokenizer that the file holds, in words; None without one."""
    model = value("tokenizer.ggml.model")
    return model and f"{model}, pre-tokenizer {value('tokenizer.ggml.pre', 'default')}"


def save(value: Value, directory: pathlib.Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and generation_config.json; none if the file holds no tokenizer.

    Raises:
      UserError: a tokenizer model or pre-tokenizer that is not known.
    """
    tokens = value("tokenizer.ggml.tokens")
    if tokens is None:
        return
    build = {"gpt2": _byte_level, "llama": _sentence_piece}.get(value("tokenizer.ggml.model"))
    if build is None:
        raise UserError(f"the GGUF's tokenizer model {value('tokenizer.ggml.model')!r} is not supported; known: gpt2, llama")
    types = value("tokenizer.ggml.token_type") or [1] * len(tokens)
    tokenizer, adds_bos = build(value, tokens, types)
    special = {f"{name}_token": tokens[value(f"tokenizer.ggml.{key}_token_id")]
               for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
               if value(f"tokenizer.ggml.{key}_token_id") is not None}
    tokenizer.add_tokens([AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
                          for token, kind in zip(tokens, types, strict=True)
                          if kind in (_CONTROL, _USER_DEFINED, _UNKNOWN)])
    if value("tokenizer.ggml.add_bos_token", adds_bos) and "bos_token" in special:
        bos = special["bos_token"]
        after = processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B",
                                              special_tokens=[(bos, value("tokenizer.ggml.bos_token_id"))])
        tokenizer.post_processor = after if adds_bos else processors.Sequence([_trim_nothing(), after])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    if template := value("tokenizer.chat_template"):
        config["chat_template"] = template
    write_json(directory / "tokenizer_config.json", config)
    ends = [value(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    if ends:
        write_json(directory / "generation_config.json", {"eos_token_id": ends})


def _trim_nothing() -> processors.ByteLevel:
    return processors.ByteLevel(trim_offsets=False)


def _byte_level(value: Value, tokens: Sequence[str], types: Sequence[int]) -> tuple[Tokenizer, bool]:
    pre = value("tokenizer.ggml.pre", "default")
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
        raise UserError(f"the GGUF's pre-tokenizer {pre!r} is not supported; known: {', '.join(known)}")
    merges = [tuple(merge.split(" ", 1)) for merge in value("tokenizer.ggml.merges", [])]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    llama3 = pre in ("llama-bpe", "llama3")
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=llama3))
    tokenizer.pre_tokenizer = known[pre]
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, llama3


def _sentence_piece(value: Value, tokens: Sequence[str], types: Sequence[int]) -> tuple[Tokenizer, bool]:
    scores = value("tokenizer.ggml.scores")
    if scores is None:
        raise UserError("the GGUF's tokenizer of model 'llama' has no scores")
    normal = {token: score for token, score, kind in zip(tokens, scores, types, strict=True) if kind in (1, _USER_DEFINED)}
    vocabulary = {token: i for i, token in enumerate(tokens)}
    unknown = value("tokenizer.ggml.unknown_token_id")
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=_merges(normal, vocabulary), fuse_unk=True,
                                     byte_fallback=True, unk_token=None if unknown is None else tokens[unknown]))
    prefix = value("tokenizer.ggml.add_space_prefix", True)
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
