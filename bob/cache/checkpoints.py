"""The last state of a training run that was killed, in DVC's cache, for the next run to go on with.

A checkpoint is known by the hash of everything that decides the run, and lies beside the item
cache, which all experiments of a repository share: a queued experiment finds what the same run
left in another folder.
"""

import hashlib
import os
import time
from pathlib import Path
from typing import Any, BinaryIO

import torch

from bob.cache import node
from bob.cache.index import warn
from bob.formats.files import replacing_file

SECONDS_BETWEEN = 180.0
DAYS_KEPT = 7


class Checkpoint:
    """The checkpoint of one run, `<key>.pt` in `folder`; old ones of other runs are removed.

    On another machine, which has no such folder, it lies in that of bob/cache/node.py.

    One file and no folder of its own: runs of the same key may work at once, and none may take
    away a folder that another is about to write to.
    """

    def __init__(self, folder: Path, key: str) -> None:
        if not folder.is_dir():
            folder = node.folder("checkpoints")
        self._path, self._key = folder / f"{key}.pt", key
        self._written = time.monotonic()
        for path in folder.iterdir():
            if path != self._path and _days_old(path) > DAYS_KEPT:
                path.unlink(missing_ok=True)

    def load(self) -> dict[str, Any] | None:
        """The state that was saved last, tensors on the CPU; None where there is none to read."""
        try:
            if not _is_whole(self._path):
                raise ValueError("it is not as it was written")
            saved = torch.load(self._path, map_location="cpu", weights_only=True)
            if saved["key"] != self._key:  # a copy under another's name, whose weights do not fit
                raise ValueError("it is of another run")
            state: dict[str, Any] = saved["state"]
            return state
        except FileNotFoundError:
            return None
        except Exception as error:  # what a damaged file raises has no common class
            warn(
                f"{self._path.name}, a checkpoint, cannot be read and the run begins anew "
                f"({' '.join(str(error).split())[:100]})"
            )
            return None

    def is_due(self) -> bool:
        """Whether the last save is SECONDS_BETWEEN ago."""
        return time.monotonic() - self._written >= SECONDS_BETWEEN

    def save(self, state: dict[str, Any]) -> None:
        """Save the state of the run, tensors and plain values, in one step."""
        with replacing_file(self._path) as draft:
            torch.save({"key": self._key, "state": state}, draft)
            with draft.open("r+b") as file:
                file.write(_digest(file, draft.stat().st_size))  # which torch.load reads over
        self._written = time.monotonic()

    def remove(self) -> None:
        """Forget the run, whose result is in place."""
        self._path.unlink(missing_ok=True)


def _digest(file: BinaryIO, count: int) -> bytes:
    """Of the first `count` bytes of a file, which is then read up to there."""
    digest = hashlib.sha256()
    while chunk := file.read(min(count, 1 << 20)):
        digest.update(chunk)
        count -= len(chunk)
    return digest.digest()


def _is_whole(path: Path) -> bool:
    """Whether a checkpoint ends in its own digest: `torch.load` compares no checksums."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size - hashlib.sha256().digest_size
        return size > 0 and _digest(file, size) == file.read()


def _days_old(path: Path) -> float:
    try:
        return (time.time() - path.stat().st_mtime) / 86400
    except FileNotFoundError:  # another process has removed it
        return 0.0
