"""Making cached items again, at random, to see whether they still come out the same."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from bob.cache.index import Row, Trial
from bob.cache.items import ItemCache, md5_of
from bob.cache.wanted import Wanted
from bob.cache.work import Made, Work
from bob.errors import BobError
from bob.formats.photos import batches


@dataclass(frozen=True)
class Difference:
    """An item that came out otherwise."""

    row: Row
    how: str
    """How far the two are apart, in words; empty where the stage has none."""


class CheckingCache(ItemCache):
    """Hands out what is cached and makes a random share of it again, to compare.

    What differs is forgotten. Where other code has made it, a trial has been wrong: the two makers
    are no longer taken to make the same in that family, and what was the same as that code is tried
    again. Raises BobError where items are missing.
    """

    def __init__(self, stage: str, share: float) -> None:
        super().__init__(stage)
        self._share = share
        self.total, self.checked = 0, 0
        self.differences: list[Difference] = []

    def take(
        self,
        wanted: Wanted,
        work: Work,
        batch_size: int,
        progress: str = "",
    ) -> list[Row]:
        """The wanted items, in order, of which none is made anew."""
        position = {recipe: number for number, recipe in enumerate(wanted.recipes)}
        rows = self.present(wanted)
        if missing := len(position) - len(rows):
            raise BobError(
                f"{missing:,} of {len(position):,} items are not in the item cache; `dvc repro "
                f"{self.stage}` makes them"
            )
        chosen = random.sample(sorted(rows), math.ceil(self._share * len(rows)))
        self.total += len(rows)

        def compare(batches: Sequence[Made]) -> None:
            for made in batches:
                for number, item in zip(made.numbers, made.items, strict=True):
                    self._compare(wanted, rows[wanted.recipes[number]], item)

        places = list(batches([position[recipe] for recipe in chosen], batch_size))
        self.executor(work).make(work, wanted.maker, places, len(places), compare)
        self.checked += len(chosen)
        return [rows[recipe] for recipe in wanted.recipes]

    def _compare(self, wanted: Wanted, row: Row, item: bytes) -> None:
        if md5_of(item) == row.oid:
            return
        how = wanted.differing(self.read(row.oid), item) if wanted.differing else ""
        self.differences.append(Difference(row, how))
        self.index.drop([row])
        if row.maker != wanted.maker.id:
            self.index.drop_equal_trials(wanted.family_id, row.maker)
            trial = Trial(wanted.maker.id, row.maker, equal=0, compared=1)
            self.index.record_trial(wanted.family_id, trial, [row.recipe])

    def _ended(self) -> None:
        """Nothing is recorded of a check: it is no run of the stage."""
