"""The files that work reads, brought to a worker: each once a machine, known by its content."""

import fcntl
import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path

from bob.cache import node
from bob.errors import BobError

PART = 8 * 2**20  # bytes that are sent at once
DAYS_KEPT = 30  # of files that nothing asks for
_AT_ONCE = 512  # files asked for at once
_LARGE = 64 * 2**20  # bytes of a file on a shared disk that is not hashed by every worker

Asked = Sequence[tuple[str, int]]
"""Files and the offsets from which they are read."""
Parts = list[tuple[bytes, bool]]
"""Bytes of files, and whether they go to the file's end."""
Read = Callable[[Asked], Parts]


class Source:
    """Reads the project's files for workers, on the driver's machine; `root` is the project's."""

    def __init__(self, root: str) -> None:
        self._root = Path(root)

    def read(self, asked: Asked) -> Parts:
        """PART bytes of all together; of fewer files than asked for, where these are large."""
        parts: Parts = []
        room = PART
        for name, start in asked:
            with (self._root / name).open("rb") as file:
                file.seek(start)
                part = file.read(room)
                parts.append((part, not file.read(1)))
            room -= len(part)
            if room <= 0:
                break
        return parts


class Brought:
    """The project's files in the current folder of a worker, by the paths they have there.

    A file is a link to the project's own where the worker sees it, as on a shared disk or on the
    driver's machine, and else to a copy that this machine keeps. `root` is the project's folder on
    the driver's machine, `read` is a `Source.read` there.
    """

    def __init__(self, root: Path, read: Read) -> None:
        self._root, self._read = root, read
        self._placed: dict[Path, str] = {}
        self._kept = node.folder("files")
        self._lock = self._kept / "lock"
        # Where another holds the lock, which it does for as long as it brings files, or the disk
        # has no locks, the sweep is left to the next worker.
        with suppress(OSError), _locked(self._lock, wait=False):
            self._sweep()

    def _sweep(self) -> None:
        """Remove what nothing has asked for in DAYS_KEPT; the lock is held and stays."""
        oldest = time.time() - DAYS_KEPT * 86400
        for path in self._kept.iterdir():
            with suppress(FileNotFoundError):  # a user may empty the folder, too
                if path != self._lock and path.lstat().st_mtime < oldest:
                    path.unlink()

    def bring(self, files: Mapping[Path, str]) -> None:
        """Have these files (path -> MD5 or SHA-256) in place.

        Raises BobError where one is no longer what it was, or lies outside the project.
        """
        new = {path: one for path, one in files.items() if self._placed.get(path) != one}
        missing = {path: one for path, one in new.items() if not self._is_here(path, one)}
        if missing:
            with _locked(self._lock):
                self._fetch({content: path for path, content in missing.items()})
        for path, content in missing.items():
            self._place(path, self._kept / content)
        self._placed |= new

    def _is_here(self, path: Path, content: str) -> bool:
        own = self._root / path
        if own.is_file() and self._has_content(own, content):
            self._place(path, own)
            return True
        if path.is_absolute() or ".." in path.parts:
            raise BobError(
                f"{path} lies outside the project, and this machine does not see it; put it inside"
            )
        return False

    def _place(self, path: Path, target: Path) -> None:
        if path.is_absolute():
            return  # and is what `target` is
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    def _has_content(self, path: Path, content: str) -> bool:
        found = path.stat()
        if found.st_size < _LARGE:
            return _digest(path, content) == content
        # What was hashed is remembered for the other workers of this machine, and the next.
        state = f"{path} {found.st_size} {found.st_mtime_ns} {found.st_ino} {content}"
        mark = node.folder("hashed") / hashlib.sha256(state.encode()).hexdigest()
        if not mark.exists():
            if _digest(path, content) != content:
                return False
            mark.touch()
        return True

    def _fetch(self, wanted: Mapping[str, Path]) -> None:
        """Copy what others of this machine have not brought meanwhile; content -> path there."""
        waiting = deque(one for one in wanted.items() if not self._touched(one[0]))
        start = 0
        while waiting:
            asked = [(str(path), 0) for _, path in islice(waiting, _AT_ONCE)]
            asked[0] = (asked[0][0], start)
            for part, is_last in self._read(asked):
                content, path = waiting[0]
                draft = self._kept / f"{content}.draft"  # one writer, who holds the lock
                with draft.open("ab" if start else "wb") as file:
                    file.write(part)
                start += len(part)
                if is_last:
                    if _digest(draft, content) != content:
                        raise BobError(f"{path} has changed while it was in use; run it again")
                    draft.replace(self._kept / content)
                    waiting.popleft()
                    start = 0

    def _touched(self, content: str) -> bool:
        """Whether a file is kept; if so, it is for another DAYS_KEPT."""
        try:
            os.utime(self._kept / content)
        except FileNotFoundError:
            return False
        return True


def _digest(path: Path, content: str) -> str:
    """The hash of a file, of the kind that `content` is."""
    with path.open("rb") as file:
        if len(content) == 64:
            return hashlib.file_digest(file, "sha256").hexdigest()
        return hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).hexdigest()


@contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock; raises BlockingIOError where another does and this is not to wait."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
