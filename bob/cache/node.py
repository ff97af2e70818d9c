"""The folder of a machine that makes items for another: files that it was sent, checkpoints."""

import os
from pathlib import Path

FOLDER = "BOB_NODE_FOLDER"
"""Environment variable; by default it is `bob` in the user's cache folder, `~/.cache`."""


def folder(name: str) -> Path:
    """A folder in it; it is made where it is missing."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(os.environ.get(FOLDER) or Path(base, "bob"), name)
    path.mkdir(parents=True, exist_ok=True)
    return path
