"""A frozen description of a model."""

import dataclasses
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int32

from specmq_jax import entries
from specmq_jax.errors import UserError
from specmq_jax.json_files import read_json
from specmq_jax.network.families import FAMILIES
from specmq_jax.network.family_entries import Entries
from specmq_jax.network.hf_options import refuse_unsupported, refuse_window
from specmq_jax.network.rope_config import RopeConfig

_MOST_LAYERS = 10_000
"""Far more than any model has. Every layer's parameters are listed before a file is looked at."""
_KINDS: Mapping[str, tuple[str | None, ...]] = {
    "norm": ("rms", "layer"), "block": ("pre", "post", "both", "parallel"), "qk_norm": (None, "head", "all", "each"),
    "mlp": ("silu", "gelu", "plain-gelu"),
}
_BIASED = ("norm", "qkv", "o", "mlp")
_FIELDS = ("norm", "block", "qk_norm", "biases", "mlp", "windows", "ropes", "query_scale", "score_cap",
           "embedding_multiplier", "residual_multiplier", "logit_multiplier", "logit_cap")


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """How a layer's rows weigh the keys that they see.

    Attributes:
      scale: of the scores; None for 1 / sqrt(head_dim).
      window: a row sees so many newest keys, itself included; None for all.
      cap: scores s become cap * tanh(s / cap); None leaves them.
    """

    scale: float | None = None
    window: int | None = None
    cap: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Architecture of a dense decoder, Llama's by default; sizes in elements, lengths in tokens.

    Attributes:
      family: the `model_type` by which `families` declares it.
      rms_norm_eps: epsilon of every norm.
      rope: of the layers that have one.
      norm: "rms", or "layer", which subtracts the mean.
      block: where the norms stand: before attention and MLP ("pre"), behind them ("post"), "both"; or one norm before the two
        side by side ("parallel").
      qk_norm: None; or q and k are normalised before rope: by "head" with one weight for all of them, over "all" heads at once,
        or "each" head with a weight of its own by a layer norm without bias.
      biases: which parts have one, of "norm", "qkv", "o" and "mlp".
      mlp: "silu" or "gelu" (by tanh) of a gate that multiplies, or "plain-gelu" without gate.
      windows: of each layer, as in `View`; empty where none has one.
      ropes: of each layer, None for one without; empty where all have `rope`.
      query_scale: of the scores; None for 1 / sqrt(head_dim).
      score_cap, logit_cap: x becomes cap * tanh(x / cap); None leaves scores, or logits.
      embedding_multiplier, residual_multiplier, logit_multiplier: factors of the embedding, of what attention and MLP add, and
        of the logits.

    Raises:
      ValueError: a field has another value, or not as many entries as there are layers.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    max_position: int = 2048
    tie_embeddings: bool = False
    rope: RopeConfig = RopeConfig()
    family: str = "llama"
    norm: str = "rms"
    block: str = "pre"
    qk_norm: str | None = None
    biases: tuple[str, ...] = ()
    mlp: str = "silu"
    windows: tuple[int | None, ...] = ()
    ropes: tuple[RopeConfig | None, ...] = ()
    query_scale: float | None = None
    score_cap: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    logit_cap: float | None = None

    def __post_init__(self) -> None:
        for name, known in _KINDS.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {known}")
        if not set(self.biases) <= set(_BIASED):
            raise ValueError(f"biases are {self.biases}; expected some of {_BIASED}")
        for name in ("windows", "ropes"):
            if len(getattr(self, name)) not in (0, self.num_layers):
                raise ValueError(f"{name} has {len(getattr(self, name))} entries; expected one for each of "
                                 f"{self.num_layers} layers, or none")

    @property
    def qkv_features(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def rope_tables(self) -> tuple[RopeConfig | None, ...]:
        """The ropes that layers have, `rope` first, each once."""
        return tuple(dict.fromkeys((self.rope, *self.ropes)))

    def rope_table(self, layer: int) -> int:
        """Which of `rope_tables` is a layer's."""
        return self.rope_tables.index(self.ropes[layer]) if self.ropes else 0

    def view(self, layer: int) -> View:
        return View(scale=self.query_scale, window=self.windows[layer] if self.windows else None, cap=self.score_cap)

    @property
    def beyond_llama(self) -> tuple[str, ...]:
        """Names of the fields in which the model differs from Llama."""
        plain = {field.name: field.default for field in dataclasses.fields(self)}
        return (*(name for name in _FIELDS if getattr(self, name) != plain[name]), *(("rope",) if self._other_rope else ()))

    @property
    def _other_rope(self) -> bool:
        return self.rope.partial != 1 or self.rope.type == "longrope" or FAMILIES[self.family].interleaved

    def as_llama(self, **changes: Any) -> "LlamaConfig":
        """A Llama of the same sizes and rope, with other values of some fields: what a head's layers are."""
        plain: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(self)
                                 if field.name in (*_FIELDS, "family")}
        return dataclasses.replace(self, **plain | changes)

    def require(self, what: str, fields: Collection[str] = ()) -> None:
        """Raises a `UserError` where the model differs from Llama in other fields than these; `what` can't be done then."""
        if others := [name for name in self.beyond_llama if name not in fields]:
            raise UserError(f"{what} is not supported for models of type {self.family} with these fields of their own: "
                            f"{', '.join(others)}")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Reads a Hugging Face `config.json`; an entry that it lacks has transformers' default.

        Raises:
          UserError: a family that is not declared, an entry that is missing, of the wrong kind or senseless, sizes that do not
            fit each other, or an option that changes the function and that the family does not have.
        """
        name = _family(config)
        family = FAMILIES[name]
        refuse_unsupported(config, family.honoured.split())
        family.check_activation(config)
        _check_token_ids(config)
        config = {**family.defaults, **config}
        sizes = {key: entries.integer("config.json", key, config.get(key))
                 for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
        layers = entries.integer("config.json", "num_hidden_layers", config.get("num_hidden_layers"), high=_MOST_LAYERS)
        heads = sizes["num_attention_heads"]
        head_dim = _head_dim(config, sizes["hidden_size"], heads)
        max_position = entries.integer("config.json", "max_position_embeddings", config["max_position_embeddings"])
        if "sliding_window" not in family.honoured.split():
            refuse_window(config, max_position)
        found = Entries(config=config, layers=layers, hidden_size=sizes["hidden_size"], max_position=max_position,
                        is_partial="partial_rotary_factor" in family.defaults)
        fields = family.fields(found)
        made = cls(**{
            "vocab_size": sizes["vocab_size"], "hidden_size": sizes["hidden_size"],
            "intermediate_size": sizes["intermediate_size"], "num_layers": layers, "num_heads": heads,
            "num_kv_heads": _kv_heads(config, heads), "head_dim": head_dim, "max_position": max_position, "family": name,
            "rms_norm_eps": entries.number("config.json", family.epsilon, config.get(family.epsilon, 1e-6)),
            "tie_embeddings": entries.flag("config.json", "tie_word_embeddings", config.get("tie_word_embeddings", False)),
            "rope": fields["rope"] if "rope" in fields else found.rope(), **fields})
        made.rope.check_head(head_dim)
        return made

    @classmethod
    def from_directory(cls, directory: str | pathlib.Path) -> "LlamaConfig":
        """Reads `directory/config.json`; a missing or malformed file is a `UserError`."""
        return cls.from_hf(read_json(pathlib.Path(directory) / "config.json"))


def head_order(config: LlamaConfig) -> Int32[np.ndarray, "d"] | None:
    """Which dim of a head of Hugging Face's stands at each place of a head here, None where they stand as they are.

    Here dims j and j + d/2 turn together, those that pass with frequency 0; there r dims turn, j with j + r/2, or where the
    family's rope is interleaved 2j with 2j + 1, and the dims behind them pass.
    """
    dims, turning = config.head_dim, config.rope.turning(config.head_dim)
    interleaved = FAMILIES[config.family].interleaved
    if turning == dims and not interleaved:
        return None
    pairs = np.arange(turning).reshape(-1, 2).T if interleaved else np.arange(turning).reshape(2, -1)
    return np.concatenate([pairs, np.arange(turning, dims).reshape(2, -1)], axis=1).reshape(-1).astype(np.int32)


def _family(config: Mapping[str, Any]) -> str:
    """The `model_type` of a declared family."""
    names, kind = config.get("architectures"), config.get("model_type")
    if not isinstance(names, list | None) or not all(isinstance(name, str) for name in names or ()):
        raise UserError(f"config.json needs a list of names 'architectures'; found {entries.shown(names)}")
    if not isinstance(kind, str | None):
        raise UserError(f"config.json needs a name 'model_type'; found {entries.shown(kind)}")
    kinds = {family.architecture: name for name, family in FAMILIES.items()}
    if not names:
        if kind is None or kind not in FAMILIES:
            raise UserError(f"model_type {entries.shown(kind)} is not supported; known model types: "
                            f"{', '.join(FAMILIES)}")
        return kind
    if names[0] not in kinds:
        raise UserError(f"architecture {entries.shown(names[0])} is not supported; known model types: "
                        f"{', '.join(FAMILIES)}")
    if kind not in (None, kinds[names[0]]):
        raise UserError(f"config.json has model_type {entries.shown(kind)} beside architecture {names[0]!r}; expected "
                        f"{kinds[names[0]]!r}")
    return kinds[names[0]]


def _kv_heads(config: Mapping[str, Any], heads: int) -> int:
    found = config.get("num_key_value_heads")
    kv_heads = heads if found is None else entries.integer("config.json", "num_key_value_heads", found)
    if heads % kv_heads:
        raise UserError(f"config.json: {heads} attention heads are not a multiple of {kv_heads} kv heads "
                        "(num_key_value_heads)")
    return kv_heads


def _head_dim(config: Mapping[str, Any], hidden: int, heads: int) -> int:
    found = config.get("head_dim")
    if found is None and hidden % heads:
        raise UserError(f"config.json: hidden_size {hidden} is not a multiple of {heads} attention heads "
                        "(num_attention_heads), and no head_dim is given")
    head_dim = hidden // heads if found is None else entries.integer("config.json", "head_dim", found)
    if head_dim % 2:
        raise UserError(f"config.json: head_dim {head_dim} is odd; rotary embeddings need an even one")
    return head_dim


def _check_token_ids(config: Mapping[str, Any]) -> None:
    """Of whichever sign: old files have a pad_token_id of -1."""
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        found = config.get(key)
        if key == "eos_token_id" and isinstance(found, list):
            entries.integers("config.json", key, found, low=-entries.LARGEST)
        elif found is not None:
            entries.integer("config.json", key, found, low=-entries.LARGEST)
