"""What other code has made: whether it may be reused, by trials, and why it may not.

Where other code has made items of the recipes that are wanted, one full batch of them is made again
and compared byte for byte. If all are equal, the two makers are taken to make the same in the whole
family, now and later, and its other items are reused; if one is not, none is. A difference that was
found once is not outweighed by any number of trials that have found none.
"""

from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence

from bob.cache.index import Index, Row, Trial
from bob.cache.recipe import Maker, parts_changed
from bob.cache.wanted import Wanted


class Trials:
    """The trials that the index records, for one stage."""

    def __init__(self, index: Index, stage: str) -> None:
        self._index, self._stage = index, stage

    def judged(self, wanted: Wanted) -> tuple[set[str], set[str]]:
        """The makers that make the same in this family as the present one, and those that do not.

        To make the same bytes is transitive: what is the same as a maker that is the same, is. But
        a trial of a few items can miss a difference and cannot invent one. So no two of `same` are
        proved different from each other, whatever chain of equal trials leads from one to the
        other.

        Which trial of such a chain has missed the difference, nobody knows. The shorter a chain,
        the fewer could have: `same` grows by steps, the makers first that were tried against the
        present one itself, and of two that are proved different the nearer one is the same. Where
        they are equally near, neither is, for the items of one of them are wrong.
        """
        equal, unequal = defaultdict[str, set[str]](set), defaultdict[str, set[str]](set)
        for trial in self._index.trials(wanted.family_id):
            neighbours = equal if trial.same else unequal
            neighbours[trial.one].add(trial.other)
            neighbours[trial.other].add(trial.one)
        same, different = {wanted.maker.id}, set[str]()
        while reached := {other for one in same for other in equal[one]} - same - different:
            proved = {one for one in reached if unequal[one] & same}
            fit = reached - proved
            doubtful = {one for one in fit if unequal[one] & fit}
            same |= fit - doubtful
            different |= proved | doubtful
        return same, different | {other for one in same for other in unequal[one]}

    def chosen(
        self, wanted: Wanted, places: Iterable[int], size: int, made: Container[str] = ()
    ) -> list[int]:
        """Of these positions the `size` to be tried: those that cover what can differ, first.

        All of them are in `made`, the recipes of earlier trials, and need no new one, or none is.
        """

        def first_of(places: Sequence[int]) -> list[int]:
            by_hash = sorted(places, key=lambda place: wanted.recipes[place])
            first = [places[0], places[-1], *wanted.covering(places)]
            return list(dict.fromkeys([*first, *by_hash]))[:size]

        places = sorted(places)
        new = [place for place in places if wanted.recipes[place] not in made]
        best = first_of(places)
        return best if set(best).isdisjoint(new) else first_of(new)

    def record(
        self, wanted: Wanted, theirs: Mapping[str, Row], ours: Mapping[str, Row]
    ) -> list[str]:
        """Record how the items of `ours` compare with those of the same recipes in `theirs`.

        Returns the recipes of those that came out otherwise.
        """
        unequal = [recipe for recipe, row in ours.items() if row.oid != theirs[recipe].oid]
        other = next(theirs[recipe].maker for recipe in ours)
        trial = Trial(wanted.maker.id, other, len(ours) - len(unequal), len(ours))
        self._index.record_trial(wanted.family_id, trial, list(ours))
        return unequal

    def explain(self, wanted: Wanted, makers: Iterable[str]) -> str:
        """Why items are not there, in words: other code, or another family. Empty: not known.

        `makers` are those that have made items of these recipes. Records the family.
        """
        others = [maker for maker in makers if maker != wanted.maker.id]
        families = self._index.families(self._stage)
        self._index.record_family(self._stage, wanted.family_id, wanted.family)
        if others:
            changed = [self.code_changes(one, wanted.maker) for one in others]
            return f"other code: {_shortest(changed)}"
        if wanted.family_id in families:
            return "not asked for before with these settings"
        alike = [
            parts_changed(parts, wanted.family)
            for parts in families.values()
            if parts.get("item") == wanted.family.get("item")
        ]
        return _shortest(alike) if alike else ""

    def code_changes(self, maker: str, present: Maker) -> list[str]:
        """What is another in the present maker, in words."""
        known = self._index.maker(maker)
        return known.changes(present) if known else ["in what, is not known here"]


def _shortest(changes: Sequence[list[str]]) -> str:
    return ", ".join(sorted(changes, key=len)[0])
