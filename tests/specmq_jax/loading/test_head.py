"""What `load_head` refuses, each in one line that names the fault, and that a pickled head is read as plain tensors alone."""

import json
import os
import pickle

import numpy as np
import pytest
from fakes import DATA
from safetensors.numpy import load_file, save_file

import specmq_jax as sm
from checkpoints_tools import conversion
from specmq_jax.loading.head import head_version

FP16 = DATA / "checkpoints" / "fp16"
HEADS = {version: DATA / "eagle" / f"eagle{version}_head" for version in (2, 3)}


@pytest.fixture(scope="module")
def bases():
    return {2: sm.load(FP16), 3: sm.load(DATA / "eagle" / "eagle3_base")}


def write(directory, version, tensors=None, **settings):
    """The head of that version with these tensors and settings instead of its own; None takes one away."""
    config = json.loads((HEADS[version] / "config.json").read_text()) | settings
    (directory / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    found = load_file(HEADS[version] / "model.safetensors") | (tensors or {})
    save_file({name: np.ascontiguousarray(value) for name, value in found.items() if value is not None},
              directory / "model.safetensors")
    return directory


def refuses(directory, base, *parts):
    with pytest.raises(sm.UserError) as error:
        sm.load_head(directory, base)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def tensor(version, name):
    return load_file(HEADS[version] / "model.safetensors")[name]


@pytest.mark.parametrize(("version", "name", "cut", "expected"), [
    (2, "layers.0.self_attn.q_proj.weight", np.s_[:100], "has shape [100, 256]; the head's other sizes ask for [256, 256]"),
    (2, "fc.weight", np.s_[:200], "has shape [200, 512]; the head's other sizes ask for [256, 512]"),
    (2, "fc.bias", np.s_[:7], "has shape [7]; the head's other sizes ask for [256]"),
    (2, "layers.0.mlp.down_proj.weight", np.s_[:, :9], "has shape [256, 9]; the head's other sizes ask for [256, 512]"),
    (2, "fc.weight", np.s_[0], "has shape [512]; expected a matrix"),
    (3, "midlayer.self_attn.v_proj.weight", np.s_[:, :256], "has shape [128, 256]; the head's other sizes ask for [128, 512]"),
    (3, "midlayer.hidden_norm.weight", np.s_[:1], "has shape [1]; the head's other sizes ask for [256]"),
    (3, "lm_head.weight", np.s_[:, :30], "has shape [128, 30]; the head's other sizes ask for [128, 256]"),
])
def test_a_tensor_of_another_shape_is_named_with_both_shapes(bases, tmp_path, version, name, cut, expected):
    refuses(write(tmp_path, version, {name: tensor(version, name)[cut]}), bases[version], f"tensor {name} {expected}")


@pytest.mark.parametrize(("version", "name"), [
    (2, "fc.weight"), (2, "layers.0.post_attention_layernorm.weight"), (3, "norm.weight"),
    (3, "midlayer.self_attn.o_proj.weight")])
def test_a_missing_tensor_is_named(bases, tmp_path, version, name):
    refuses(write(tmp_path, version, {name: None}), bases[version], str(tmp_path), f"tensor {name} is missing")


def test_a_head_for_other_states_or_another_vocabulary_is_refused(bases, tmp_path):
    refuses(HEADS[3], bases[2], "this target has 2, at least 4 are needed")
    fc = tensor(3, "fc.weight")
    refuses(write(tmp_path, 3, {"fc.weight": fc[:, :512]}), bases[3], "reads states of width 512", "gives 768 over 512")
    other = "holds a head for a vocabulary of 500 tokens; this target has 512"
    refuses(write(tmp_path, 2, vocab_size=500), bases[2], other)
    refuses(write(tmp_path, 3, {"t2d": np.zeros(500, bool)}), bases[3], other)
    table = tensor(2, "embed_tokens.weight")
    refuses(write(tmp_path, 2, {"embed_tokens.weight": table[:500]}), bases[2], other)


def test_a_cut_vocabulary_needs_a_right_map_to_the_targets(bases, tmp_path):
    offsets = tensor(3, "d2t")
    refuses(write(tmp_path, 3, {"d2t": None}), bases[3], "scores 128 of the target's 512 tokens, and tensor d2t", "missing")
    refuses(write(tmp_path, 3, {"d2t": offsets[:-1]}), bases[3], "tensor d2t has shape [127]", "asks for [128]")
    for offset, token in ((512 - 5, 512), (-6, -1)):
        wrong = offsets.copy()
        wrong[5] = offset
        refuses(write(tmp_path, 3, {"d2t": wrong}), bases[3], f"d2t stands for token {token}, outside the vocabulary of 512")
    refuses(write(tmp_path, 3, {"d2t": -np.arange(128)}), bases[3], "tensor d2t stands for a token twice")


def test_a_config_that_is_missing_or_malformed_is_told(bases, tmp_path):
    write(tmp_path, 2)
    config = tmp_path / "config.json"
    for content, fault in (("{", "is not valid JSON"), ("[1]", "must hold a JSON object"),
                           ('{"hidden_size": 256}', "config.json needs a positive integer")):
        config.write_text(content)
        refuses(tmp_path, bases[2], "config.json", fault)
    config.unlink()
    refuses(tmp_path, bases[2], f"{config} does not exist")


@pytest.mark.parametrize("kept", [0, 5, 300, 100_000])
def test_a_truncated_file_is_damaged(bases, tmp_path, kept):
    path = write(tmp_path, 2) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refuses(tmp_path, bases[2], f"{path} is damaged")
    with pytest.raises(sm.UserError, match="is damaged"):
        head_version(tmp_path)


def test_a_tree_that_cannot_be_grown_is_refused(bases):
    with pytest.raises(sm.UserError, match="a tree needs depth and top_k of at least 1"):
        sm.TreeConfig(depth=0, top_k=4, size=5)
    with pytest.raises(sm.UserError, match="depth 2 and top_k 3 has 12 candidates; size 14 needs 13"):
        sm.TreeConfig(depth=2, top_k=3, size=14)
    head = sm.load_head(HEADS[3], bases[3])
    with pytest.raises(sm.UserError, match="top_k 129 exceeds the head's vocabulary of 128"):
        sm.EagleDrafter(head, sm.TreeConfig(depth=1, top_k=129, size=20))


@pytest.fixture(scope="module")
def rotated(tmp_path_factory):
    """FP16's tensors with some weight in the final norm, and the same function in a rotated basis; and the rotation."""
    directory = tmp_path_factory.mktemp("rotated")
    plain = {name: value.astype(np.float32) for name, value in load_file(FP16 / "model.safetensors").items()}
    rng = np.random.default_rng(0)
    gamma = plain["model.norm.weight"] = rng.uniform(0.5, 2, 256).astype(np.float32)
    rotation = np.linalg.qr(rng.normal(size=(256, 256)))[0].astype(np.float32)
    folded = dict(plain)
    for name, value in plain.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            folded[name] = value * plain[name.split("self_attn")[0] + "input_layernorm.weight"] @ rotation
        elif name.endswith(("gate_proj.weight", "up_proj.weight")):
            folded[name] = value * plain[name.split("mlp")[0] + "post_attention_layernorm.weight"] @ rotation
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            folded[name] = rotation.T @ value
        elif name == "model.embed_tokens.weight":
            folded[name] = value @ rotation
        elif name == "lm_head.weight":
            folded[name] = value * gamma @ rotation
        elif name.endswith("norm.weight"):
            folded[name] = np.ones_like(value)
    models = []
    for kind, tensors in (("plain", plain), ("rotated", folded)):
        (directory / kind).mkdir()
        for file in FP16.iterdir():
            if file.suffix == ".json":
                (directory / kind / file.name).write_bytes(file.read_bytes())
        save_file({name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()},
                  directory / kind / "model.safetensors")
        models.append(sm.load(conversion.convert(directory / kind, directory / f"native-{kind}")))
    back = {"rms_norm_rotation.weight": gamma[:, None] * rotation, "lm_head.weight": plain["lm_head.weight"],
            "embed_tokens.weight": plain["model.embed_tokens.weight"]}
    return *models, back


def test_a_head_and_its_target_stand_in_the_same_basis(rotated, tmp_path):
    plain, turned, back = rotated
    prompt = [5, 9, 77, 300]
    tokens = sm.Decoder(plain, config=sm.DecodeConfig(max_len=128)).generate(prompt, 24).tokens.tolist()
    assert sm.Decoder(turned, config=sm.DecodeConfig(max_len=128)).generate(prompt, 24).tokens.tolist() == tokens
    lengths = []
    for name, target, tensors in (("plain", plain, {}), ("rotated", turned, back)):
        (tmp_path / name).mkdir()
        head = sm.load_head(write(tmp_path / name, 2, tensors), target)
        decoder = sm.Decoder(target, sm.EagleDrafter(head, sm.TreeConfig(depth=3, top_k=4, size=16)),
                             sm.DecodeConfig(max_len=128))
        found = decoder.generate(prompt, 24)
        assert found.tokens.tolist() == tokens
        lengths.append(found.accept_lengths.tolist())
    assert lengths[0] == lengths[1], "the rotated head undoes the rotation"
    refuses(tmp_path / "plain", turned, "whose embedding is this target's in another basis")
    refuses(tmp_path / "rotated", plain, "for a rotated target (tensor rms_norm_rotation.weight), and this target is not")


def test_a_folded_target_that_is_not_rotated_is_told_by_its_embedding(bases, rotated, tmp_path):
    """Its norms are all one, as those of a rotated model."""
    refuses(write(tmp_path, 2, rotated[2]), bases[2], "for a rotated target")
    refuses(write(tmp_path, 2, rotated[2] | {"embed_tokens.weight": None}), rotated[1],
            "tensor embed_tokens.weight is missing")


def test_another_embedding_that_is_no_rotation_is_the_heads_own_business(bases, tmp_path):
    table = np.random.default_rng(0).normal(size=(512, 256)).astype(np.float16)
    assert sm.load_head(write(tmp_path, 2, {"embed_tokens.weight": table}), bases[2]).config.version == 2


@pytest.mark.torch
@pytest.mark.parametrize("version", [2, 3])
def test_a_pickled_head_equals_its_safetensors_file(bases, tmp_path, version):
    import jax
    import torch

    tensors = load_file(HEADS[version] / "model.safetensors")
    torch.save({name: torch.from_numpy(value) for name, value in tensors.items()}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((HEADS[version] / "config.json").read_bytes())
    found, expected = sm.load_head(tmp_path, bases[version]), sm.load_head(HEADS[version], bases[version])
    assert head_version(tmp_path) == version and found.config == expected.config
    assert jax.tree.structure(found.params) == jax.tree.structure(expected.params)
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


class _Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.torch
@pytest.mark.parametrize("form", ["zip", "pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_runs_none(bases, tmp_path, form):
    import torch

    made, file = tmp_path / "made", tmp_path / "pytorch_model.bin"
    content = {"fc.weight": _Harmful(made)}
    if form == "zip":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content, protocol=2))
    refuses(tmp_path, bases[2], str(file), "can't be loaded as plain tensors")
    assert not made.exists()


@pytest.mark.torch
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", pickle.dumps({"fc.weight": 3}, protocol=2),
                                     pickle.dumps([1, 2], protocol=2)], ids=["empty", "cut", "numbers", "list"])
def test_a_pickle_of_something_else_is_refused(bases, tmp_path, content):
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    refuses(tmp_path, bases[2], "pytorch_model.bin", "can't be loaded as plain tensors")
