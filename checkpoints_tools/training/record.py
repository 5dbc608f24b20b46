"""What a training in a work directory was begun with, and whether it has finished."""

import pathlib
from collections.abc import Mapping
from typing import Any

from checkpoints_tools.training.checkpoints import Checkpoints
from specmq_jax.errors import UserError
from specmq_jax.kept_settings import changes, read_settings, write_settings


class TrainingRecord:
    """The file training.json of a work directory.

    Attributes:
      directory: the work directory.
      finished: after how many updates the training there has finished; None where it has not.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        """Changes nothing on the disk; a damaged file is a `UserError`."""
        self.directory = directory
        self._path = directory / "training.json"
        kept = read_settings(self._path, "give another --work_dir")
        self._settings = None if kept is None else kept.get("settings")
        self.finished = None if kept is None else kept.get("finished")
        sound = isinstance(self._settings, dict) and isinstance(self._settings.get("epochs"), int | float)
        if kept is not None and not (sound and isinstance(self.finished, int | None)):
            raise UserError(f"{self._path} is damaged; it tells how the checkpoints there were made; give another --work_dir")

    def begin(self, settings: Mapping[str, Any], *, extend: bool) -> None:
        """Records the settings of a training that begins or goes on.

        Args:
          settings: what decides the head; JSON values, with "epochs".
          extend: more epochs than were asked for before may be.

        Raises:
          UserError: the checkpoints in the directory were made with other settings, there are none to be extended, or it
            can't be written.
        """
        if self._has_checkpoints():
            self._check(settings, extend=extend)
        elif extend:
            raise UserError(f"{self.directory} holds no training with checkpoints that --extend could go on with; leave "
                            "--extend out, or give another --work_dir")
        more = self._settings is not None and settings["epochs"] > self._settings["epochs"]
        self._write(settings, None if more or not self._has_checkpoints() else self.finished)

    def finish(self, updates: int) -> None:
        """Records that the head is made."""
        self._write(self._settings or {}, updates)

    def _has_checkpoints(self) -> bool:
        return bool(Checkpoints(self.directory / "checkpoints").steps())

    def _check(self, settings: Mapping[str, Any], *, extend: bool) -> None:
        if self._settings is None:
            raise UserError(f"{self.directory} holds checkpoints, and {self._path.name}, which tells how they were made, is "
                            "missing; give another --work_dir")
        before, epochs = self._settings["epochs"], settings["epochs"]
        if found := changes(self._settings | {"epochs": epochs}, settings):
            raise UserError(f"{self.directory} holds checkpoints of a training with other settings ({'; '.join(found)}); give "
                            "the same ones to go on with it, or another --work_dir")
        if epochs > before and not extend:
            raise UserError(f"{self.directory} holds a training of {before:g} epochs, and --epochs={epochs:g} are asked for; "
                            f"add --extend to train on to these, or give --epochs={before:g} or another --work_dir")
        if epochs < before:
            raise UserError(f"{self.directory} holds a training of {before:g} epochs, and --epochs={epochs:g} are fewer; give "
                            f"--epochs={before:g} to go on with it, or another --work_dir")

    def _write(self, settings: Mapping[str, Any], finished: int | None) -> None:
        self._settings, self.finished = dict(settings), finished
        write_settings(self._path, {"settings": self._settings, "finished": finished})
