"""The version of the installed package."""

import importlib.metadata

NAME = "specmq-jax"


def version() -> str:
    """What the package's metadata say; "uninstalled" where it is run without being installed."""
    try:
        return importlib.metadata.version(NAME)
    except importlib.metadata.PackageNotFoundError:
        return "uninstalled"
