"""How items are made, in a form that another process can be handed.

DVC decides what is stale, the item cache what is missing, an *executor* where it is made.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bob.cache.recipe import Maker


def _themselves(numbers: list[int]) -> tuple[Any, ...]:
    return (numbers,)


def _nothing(numbers: list[int]) -> Mapping[Path, str]:
    return {}


@dataclass(frozen=True)
class Work:
    """What makes the items of one `take`."""

    make: Callable[..., Sequence[Any]]
    """Makes the items of a batch. Can be pickled until it is called for the first time; then it
    loads what it needs, by paths relative to the project's root, and may keep it for the next."""
    inputs: Callable[[list[int]], tuple[Any, ...]] = _themselves
    """Positions among the wanted recipes -> the arguments of `make` for that batch."""
    encode: Callable[[Any], bytes] = bytes
    """An item -> its bytes; called in threads."""
    files: Callable[[list[int]], Mapping[Path, str]] = _nothing
    """Positions -> path and content hash (MD5 or SHA-256) of all that `make` reads for them."""
    elsewhere: bool = True
    """Whether another machine could make them as well."""


@dataclass(frozen=True)
class Made:
    """A batch that is done."""

    numbers: list[int]
    """Positions among the wanted recipes."""
    items: list[bytes]
    seconds: float
    """From its begin to its end."""


Keep = Callable[[Sequence[Made]], None]
"""Is given batches as they get done, in one thread and not always that of the caller."""


@dataclass(frozen=True)
class Hardware:
    """What decides how items are computed where they are made."""

    device: str
    """cuda or cpu."""
    bf16: bool | None
    """Whether it multiplies in bf16; None where some of the machines do."""
    name: str = ""
    """What torch calls the GPU."""
    compiles: bool = False
    """Whether torch.compile has what it needs, on all of the machines."""


class Executor(Protocol):
    """Where batches of items are made."""

    def make(
        self, work: Work, maker: Maker, batches: Iterable[list[int]], most: int, keep: Keep
    ) -> None:
        """Make the batches, `most` of them at most, each taken when there is someone free.

        All that were done are kept when it returns, and also when it raises.
        """

    def hardware(self, look: Callable[[], Hardware]) -> Hardware:
        """That of whoever makes the items, as `look` finds it out where it is called.

        Raises BobError where nobody is there.
        """

    def workers(self) -> int:
        """How many batches can be made at the same time."""

    def close(self) -> None:
        """Let go of whoever was making items."""
