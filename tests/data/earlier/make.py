"""Makes what stands beside this file; README.txt says with which commit's code, and how."""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

import specmq_jax as sm
from checkpoints_tools.convert import convert
from checkpoints_tools.training import head_files

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 61, "hidden_size": 32,
          "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
          "rms_norm_eps": 1e-5, "max_position_embeddings": 256, "tie_word_embeddings": False,
          "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
PRECISIONS, VERSIONS, RANKED = ("fp16", "w4a16-g32"), (2, 3), 40
PROMPT, TOKENS = [3, 14, 15, 9, 26, 5], 32
TREE = sm.TreeConfig(depth=3, top_k=3, size=10)


def make_source(directory: pathlib.Path, seed: int) -> np.ndarray:
    """A Hugging Face directory with random weights; returns those of lm_head."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * columns**-0.5).astype(np.float16)

    def norm() -> np.ndarray:
        return (1 + 0.1 * rng.standard_normal(32)).astype(np.float16)

    tensors = {"model.embed_tokens.weight": matrix(61, 32), "model.norm.weight": norm(), "lm_head.weight": matrix(61, 32)}
    for i in range(CONFIG["num_hidden_layers"]):
        layer = {"input_layernorm": norm(), "post_attention_layernorm": norm(), "self_attn.q_proj": matrix(32, 32),
                 "self_attn.k_proj": matrix(16, 32), "self_attn.v_proj": matrix(16, 32), "self_attn.o_proj": matrix(32, 32),
                 "mlp.gate_proj": matrix(64, 32), "mlp.up_proj": matrix(64, 32), "mlp.down_proj": matrix(32, 64)}
        tensors |= {f"model.layers.{i}.{name}.weight": values for name, values in layer.items()}
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, directory / "model.safetensors")
    return tensors["lm_head.weight"]


def make_heads(place: pathlib.Path, target: sm.Model, lm_head: np.ndarray) -> None:
    ids = np.sort(np.random.default_rng(1).permutation(61)[:RANKED]).astype(np.int32)
    start = {"norm": target.params["params"]["norm"], "lm_head": {"w": lm_head.T}}
    for version in VERSIONS:
        own = ids if version == 3 else None
        official = head_files.official_config(version, target.config, CONFIG, RANKED)
        config = head_files.new_config(official, target.config)
        params = head_files.initial_parameters(config, start, own, jax.random.key(version))
        head_files.export(place / f"eagle{version}", params, config, official, own)


def seen(place: pathlib.Path, precision: str) -> dict:
    """What the model says behind the prompt, and what the heads draft there."""
    target = sm.load(place / precision)
    config = sm.DecodeConfig(max_len=128)
    tokens = sm.Decoder(target, config=config).generate(PROMPT, TOKENS).tokens.tolist()
    logits = sm.logits(target, [*PROMPT, *tokens])
    ranked = np.sort(np.asarray(logits)[len(PROMPT) - 1:-1], axis=1)
    clear = float((ranked[:, -1] - ranked[:, -2]).min())
    found = {"tokens": tokens, "logits": np.round(np.asarray(logits[-1], np.float64), 5).tolist(), "clear": clear}
    for version in VERSIONS:
        drafter = sm.EagleDrafter(sm.load_head(place / f"eagle{version}", target), TREE)
        decoder = sm.Decoder(target, drafter, config)
        made = decoder.generate(PROMPT, TOKENS)
        assert made.tokens.tolist() == tokens
        state = decoder.prefill(PROMPT)
        tree, _ = drafter.propose(drafter.params, state.drafter, jnp.int32(tokens[0]))
        found[f"eagle{version}"] = {"draft": tree.tokens.tolist(), "parent": tree.parent.tolist(),
                                    "accept_lengths": made.accept_lengths.tolist()}
    return found


def main(source: pathlib.Path, place: pathlib.Path, seed: int) -> None:
    lm_head = make_source(source, seed)
    for precision in PRECISIONS:
        convert(source, place / precision, precision)
    make_heads(place, sm.load(place / "fp16"), lm_head)
    found = {precision: seen(place, precision) for precision in PRECISIONS}
    lines = [f'{json.dumps(name)}: {json.dumps(value)}' for name, value in found.items()]
    (place / "expected.json").write_text("{" + ",\n".join(lines) + "}\n")
    print({name: value["clear"] for name, value in found.items()})


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3]))
