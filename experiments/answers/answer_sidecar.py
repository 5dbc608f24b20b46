"""The sidecar of an answer file: the settings that made the answers, and what was measured once all were there."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from specmq_jax.errors import UserError
from specmq_jax.files import put_json
from specmq_jax.kept_settings import changes

_TEXTS = ("device", "jax", "precision")
_NUMBERS = ("max_length", "phase_prompt_tokens", "live_length", "bytes_per_round")
_FIGURES = ("device_bandwidth", "prefill", "draft", "verify", "round")
"""Null where they could not be measured."""
_NUMBERS_OF_SLOTS, _FIGURES_OF_SLOTS = ("max_length", "slots"), ("throughput",)
"""The same of questions that were answered side by side."""
_LARGEST = 10**18
"""Of whole numbers, so that they can become a float."""
_PLACE = ("question_id", "turn", "position", "tokens", "top_two")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sidecar:
    """The file, and what a run would write into it.

    Attributes:
      path: of the JSON file.
      settings: what decides the answers and their times; JSON values.
      places: where the models lie; for a reader, and never compared.
    """

    path: pathlib.Path
    settings: Mapping[str, Any]
    places: Mapping[str, Any]

    def read_measured(self, answers: pathlib.Path, way_out: str) -> dict[str, Any] | None:
        """What was measured beside the answers of that file; None where the run has not finished.

        Raises:
          UserError: the file is missing or damaged, or tells of other settings; it ends in `way_out`.
        """
        try:
            before, measured = self._read()
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{answers} holds answers, and {self.path.name}, which tells how they were made, is missing or "
                            f"damaged; {way_out}") from None
        if found := changes(before, self.settings):
            raise UserError(f"{answers} holds answers made with other settings ({'; '.join(found)}); {way_out}")
        return measured

    def had_finished(self) -> bool:
        """Whether a run with these settings had measured."""
        try:
            before, measured = self._read()
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return False
        return bool(measured) and not changes(before, self.settings)

    def write(self, measured: Mapping[str, Any] | None, advice: str) -> None:
        """Writes the file; a `UserError` that ends in `advice` where that fails, and then the former file stays."""
        put_json(self.path, {"settings": self.settings, "places": self.places, "measured": measured}, advice=advice)

    def _read(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        kept = json.loads(self.path.read_text(encoding="utf-8"))
        before, measured = kept["settings"], kept["measured"]
        if not isinstance(before, dict) or measured is not None and not _is_measured(measured):
            raise ValueError
        return before, measured


def _is_measured(value: Any) -> bool:
    """Whether the value holds all that a report reads of it."""
    if not isinstance(value, dict) or not all(isinstance(value[key], str) for key in _TEXTS):
        return False
    numbers, figures = (_NUMBERS_OF_SLOTS, _FIGURES_OF_SLOTS) if "slots" in value else (_NUMBERS, _FIGURES)
    if not all(_is_number(value[key]) for key in numbers):
        return False
    if not all(value[key] is None or _is_number(value[key]) for key in figures):
        return False
    differences = value.get("differences", [])
    return isinstance(differences, list) and all(
        isinstance(entry, dict) and entry.keys() >= set(_PLACE) and _is_number(entry["gap"]) for entry in differences)


def _is_number(value: Any) -> bool:
    """Whatever a clock may have given: phases are differences of times, and may fall below 0."""
    return type(value) is float or type(value) is int and abs(value) < _LARGEST
