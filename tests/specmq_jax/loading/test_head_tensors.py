"""The table of an EAGLE head's tensors is that of its parameters."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from fakes import tiny_config
from flax.traverse_util import flatten_dict

from specmq_jax import formats
from specmq_jax.loading.head_tensors import head_tensors
from specmq_jax.network.cache import KVCache
from specmq_jax.network.eagle import EagleConfig, EagleHead


@pytest.mark.parametrize(("version", "changes"), [
    (2, {}), (2, {"bias": True}), (2, {"rotated": True, "rotated_target": True}), (2, {"layers": 3}), (3, {}),
    (3, {"layers": 2, "embed_size": 32})])
def test_every_parameter_is_made_of_tensors_of_its_size(version, changes):
    layer = dataclasses.replace(tiny_config(num_layers=changes.pop("layers", 1)), vocab_size=40)
    config = EagleConfig(**{"version": version, "layer": layer, "feature_size": 64 if version == 2 else 192, "vocab_size": 61,
                            "embed_size": 64, **changes})
    module = EagleHead(config, *[formats.get("fp32")] * 3)
    cache = KVCache.create(layer, 128, jnp.dtype(jnp.float32))
    made = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros(1, jnp.int32), jnp.zeros((1, config.feature_size)),
                                              cache, method="everything")["params"])
    sizes = {path: sum(leaf.size for leaf in jax.tree.leaves(weight)) for path, weight in flatten_dict(made, sep="/").items()}
    table = head_tensors(config)
    assert {path: sum(math.prod(tensor.shape) for tensor in tensors) for path, tensors in table.items()} == sizes
    names = [tensor.name for tensors in table.values() for tensor in tensors]
    assert len(set(names)) == len(names)
