"""Which tensors of an official EAGLE head make which of its parameters: one table to check, read, write and convert by."""

import dataclasses

from specmq_jax.network.eagle import EagleConfig

FC, EMBED, LM_HEAD, ROTATION = "fc.weight", "embed_tokens.weight", "lm_head.weight", "rms_norm_rotation.weight"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An official tensor's name and its shape: [out, in] of a matrix."""

    name: str
    shape: tuple[int, ...]


def head_tensors(config: EagleConfig, hidden_size: int | None = None) -> dict[str, tuple[Tensor, ...]]:
    """Tensors by the path of the parameter in `EagleHead` that they make, joined by their outputs.

    Matrices, whose paths end in "/w", are [in, out] there. The embedding and lm_head are in the table of every head, though
    its target may lend them.

    Args:
      config: of the head.
      hidden_size: the width of its layers, by default the configuration's.
    """
    hidden = config.layer.hidden_size if hidden_size is None else hidden_size
    third = config.version == 3
    first = "midlayer." if third else "layers.0."
    table = {"fc/w": (Tensor(FC, (hidden, config.feature_size + (0 if third else config.embed_size))),),
             **_layer("", first, config, hidden, config.embed_size + hidden if third else hidden)}
    if third:
        table |= {"embed_norm/scale": (Tensor("midlayer.input_layernorm.weight", (config.embed_size,)),),
                  "state_norm/scale": (Tensor("midlayer.hidden_norm.weight", (hidden,)),),
                  "norm/scale": (Tensor("norm.weight", (hidden,)),)}
    if config.bias:
        table["fc_bias"] = (Tensor("fc.bias", (hidden,)),)
    for i in range(1, config.layer.num_layers):
        ours, theirs = f"layers_{i - 1}/", f"layers.{i}."
        table |= {**_layer(ours, theirs, config, hidden, hidden),
                  f"{ours}attention_norm/scale": (Tensor(f"{theirs}input_layernorm.weight", (hidden,)),)}
    if config.rotated:
        table["rotation/w"] = (Tensor(ROTATION, (config.feature_size, config.feature_size)),)
    return table | {"embed/table": (Tensor(EMBED, (config.vocab_size, config.embed_size)),),
                    "lm_head/w": (Tensor(LM_HEAD, (config.layer.vocab_size, hidden)),)}


def _layer(ours: str, theirs: str, config: EagleConfig, hidden: int, width: int) -> dict[str, tuple[Tensor, ...]]:
    """Of a layer whose attention reads inputs of that width."""
    layer = config.layer
    heads, kv_heads, mlp = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim, layer.intermediate_size

    def linear(name: str, rows: int, columns: int) -> Tensor:
        return Tensor(f"{theirs}{name}_proj.weight", (rows, columns))

    return {f"{ours}attention/qkv/w": (linear("self_attn.q", heads, width), linear("self_attn.k", kv_heads, width),
                                       linear("self_attn.v", kv_heads, width)),
            f"{ours}attention/o/w": (linear("self_attn.o", hidden, heads),),
            f"{ours}mlp/gate_up/w": (linear("mlp.gate", mlp, hidden), linear("mlp.up", mlp, hidden)),
            f"{ours}mlp/down/w": (linear("mlp.down", hidden, mlp),),
            f"{ours}mlp_norm/scale": (Tensor(f"{theirs}post_attention_layernorm.weight", (hidden,)),)}
