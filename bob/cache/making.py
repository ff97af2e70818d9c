"""Making what is missing, in company.

Several processes help each other: each announces a batch before it makes it, of quick ones a
second's worth at once, and goes round what another has announced. What is still missing in the end
it waits for, and where the other ends without having made it, one of those who wait takes it over.
Whether the other lives is told by a lock (`announcing`).

Who has made some waits no longer than PATIENCE of its own slowest batches and then makes the rest
as well: the other may be much slower. Who has made none does not know how long one takes, a LoRA
for hours, and waits for as long as the other lives; but not with a GPU that another process waits
for, as that may be the other.
"""

import fcntl
import os
import platform
import random
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from bob.cache import gpu_locks
from bob.cache.index import Row
from bob.cache.wanted import Wanted
from bob.cache.work import Made, Work
from bob.errors import tell

if TYPE_CHECKING:
    from bob.cache.items import ItemCache

PATIENCE = 2.0
ANNOUNCERS = "announcers"
"""The folder of their locks, beside the index."""
_SECONDS_AHEAD = 1.0  # for which batches are announced at once: each time waits for the disk
_SECONDS_TO_SAY = 20.0  # that another is waited for
_SECONDS_KEPT = 86400.0  # the file of one that was killed


@contextmanager
def announcing(folder: Path) -> Iterator[str]:
    """The name of one who announces, for a block, and a file of that name, locked meanwhile.

    The kernel releases the lock with its process, however that ends, and a server of files those of
    a machine that is gone. Where machines share a disk that does not lock from one to the other,
    who is on another one seems to have ended, and what it makes is made twice. SQLite's own locks
    on the index are then of no use either.
    """
    for left in folder.iterdir():
        with suppress(OSError):  # another process has removed it
            # Not a new one, which its owner is about to lock.
            if left.stat().st_mtime < time.time() - _SECONDS_KEPT and not is_alive(left):
                left.unlink()
    host = re.sub(r"[^\w-]", "_", platform.node())
    path = folder / f"{host}-{os.getpid()}-{secrets.token_hex(4)}"
    with path.open("x") as file:
        path.chmod(0o644)  # for the other users of a shared cache, whatever the umask
        with suppress(OSError):  # a disk without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield path.name
        finally:
            path.unlink(missing_ok=True)


def is_alive(path: Path) -> bool:
    """Whether the announcer with this file may yet make what it has announced."""
    try:
        with path.open() as file:
            # Shared, so that none of those who look takes another one of them for it.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # its file is gone, and so is it
        return False
    return False


class Making:
    """The making of items that one `take` misses; their places are positions among the wanted."""

    def __init__(
        self,
        cache: "ItemCache",
        wanted: Wanted,
        work: Work,
        batch_size: int,
        bar: "tqdm[Any] | None" = None,
    ) -> None:
        self._cache, self._wanted, self._work = cache, wanted, work
        self._batch_size, self._bar = batch_size, bar
        self._rows: dict[str, Row] = {}
        self._slowest = 0.0
        self._announcers = cache.folder(ANNOUNCERS)

    def of(self, batches: Iterable[list[int]], most: int = 1) -> dict[str, Row]:
        """Recipe -> row of the items of all `batches`, `most` of them at most."""
        self._cache.executor(self._work).make(
            self._work, self._wanted.maker, batches, most, self._keep
        )
        return self._rows

    def made(self, places: Sequence[int]) -> dict[str, Row]:
        """Recipe -> row of the items in these places, made here or by others."""
        left: list[int] = []  # to others
        most = -(-len(places) // self._batch_size)
        with announcing(self._announcers) as here:
            self.of(self._unannounced(places, left, here), most)
            while left:
                gone = self._await_others(left)
                if gone is None:
                    self.of(self._given_up(left), most)
                elif left:
                    again, left = left, []
                    self.of(self._unannounced(again, left, here, gone), most)
        return self._rows

    def _keep(self, batches: Sequence[Made]) -> None:
        recipes = self._wanted.recipes
        items = {
            recipes[number]: item
            for made in batches
            for number, item in zip(made.numbers, made.items, strict=True)
        }
        self._rows |= self._cache.keep(self._wanted, items)
        self._slowest = max(self._slowest, *(made.seconds for made in batches))
        self._progress(len(items))

    def _progress(self, items: int) -> None:
        if self._bar is not None:
            self._bar.update(items)

    def _unannounced(
        self, places: Sequence[int], left: list[int], who: str, gone: Iterable[str] = ()
    ) -> Iterator[list[int]]:
        """Batches that no one else has announced but the `gone`; the other places go to `left`.

        Each is announced, by `who`.
        """
        recipes, ours, waiting = self._wanted.recipes, list[int](), iter(places)
        ahead = 1  # batches announced at once
        began = time.monotonic()
        while asked := list(islice(waiting, ahead * self._batch_size - len(ours))):
            free = self._cache.index.start(
                [recipes[place] for place in asked], self._wanted.maker.id, who, gone
            )
            ours += [place for place in asked if recipes[place] in free]
            left += [place for place in asked if recipes[place] not in free]
            while len(ours) >= self._batch_size:
                yield ours[: self._batch_size]
                del ours[: self._batch_size]
            seconds, began = time.monotonic() - began, time.monotonic()
            ahead = 2 * ahead if seconds < _SECONDS_AHEAD else max(1, ahead // 2)
        if ours:
            yield ours

    def _await_others(self, left: list[int]) -> set[str] | None:
        """Take of `left` what others make, for as long as all of it is announced by the living.

        Returns those of its announcers who are gone; None where nothing came for too long.
        """
        recipes, index = self._wanted.recipes, self._cache.index
        heard, told = time.monotonic(), False
        while left:
            if self._found(left):
                heard = time.monotonic()
                continue
            who = index.announced([recipes[place] for place in left], self._wanted.maker.id)
            gone = {one for one in set(who.values()) if not is_alive(self._announcers / one)}
            if gone or len(who) < len(left):
                return gone
            waited = time.monotonic() - heard
            if self._slowest:
                if waited >= PATIENCE * self._slowest:
                    return None
                time.sleep(self._slowest / 10)
                continue
            if gpu_locks.in_demand():
                return None
            if waited >= _SECONDS_TO_SAY and not told:
                told = True
                one = self._announcers / min(who.values())
                tell(
                    f"waiting: another process of bob makes {len(left):,} of the items; if it does "
                    f"not, remove {os.path.relpath(one)}"
                )
                # It may be the one that waits for workers that this one has.
                self._cache.executor(self._work).close()
            time.sleep(min(5.0, 0.05 + waited / 10))
        return set()

    def _given_up(self, left: list[int]) -> Iterator[list[int]]:
        """Batches of `left`, until something comes from those who have announced them."""
        while left and not self._found(left):
            # Whoever comes here finds the same few: they must not all take the same.
            random.shuffle(left)
            batch = left[: self._batch_size]
            del left[: self._batch_size]
            yield batch

    def _found(self, left: list[int]) -> int:
        """How many of `left` others have made by now; they are taken from it."""
        recipes = self._wanted.recipes
        found = self._cache.found([recipes[place] for place in left], self._wanted.maker.id)
        self._cache.reused += len(found)
        self._rows |= found
        self._progress(len(found))
        left[:] = [place for place in left if recipes[place] not in found]
        return len(found)
