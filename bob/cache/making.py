"""Making what is missing, in company.

Several processes help each other: each announces a batch before it makes it and goes round what
another has announced. What is still missing in the end it waits for, but no longer than PATIENCE of
its own slowest batches, and then makes it: the other may have died.
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
        recipes, batch = self._wanted.recipes, list[int]()
        waiting = iter(places)
        while candidates := list(islice(waiting, self._batch_size - len(batch))):
            ours = self._cache.index.start(
                [recipes[place] for place in candidates], self._wanted.maker.id
            )
            batch += [place for place in candidates if recipes[place] in ours]
            left += [place for place in candidates if recipes[place] not in ours]
            if len(batch) == self._batch_size:
                yield batch
                batch = []
        if batch:
            yield batch

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
