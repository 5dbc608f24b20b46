"""What may be wrong with an official EAGLE head's tensors; every check raises a `UserError` in one line."""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int64

from specmq_jax.errors import UserError
from specmq_jax.loading.head_file import Headers, Tensors
from specmq_jax.loading.head_tensors import EMBED, LM_HEAD, ROTATION, head_tensors
from specmq_jax.loading.model import Model
from specmq_jax.network.eagle import ROTATED_TARGET, EagleConfig

_SAMPLED_ROWS = 128
_GENERATED = re.compile(r"rotary_emb\.inv_freq$")
_FURTHER_LAYER = re.compile(r"layers\.([1-9]\d*)\.")
Shapes = dict[str, tuple[int, ...]]


def draft_ids(tensors: Tensors) -> Int64[np.ndarray, "V"]:
    """The target's id of each token that the head scores; the file holds offsets."""
    offsets = tensors["d2t"].astype(np.int64)
    return np.arange(len(offsets)) + offsets


def check_vocabulary(directory: pathlib.Path, settings: Mapping[str, Any], headers: Headers, target: Model) -> None:
    """Every size of the vocabulary that the head tells is the target's, or its own vocabulary has an id for each token."""
    vocab_size = target.config.vocab_size
    found = [settings.get("vocab_size", vocab_size)]
    found += [headers[EMBED].shape[0]] if EMBED in headers else []
    found += list(headers["t2d"].shape) or [0] if "t2d" in headers else []
    for size in found:
        if size != vocab_size:
            raise UserError(f"{directory} holds a head for a vocabulary of {size} tokens; this target has {vocab_size}")
    scored = headers[LM_HEAD].shape[0] if LM_HEAD in headers else vocab_size
    if "d2t" not in headers:
        if scored != vocab_size:
            raise UserError(f"{directory}: the head scores {scored} of the target's {vocab_size} tokens, and tensor d2t, "
                            "which says which, is missing")
    elif headers["d2t"].shape != (scored,):
        raise UserError(f"{directory}: tensor d2t has shape {list(headers['d2t'].shape)}; lm_head.weight, which scores "
                        f"{scored} tokens, asks for [{scored}]")
    draft = settings.get("draft_vocab_size")
    if draft is not None and (isinstance(draft, bool) or draft != scored):
        raise UserError(f"{directory}: config.json has draft_vocab_size = {draft!r}; the head's tensors score {scored} tokens")


def check_tied(directory: pathlib.Path, settings: Mapping[str, Any], headers: Headers, config: EagleConfig) -> None:
    """An EAGLE-3 head that says its scores come from its embedding has an lm_head all the same, or they are the target's."""
    if config.version != 3 or not settings.get("tie_word_embeddings") or LM_HEAD in headers:
        return
    if EMBED in headers or not config.tied_head:
        raise UserError(f"{directory}: config.json has tie_word_embeddings = true, and an EAGLE-3 head takes its lm_head from "
                        "tensor lm_head.weight or from its target; save the embedding as lm_head.weight, too")


def check_tensors(directory: pathlib.Path, settings: Mapping[str, Any], headers: Headers, config: EagleConfig) -> None:
    """Every tensor that will be read is there, in the shape that the head's sizes ask for, and there is no other."""
    layers = 1 + len({match[1] for name in headers if (match := _FURTHER_LAYER.match(name))})
    if layers != config.layer.num_layers:
        raise UserError(f"{directory}: config.json has num_hidden_layers = {config.layer.num_layers}; the head's tensors are "
                        f"those of {layers}")
    expected = _expected(settings, headers, config)
    for name, shape in expected.items():
        if name not in headers:
            raise UserError(f"{directory}: tensor {name} is missing from the EAGLE head")
        if headers[name].shape != shape:
            raise UserError(f"{directory}: tensor {name} has shape {list(headers[name].shape)}; the head's other sizes ask "
                            f"for {list(shape)}")
    biases = _biases(expected)
    for name in sorted(headers.keys() - expected.keys() - {"d2t", "t2d"}):
        if name in biases and headers[name].shape == biases[name]:
            continue  # it may be zero
        if not _GENERATED.search(name):
            raise UserError(f"{directory} holds the tensor {name}, which an EAGLE-{config.version} head of "
                            f"{config.layer.num_layers} {'layer' if config.layer.num_layers == 1 else 'layers'} does not use")


def check_biases(directory: pathlib.Path, tensors: Tensors, config: EagleConfig) -> None:
    """Biases that the official network has no place for are zero; that of an EAGLE-2 head's `fc` counts as config.json says."""
    for name, value in tensors.items():
        if name.endswith(".bias") and not (name == "fc.bias" and config.version == 2) and value.any():
            raise UserError(f"{directory}: tensor {name} is not zero; linear layers of EAGLE heads with a bias are not "
                            "supported, but for fc of an EAGLE-2 head")


def check_finite(directory: pathlib.Path, tensors: Tensors) -> None:
    """No value is infinite or NaN."""
    for name, value in tensors.items():
        if not np.isfinite(value).all():
            raise UserError(f"{directory}: tensor {name} holds values that are not finite")


def check_draft_ids(directory: pathlib.Path, tensors: Tensors, vocab_size: int) -> None:
    """The ids that the head's own vocabulary stands for, if it has one, are the target's, each once, and t2d marks them."""
    ids = draft_ids(tensors) if "d2t" in tensors else np.arange(vocab_size)
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.size:
        raise UserError(f"{directory}: tensor d2t stands for token {outside[0]}, outside the vocabulary of {vocab_size}")
    if len(np.unique(ids)) < len(ids):
        raise UserError(f"{directory}: tensor d2t stands for a token twice")
    if "t2d" not in tensors:
        return
    marked, wanted = tensors["t2d"], np.zeros(vocab_size, bool)
    wanted[ids] = True
    wrong = np.flatnonzero(marked != wanted)
    if wrong.size:
        has = "has" if wanted[wrong[0]] else "lacks"
        raise UserError(f"{directory}: tensor t2d is {marked[wrong[0]]} for token {wrong[0]}, which the draft vocabulary {has} "
                        f"{'by tensor d2t' if 'd2t' in tensors else '(there is no tensor d2t)'}")


def check_basis(directory: pathlib.Path, tensors: Tensors, config: EagleConfig, target: Model) -> None:
    """Finds a head for a rotated target on one that isn't, and the other way round, where their tables tell.

    A rotated target has its norms' weights folded into its matrices, so that they are one, and its embedding is the original
    one times an orthogonal matrix: rows with other directions, and the same angles between them. A head without an
    embedding of its own tells nothing.
    """
    sign = f"tensor {ROTATION}" if config.rotated else f"{ROTATED_TARGET} in config.json"
    plain = f"{directory} holds a head for a rotated target ({sign}), and this target is not rotated"
    params = target.params["params"]
    if config.rotated_target and not bool(jnp.all(params["norm"]["scale"] == 1)):
        raise UserError(plain)
    table = params["embed"]["table"]
    own = tensors.get(EMBED)
    if own is None or own.shape != table.shape:
        return
    rows = np.linspace(0, len(own) - 1, min(_SAMPLED_ROWS, len(own)), dtype=np.int64)
    ours, theirs = own[rows].astype(np.float64), np.asarray(table[rows], np.float64)
    used = ours.any(axis=1) & theirs.any(axis=1)
    ours, theirs = (side[used] / np.linalg.norm(side[used], axis=1, keepdims=True) for side in (ours, theirs))
    alike = float(np.mean(np.sum(ours * theirs, axis=1))) if used.any() else 0.0
    if config.rotated_target and alike > 0.99:
        raise UserError(plain)
    angles, moved = theirs @ theirs.T, np.abs(ours @ ours.T - theirs @ theirs.T)
    between = ~np.eye(len(angles), dtype=bool)
    turned = alike < 0.5 and between.any() and moved[between].mean() < 0.1 * np.abs(angles[between]).mean()
    if turned and not config.rotated_target:
        raise UserError(f"{directory} holds a head whose embedding is this target's in another basis: one of the two is "
                        "rotated and the other is not; adapt the head with python -m checkpoints_tools.convert_eagle_rotation")


def _expected(settings: Mapping[str, Any], headers: Headers, config: EagleConfig) -> Shapes:
    """Of the tensors that the head is made of; those that its target may lend stand in it where the file has them."""
    # the target's own tables are in the rotated basis, the head's states are not
    lent = () if config.rotated_target else (EMBED, LM_HEAD)
    table = head_tensors(config, settings.get("hidden_size"))
    return {tensor.name: tensor.shape for tensors in table.values() for tensor in tensors
            if tensor.name in headers or tensor.name not in lent}


def _biases(expected: Shapes) -> Shapes:
    """Of the biases that the head's linear layers could have."""
    linear = re.compile(r"(_proj|^fc|^lm_head)\.weight$")
    return {f"{name.removesuffix('weight')}bias": shape[:1] for name, shape in expected.items() if linear.search(name)}
