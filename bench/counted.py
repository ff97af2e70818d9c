"""Run a stage as `python -m bob STAGE` does, and log every batch of items before it is made.

What a killed process was making is in no cache and no index; it is in this log, a line a batch:
the stage and the number of items. The file is named by the environment variable BOB_MADE_LOG.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from bob.__main__ import main
from bob.cache.index import Row
from bob.cache.items import ItemCache
from bob.cache.wanted import Wanted
from bob.cache.work import Work

LOG = "BOB_MADE_LOG"


def made(log: Path) -> dict[str, list[int]]:
    """Stage -> the sizes of the batches that were begun."""
    batches: dict[str, list[int]] = {}
    for line in log.read_text().splitlines() if log.exists() else ():
        stage, size = line.split()
        batches.setdefault(stage, []).append(int(size))
    return batches


class CountedCache(ItemCache):
    """An item cache that logs what it makes."""

    def take(self, wanted: Wanted, work: Work, *rest: Any, **named: Any) -> list[Row]:
        def logged(positions: list[int]) -> tuple[Any, ...]:
            with Path(os.environ[LOG]).open("a") as log:
                # One write: lines of several stay whole.
                log.write(f"{self.stage} {len(positions)}\n")
            return work.inputs(positions)

        return super().take(wanted, replace(work, inputs=logged), *rest, **named)


if __name__ == "__main__":
    # The stage's own module is not imported yet: what it will import is this.
    import bob.cache.items

    bob.cache.items.ItemCache = CountedCache  # type: ignore[misc]
    main()
