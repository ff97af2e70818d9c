"""Which GPU of this machine a process computes on: a free one, held until the process ends.

A lock per GPU, in the machine's folder for temporary files: GPUs are the machine's, so whoever runs
bob there, in whatever clone, goes round those in use. The kernel releases a lock with its process,
however that ends.
"""

import fcntl
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from bob.errors import BobError

SECONDS_BETWEEN_LOOKS = 0.5
_WAITING = "waiting"  # the lock that one of those who wait for a GPU holds
_held: list[int] = []  # descriptors of locks, open for as long as this process lives


def take_free(names: Sequence[str]) -> int:
    """Wait for one of these GPUs to be free and take it; returns its place in `names`.

    The names tell GPUs apart on this machine. Raises BobError where a lock cannot be used.
    """
    told = False
    waiting: int | None = None  # the lock that says so
    try:
        while True:
            for place, name in enumerate(names):
                if (held := _locked(_lock(name))) is not None:
                    _held.append(held)
                    return place
            if not told:
                told = True
                one = "the GPU is" if len(names) == 1 else f"all {len(names)} GPUs are"
                tqdm.write(f"waiting: {one} in use by other processes of bob", file=sys.stderr)
            if waiting is None:
                waiting = _locked(_lock(_WAITING))
            time.sleep(SECONDS_BETWEEN_LOOKS)
    finally:
        if waiting is not None:
            os.close(waiting)


def in_demand() -> bool:
    """Whether this process holds a GPU while another of this machine waits for one."""
    if not _held:
        return False
    # Shared: who looks must not be taken for one that waits by another who looks.
    looked = _locked(_lock(_WAITING), fcntl.LOCK_SH)
    if looked is not None:
        os.close(looked)
    return looked is None


def _lock(name: str) -> Path:
    return Path(tempfile.gettempdir(), f"bob-gpu-{name}.lock")


def _locked(path: Path, kind: int = fcntl.LOCK_EX) -> int | None:
    """The descriptor of the lock, which is held until it is closed; None: another holds it."""
    try:
        descriptor = _opened(path)
    except OSError as error:
        raise BobError(f"{path}, the lock of a GPU: {error.strerror}; remove it") from None
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _opened(path: Path) -> int:
    # To read is enough for a lock, and others' files in a shared folder may allow no more. Never
    # removed: a lock on a file that has another name by now, or none, would lock nothing.
    while True:
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            pass
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o644))
        except FileExistsError:
            continue
