"""A head adapted to a rotated target drafts there what the original drafts on the original target."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sources import DATA, write_hf

import specmq_jax as sm
from checkpoints_tools import demo_model
from checkpoints_tools.conversion import convert
from checkpoints_tools.convert_eagle_rotation import convert_head
from checkpoints_tools.readers.files.rotation_file import save_rotation
from checkpoints_tools.rotate import rotate
from specmq_jax.loading.head import outline_head
from specmq_jax.loading.model import outline

BASES = {2: DATA / "checkpoints" / "fp16", 3: DATA / "eagle" / "eagle3_base"}
HEADS = {version: DATA / "eagle" / f"eagle{version}_head" for version in (2, 3)}
TREE = sm.TreeConfig(depth=3, top_k=6, size=20)
PROMPT = [5, 9, 77, 300, 12]


def weighted_norms(source, destination, *, tied=False):
    """A copy in f32 whose norms have random weights, which the files' own have not."""
    destination.mkdir()
    config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": tied}
    tensors = {name: value.astype(np.float32) for name, value in load_file(source / "model.safetensors").items()}
    rng = np.random.default_rng(0)
    tensors |= {name: rng.uniform(0.5, 2, value.shape).astype(np.float32) for name, value in sorted(tensors.items())
                if value.ndim == 1}
    if tied:
        del tensors["lm_head.weight"]
    save_file(tensors, destination / "model.safetensors")
    (destination / "config.json").write_text(json.dumps(config))
    return destination


def made_for(version, directory, *, tied=False):
    """The head's version, its directory, the base, and the base's native checkpoint and rotated one."""
    base = weighted_norms(BASES[version], directory / "base", tied=tied)
    return version, HEADS[version], base, convert(base, directory / "plain"), rotate(base, directory / "rotated", seed=2)


@pytest.fixture(scope="module", params=[
    "eagle2, tied", *(pytest.param(name, marks=pytest.mark.slow) for name in ("eagle2", "eagle3"))])
def family(request, tmp_path_factory):
    return made_for(int(request.param[5]), tmp_path_factory.mktemp("family"), tied="tied" in request.param)


def trees(target, head, count):
    """The draft trees of that many rounds, and the tokens that came of them."""
    decoder = sm.Decoder(target, sm.EagleDrafter(head, TREE), sm.DecodeConfig(max_len=256))
    propose, state, found = jax.jit(decoder.drafter.propose), decoder.prefill(PROMPT, 64), []
    for number in range(count):
        state = decoder.round(state) if number else state
        tree, _ = propose(decoder.drafter.params, state.drafter, state.tokens[state.length - 1])
        found.append((tree.tokens.tolist(), tree.parent.tolist()))
    return found, state.tokens[:int(state.length)].tolist()


def test_trees_on_the_rotated_target_are_those_on_the_original(family, tmp_path):
    version, head, base, plain, rotated = family
    adapted = convert_head(head, base, rotated, tmp_path / "adapted")
    target, turned = sm.load(plain), sm.load(rotated)
    original = sm.load_head(head, target)
    expected = trees(target, original, 5)
    found = sm.load_head(adapted, turned)
    assert found.config.version == version and found.config.rotated_target
    assert trees(turned, found, 5) == expected
    # an official head need not have an embedding, and without one nothing shows that it stands in another basis
    bare = sm.load_head(head_without_tables(head, tmp_path / "bare"), turned)
    assert trees(turned, bare, 1)[0][0] != expected[0][0]
    assert jax.tree.structure(outline_head(adapted, outline(rotated)).params) == jax.tree.structure(found.params)


def head_without_tables(head, destination):
    destination.mkdir()
    (destination / "config.json").write_bytes((head / "config.json").read_bytes())
    tensors = load_file(head / "model.safetensors")
    tensors.pop("embed_tokens.weight", None)
    save_file(tensors, destination / "model.safetensors")
    return destination


def test_the_head_may_be_pickled_and_the_base_native(family, tmp_path):
    _, head, base, plain, rotated = family
    expected = load_file(convert_head(head, base, rotated, tmp_path / "adapted") / "model.safetensors")
    found = load_file(convert_head(head, plain, rotated / "rotation.safetensors", tmp_path / "again") / "model.safetensors")
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
        assert found[name].dtype == expected[name].dtype


@pytest.mark.torch
def test_a_released_head_for_a_rotated_target_loads(tmp_path):
    """SpecMQuant's own converter writes the same tensors into pytorch_model.bin, in half precision."""
    import torch

    _, head, base, _, rotated = made_for(2, tmp_path)
    adapted = convert_head(head, base, rotated, tmp_path / "adapted")
    tensors = load_file(adapted / "model.safetensors")
    assert {"rms_norm_rotation.weight", "lm_head.weight", "embed_tokens.weight"} < tensors.keys()
    (tmp_path / "released").mkdir()
    (tmp_path / "released" / "config.json").write_bytes((head / "config.json").read_bytes())
    torch.save({name: torch.from_numpy(value).half() for name, value in tensors.items()},
               tmp_path / "released" / "pytorch_model.bin")
    turned = sm.load(rotated)
    found, expected = (sm.load_head(directory, turned) for directory in (tmp_path / "released", adapted))
    assert found.config == expected.config
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)


def refuses(message, **arguments):
    with pytest.raises(sm.UserError) as error:
        convert_head(**arguments)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not arguments["output"].exists()


def test_what_does_not_belong_together_is_refused(family, tmp_path):
    _, head, base, plain, rotated = family
    given = {"eagle": head, "base": base, "rotation": rotated, "output": tmp_path / "made"}
    adapted = convert_head(head, base, rotated, tmp_path / "adapted")
    refuses("holds a head for a rotated target already", **given | {"eagle": adapted})
    refuses("is rotated (rotation.safetensors); --base takes the model", **given | {"base": rotated})
    refuses("holds no rotation", **given | {"rotation": plain})
    save_rotation(tmp_path, np.eye(64, dtype=np.float32))
    refuses("rotates 64 dimensions; this model's hidden states have 256", **given | {"rotation": tmp_path})
    refuses("holds no EAGLE head", **given | {"eagle": base})
    write_hf(tmp_path / "small")
    refuses("EAGLE", **given | {"base": tmp_path / "small"})
    with pytest.raises(sm.UserError, match="for a rotated target"):
        sm.load_head(adapted, sm.load(plain))
    with pytest.raises(sm.UserError, match="exists and is not empty"):
        convert_head(head, base, rotated, adapted)


@pytest.fixture(scope="module")
def rotated_demo(demo_directory, tmp_path_factory):
    return rotate(demo_directory, tmp_path_factory.mktemp("demo") / "rotated", precision="fp32")


@pytest.mark.slow
@pytest.mark.parametrize("version", [2, 3])
def test_the_demo_models_heads_follow_it_into_the_rotated_basis(demo_directory, rotated_demo, tmp_path, version):
    adapted = convert_head(demo_model.head(version), demo_directory, rotated_demo, tmp_path / "adapted")
    target, turned = sm.load(demo_directory), sm.load(rotated_demo)
    tokens, lengths = zip(*(
        (result.tokens.tolist(), result.accept_lengths.tolist()) for result in (
            sm.Decoder(model, sm.EagleDrafter(sm.load_head(head, model), sm.TreeConfig(depth=3, top_k=8, size=24)),
                       sm.DecodeConfig(max_len=256)).generate([504, 3575, 282, 4649, 314], 32)
            for model, head in ((target, demo_model.head(version)), (turned, adapted)))), strict=True)
    assert tokens[0] == tokens[1]
    assert lengths[0] == lengths[1]
