"""The machine that a stage computes on, in its last line and in what it says when memory ends."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bob.errors import BobError
from bob.models.precision import hardware


def device_name() -> str:
    """What items are made on: the GPU as torch calls it, or cpu."""
    made_on = hardware()
    return made_on.name or made_on.device


@contextmanager
def enough_memory(stage: str, advice: str) -> Iterator[None]:
    """Raise a BobError with `advice` where the GPU has too little memory for the block."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise BobError(f"{stage}: the GPU has too little memory; {advice}") from None
