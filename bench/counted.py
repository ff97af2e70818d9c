"""Run a stage as `python -m bob STAGE` does, and log every batch of items before it is made.

What a killed process was making is in no cache and no index; it is in this log, a line a batch:
the stage and the number of items. The file is named by the environment variable BOB_MADE_LOG.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bob import captioner, sampling
from bob.__main__ import main

LOG = "BOB_MADE_LOG"


def made(log: Path) -> dict[str, list[int]]:
    """Stage -> the sizes of the batches that were begun."""
    batches: dict[str, list[int]] = {}
    for line in log.read_text().splitlines() if log.exists() else ():
        stage, size = line.split()
        batches.setdefault(stage, []).append(int(size))
    return batches


def logged(make: Callable[..., Any], stage: str) -> Callable[..., Any]:
    def logging(maker: Any, items: Sequence[Any], *rest: Any) -> Any:
        with Path(os.environ[LOG]).open("a") as log:
            log.write(f"{stage} {len(items)}\n")  # one write, so that lines of several stay whole
        return make(maker, items, *rest)

    return logging


if __name__ == "__main__":
    for maker, name, stage in (
        (captioner.Captioner, "ask", "caption"),
        (sampling.ImageMaker, "make", "generate"),
    ):
        if stage in sys.argv:
            setattr(maker, name, logged(getattr(maker, name), stage))
    main()
