"""What a stage asks the item cache for."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from bob.cache.recipe import Maker, item_key


def _nothing(_: Sequence[int]) -> Iterable[int]:
    return ()


@dataclass(frozen=True)
class Wanted:
    """Items of one family, and what would make them now."""

    recipes: Sequence[str]
    family: Mapping[str, object]
    """What all of them have in common, and may be tried together."""
    maker: Maker
    covering: Callable[[Sequence[int]], Iterable[int]] = _nothing
    """Of these positions in `recipes`, those that a trial should not leave out."""
    differing: Callable[[bytes, bytes], str] | None = None
    """How far two items are apart, in words."""
    on_trial: bool = True
    """Whether a trial may be made; not where it costs as much as what it could save."""

    @cached_property
    def family_id(self) -> str:
        """Hash of the family."""
        return item_key(**self.family)
