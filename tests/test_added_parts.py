"""The pages that say how to add a part, followed to the letter: their blocks become files, and what they add decodes."""

import importlib
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import tiny_config
from lowering import cuda_text, launches
from safetensors.numpy import load_file
from sources import write_hf

import specmq_jax as sm
from specmq_jax import formats
from specmq_jax.network import families

ROOT = pathlib.Path(__file__).parents[1]
FP16 = ROOT / "tests" / "data" / "checkpoints" / "fp16"
PROMPT = [5, 9, 31, 3, 40, 5, 9, 31]


def blocks(package):
    """The page's blocks by the file that each is said to be."""
    page = (ROOT / package / "README.md").read_text()
    return dict(re.findall(r"^`([\w/]+\.py)`[^\n]*:\n\n```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE))


@pytest.fixture(scope="module")
def added(tmp_path_factory):
    """Writes the blocks into folders that the packages are looked for in, too."""
    directory, patch = tmp_path_factory.mktemp("added"), pytest.MonkeyPatch()
    for path, code in (blocks("specmq_jax") | blocks("pallas_kernels")).items():
        if path.endswith("families.py"):
            continue
        file = directory / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(code)
    for place in {"pallas_kernels", "specmq_jax.formats", "specmq_jax.decoding.drafters"}:
        package = importlib.import_module(place)
        patch.setattr(package, "__path__", [*package.__path__, str(directory / place.replace(".", "/"))])
    yield importlib.import_module
    patch.undo()


@pytest.fixture
def with_format(added, monkeypatch):
    """The format stands in the registry, as the page says."""
    made = added("specmq_jax.formats.input_scaled").InputScaledFormat()
    monkeypatch.setattr(formats, "_FORMATS", (*formats._FORMATS, made))
    return made


def answers(target, drafter=None, new_tokens=60):
    found = sm.Decoder(target, drafter, sm.DecodeConfig(max_len=200)).generate(PROMPT, new_tokens)
    return found.tokens.tolist(), found.accept_lengths


def test_the_drafter_is_lossless_and_drafts(added):
    drafter = added("specmq_jax.decoding.drafters.lookup").LookupDrafter(length=3)
    target = sm.random_model(tiny_config(), "fp32", seed=1)
    plain, _ = answers(target, new_tokens=150)
    drafted, lengths = answers(target, drafter, new_tokens=150)
    assert drafted == plain
    assert lengths.max() == 4, "a small model repeats itself, and then all drafts are right"


def test_the_weight_format_decodes_losslessly_and_is_known_by_name(with_format):
    target = sm.random_model(tiny_config(), "w8a16-input", seed=1)
    plain, _ = answers(target)
    drafted, lengths = answers(target, sm.ChainDrafter(target, 3))
    assert drafted == plain and lengths.mean() > 3
    loaded, exact = sm.load(FP16, precision="w8a16-input"), sm.load(FP16)
    error = np.asarray(sm.logits(loaded, PROMPT) - sm.logits(exact, PROMPT))
    assert loaded.precision == "w8a16-input"
    assert 0 < np.linalg.norm(error) < 0.05 * np.linalg.norm(sm.logits(exact, PROMPT))


def test_the_op_is_its_reference_and_lowers_to_one_kernel(added):
    api = added("pallas_kernels.input_scaled.api")
    kernel = added("pallas_kernels.input_scaled.kernel")
    values = jax.random.randint(jax.random.key(0), (5, 100), -127, 128, jnp.int8)
    scales = jax.random.uniform(jax.random.key(1), (5,))
    reference = api.expand(values, scales, jnp.float16, implementation="reference")
    found = api.expand(values, scales, jnp.float16, implementation="interpret", config=kernel.Config(block=32))
    np.testing.assert_array_equal(found, reference)
    text = cuda_text(lambda *operands: api.expand(*operands, jnp.float16, implementation="kernel"),
                     jax.ShapeDtypeStruct((5, 100), jnp.int8), jax.ShapeDtypeStruct((5,), jnp.float32))
    assert launches(text) == 1
    with pytest.raises(ValueError, match=r"scales are float32\[4\]; expected float32\[5\]"):
        api.expand(values, scales[:4], jnp.float16)


def test_the_family_loads_and_decodes_as_llama(monkeypatch, tmp_path):
    entry = eval(blocks("specmq_jax")["specmq_jax/network/families.py"], {"Family": families.Family})
    (kind, family), = entry.items()
    given = json.loads((FP16 / "config.json").read_text())
    given |= {"architectures": [family.architecture], "model_type": kind}
    tensors = {name.replace("post_attention_layernorm", family.names["mlp_norm"]): values
               for name, values in load_file(FP16 / "model.safetensors").items()}
    write_hf(tmp_path / "model", given, tensors)
    with pytest.raises(sm.UserError, match=f"architecture '{family.architecture}' is not supported"):
        sm.load(tmp_path / "model")
    for name, value in entry.items():
        monkeypatch.setitem(families.FAMILIES, name, value)
    target, llama = sm.load(tmp_path / "model"), sm.load(FP16)
    np.testing.assert_array_equal(sm.logits(target, PROMPT), 0.5 * sm.logits(llama, PROMPT))
    plain, _ = answers(target)
    assert plain == answers(llama)[0] == answers(target, sm.ChainDrafter(target.with_precision("w4a16-g64"), 3))[0]
