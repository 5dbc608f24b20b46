"""What models and files hold, as the settings of a run record it: results belong to contents, wherever these lie."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from experiments.running.methods import DEMO_NAME, METHODS, Models
from specmq_jax.errors import UserError
from specmq_jax.loading import contents


class Contents:
    """Digests, each taken once, so that what one process loads and what it records are the same.

    Where something can't be read, the error's text stands for its digest: it is nobody's content, and loading will raise it.
    """

    def __init__(self) -> None:
        self._digests: dict[tuple[str, str], str] = {}
        self._places: dict[str, str] = {}

    def model(self, source: str | None) -> str:
        """Of a model; a foreign one is converted on first use. The demo model's name tells its content, which is checked when
        it is fetched."""
        if source is None:
            return DEMO_NAME
        return self._taken("model", source, lambda: contents.checkpoint_digest(self._native(source)))

    def head(self, directory: str) -> str:
        """Of an EAGLE head."""
        return self._taken("head", directory, lambda: contents.head_digest(directory))

    def file(self, path: str) -> str:
        """Of a file."""
        return self._taken("file", path, lambda: contents.file_digest(pathlib.Path(path)))

    def of_method(self, models: Models, method: str) -> dict[str, Any]:
        """What decides a method's answers of the models: contents, and the settings of its drafts.

        Raises:
          UserError: as `Models.head`.
        """
        chosen = METHODS[method]
        found: dict[str, Any] = {"model content": self.model(models.target)}
        if chosen.versions:
            found["eagle content"] = self.head(models.head(method))
        for field in chosen.settings:
            name, value = self._recorded(field, getattr(models, field))
            found[name] = value
        return found

    def placed(self, models: Models) -> Models:
        """The models with the native checkpoints that were found for them, which are not looked for again."""
        return dataclasses.replace(models, places=dict(self._places))

    def _recorded(self, field: str, value: Any) -> tuple[str, Any]:
        digest = {"drafter": self.model, "vocabulary": self.file}.get(field)
        if field == "eagle":
            return "eagle content", [self.head(directory) for directory in value]
        if digest:
            return f"{field} content", value and digest(value)
        return field, value if value is None or isinstance(value, str | int | float) else repr(value)

    def _native(self, source: str) -> pathlib.Path:
        from checkpoints_tools import conversion  # converting is needed for foreign checkpoints alone

        directory = conversion.prepare(source)
        self._places[source] = str(directory)
        return directory

    def _taken(self, kind: str, place: str, digest: Callable[[], str]) -> str:
        if (kind, place) not in self._digests:
            try:
                self._digests[kind, place] = digest()
            except UserError as error:
                self._digests[kind, place] = str(error)
        return self._digests[kind, place]
