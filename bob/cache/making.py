"""Making what is missing, in company.

Several processes help each other: each announces a batch before it makes it, of quick ones a
second's worth at once, and goes round what another has announced. What is still missing in the end
it waits for, but no longer than PATIENCE of its own slowest batches, and then makes it: the other
may have died.
"""

import random
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from bob.cache.index import Row
from bob.cache.wanted import Wanted
from bob.cache.work import Made, Work

if TYPE_CHECKING:
    from bob.cache.items import ItemCache

PATIENCE = 2.0
_SECONDS_AHEAD = 1.0  # for which batches are announced at once: each time waits for the disk


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
        self.of(self._unannounced(places, left), most)
        while left:
            self._await_others(left)
            self.of(self._abandoned(left), most)
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

    def _unannounced(self, places: Sequence[int], left: list[int]) -> Iterator[list[int]]:
        """Batches that no one else has announced, each announced; the other places go to `left`."""
        recipes, ours, waiting = self._wanted.recipes, list[int](), iter(places)
        ahead = 1  # batches announced at once
        began = time.monotonic()
        while asked := list(islice(waiting, ahead * self._batch_size - len(ours))):
            free = self._cache.index.start(
                [recipes[place] for place in asked], self._wanted.maker.id
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

    def _await_others(self, left: list[int]) -> None:
        """Take of `left` what others have made, until nothing came for as long as PATIENCE says."""
        give_up = time.monotonic() + PATIENCE * self._slowest
        while left:
            if self._found(left):
                give_up = time.monotonic() + PATIENCE * self._slowest
            elif time.monotonic() >= give_up:
                return
            else:
                time.sleep(self._slowest / 10)

    def _abandoned(self, left: list[int]) -> Iterator[list[int]]:
        """Batches of `left`, until there are signs of life of another that makes them."""
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
