"""Run a stage as `python -m bob STAGE` does, and log every batch of items before it is made.

What a killed process was making is in no cache and no index; it is in this log, a line a batch:
the stage and the number of items. The file is named by the environment variable BOB_MADE_LOG.
"""

import os
from pathlib import Path
from typing import Any

from bob.__main__ import main
from bob.items import ItemCache

LOG = "BOB_MADE_LOG"


def made(log: Path) -> dict[str, list[int]]:
    """Stage -> the sizes of the batches that were begun."""
    batches: dict[str, list[int]] = {}
    for line in log.read_text().splitlines() if log.exists() else ():
        stage, size = line.split()
        batches.setdefault(stage, []).append(int(size))
    return batches


class CountedCache(ItemCache):
    """An item cache that logs what it has made."""

    def _make(self, batch: Any, *rest: Any) -> dict[str, str]:
        with Path(os.environ[LOG]).open("a") as log:
            log.write(f"{self._stage} {len(batch)}\n")  # one write: lines of several stay whole
        return super()._make(batch, *rest)


if __name__ == "__main__":
    # The stage's own module is not imported yet: what it will import is this.
    import bob.items

    bob.items.ItemCache = CountedCache  # type: ignore[misc]
    main()
