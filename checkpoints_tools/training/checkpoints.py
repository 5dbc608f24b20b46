"""A training's checkpoints: a directory for each, by the number of updates behind it."""

import pathlib
import shutil
from typing import Any

import jax

from checkpoints_tools.writers.leaf_files import damaged, load_leaves, write_leaves
from specmq_jax.errors import UserError
from specmq_jax.files import staged

_FILE = "state.safetensors"


class Checkpoints:
    """The checkpoints in a directory, of which the newest stay."""

    def __init__(self, directory: pathlib.Path, *, most: int = 2) -> None:
        """Changes nothing on the disk.

        Args:
          directory: of the checkpoints; it may be missing.
          most: how many stay.
        """
        self._directory, self._most = directory, most

    def steps(self) -> list[int]:
        """The updates behind each checkpoint, ascending."""
        if not self._directory.is_dir():
            return []
        return sorted(int(path.name) for path in self._directory.iterdir() if path.name.isdecimal())

    def save(self, step: int, state: Any) -> None:
        """Keeps the arrays of a tree, and takes the oldest checkpoints away.

        Raises:
          UserError: the directory can't be written; nothing is left of the checkpoint, and those before it stay.
        """
        place = self._directory / str(step)
        shutil.rmtree(place, ignore_errors=True)
        with staged(place) as partial:
            write_leaves(partial / _FILE, _leaves(state))
        for old in self.steps()[:-self._most]:
            shutil.rmtree(self._directory / str(old), ignore_errors=True)

    def restore(self, step: int, like: Any) -> Any:
        """A checkpoint's tree.

        Args:
          step: one of `steps()`.
          like: a tree of the same structure, shapes and dtypes.

        Raises:
          UserError: the checkpoint is damaged, or of another structure.
        """
        path = self._directory / str(step) / _FILE
        try:
            found = load_leaves(path)
            with damaged(path):
                for name, leaf in _leaves(like).items():
                    if (found[name].shape, found[name].dtype) != (leaf.shape, leaf.dtype):
                        raise ValueError(f"{name} is {found[name].dtype}{list(found[name].shape)}, and the head has "
                                         f"{leaf.dtype}{list(leaf.shape)}")
        except UserError as error:
            raise UserError(f"{error}; remove {path.parent} to go on from the checkpoint before it, or give another --work_dir"
                            ) from None
        return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in _leaves(like)])


def _leaves(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
