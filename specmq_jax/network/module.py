"""Flax's module, for networks that are called by `apply`."""

from typing import TYPE_CHECKING, Any

import flax.linen as nn


class Module(nn.Module):
    """Says of `apply` that it returns what the method does: Flax's own says that this may come with changed collections."""

    if TYPE_CHECKING:
        def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any: ...
