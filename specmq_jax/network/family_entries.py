"""What the declarations of families read of a config.json."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from specmq_jax import entries
from specmq_jax.errors import UserError
from specmq_jax.network.rope_config import RopeConfig

LAYER_TYPES = ("full_attention", "sliding_attention")
WHERE = "config.json"
Fields = dict[str, Any]
"""Of `LlamaConfig`, by name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entries:
    """What a family's declaration reads.

    Attributes:
      config: all entries of config.json, and the family's defaults where it lacks them.
      layers: their number.
      hidden_size: in elements.
      max_position: the model's positions.
      is_partial: only a share of a head's dims turn, as `partial_rotary_factor` says.
    """

    config: Mapping[str, Any]
    layers: int
    hidden_size: int
    max_position: int
    is_partial: bool = False

    def flag(self, key: str) -> bool:
        return entries.flag(WHERE, key, self.config.get(key, False))

    def number(self, key: str) -> float:
        return entries.number(WHERE, key, self.config.get(key, 1.0))

    def optional(self, key: str) -> float | None:
        """A positive number, or null for none."""
        found = self.config.get(key)
        return None if found is None else entries.number(WHERE, key, found)

    def biases(self, **parts: str) -> Fields:
        """The parts that have a bias: each flag brings those named behind it."""
        return {"biases": tuple(part for key, names in parts.items() if self.flag(key) for part in names.split())}

    def rope(self, *, longrope: bool = False, **changes: Any) -> RopeConfig:
        """The rope of the entry `rope_parameters` or `rope_scaling`, with some entries in place of the file's."""
        return RopeConfig.from_hf({**self.config, **changes}, self.max_position, longrope=longrope,
                                  partial=self.config["partial_rotary_factor"] if self.is_partial else None)

    def sliding(self, otherwise: Callable[[int], bool] | None) -> tuple[bool, ...]:
        """Of each layer whether its window slides: as `layer_types` says, or else by the layer's number.

        Raises:
          UserError: `layer_types` has another length, or other words; or there is neither.
        """
        found = self.config.get("layer_types")
        if found is None and otherwise is not None:
            return tuple(otherwise(layer) for layer in range(self.layers))
        if not isinstance(found, list) or len(found) != self.layers or any(kind not in LAYER_TYPES for kind in found):
            raise UserError(f"config.json sets layer_types = {entries.shown(found)}; expected {self.layers} times "
                            f"{' or '.join(map(repr, LAYER_TYPES))}")
        return tuple(kind == "sliding_attention" for kind in found)

    def windows(self, sliding: Sequence[bool]) -> Fields:
        """The windows of layers; one that hides none of the model's positions is none."""
        if not any(sliding):
            return {}
        window = entries.integer(WHERE, "sliding_window", self.config.get("sliding_window"))
        return {"windows": tuple(window if slides else None for slides in sliding)} if window < self.max_position else {}

    def one_window(self) -> Fields:
        """The window of all layers, none where it is null."""
        return self.windows([self.config.get("sliding_window") is not None] * self.layers)
