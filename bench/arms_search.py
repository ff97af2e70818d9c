"""Staged searches of a training recipe on validation, for `bench.arms`.

A full grid would have 216 recipes for real only. Instead each stage varies a few settings about the
best of the stage before: how the two sources are weighed and how firm the images are, what the
images become, how long and how fast it trains, what restrains it. A stage is begun when all of the
one before have been measured under all data seeds of the call; best is the highest mean of
validation top-1 over them, of equals the first.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from bench.arms_results import Results

Grid = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Search:
    """Stages of settings of one arm."""

    arm: str
    about: str
    stages: tuple[Grid, ...]

    def arms(
        self, results: Results, seeds: Sequence[int], classifier_seeds: Sequence[int]
    ) -> list[str]:
        """All that are to be measured now: the stages up to the first that is not complete."""
        wanted: dict[str, None] = {}
        best: dict[str, str] = {}
        for stage in self.stages:
            candidates = {named(self.arm, best | point): best | point for point in _points(stage)}
            wanted |= dict.fromkeys(candidates)
            means = {name: mean_of(name, results, seeds, classifier_seeds) for name in candidates}
            if None in means.values():
                break
            best = candidates[max(means, key=lambda name: means[name] or 0.0)]
        return list(wanted)


def named(arm: str, settings: Mapping[str, str]) -> str:
    """The name of an arm with settings."""
    told = ",".join(f"{key}={value}" for key, value in sorted(settings.items()))
    return f"{arm}:{told}" if told else arm


def mean_of(
    arm: str, results: Results, seeds: Sequence[int], classifier_seeds: Sequence[int]
) -> float | None:
    """Mean of validation top-1; None where a row is missing."""
    rows = [
        results.get(arm, {}).get(seed, {}).get(number)
        for seed in seeds
        for number in classifier_seeds
    ]
    known = [row.val_top1 for row in rows if row is not None]
    return fmean(known) if len(known) == len(rows) else None


def _points(grid: Grid) -> Iterator[dict[str, str]]:
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


_RECIPE: tuple[Grid, ...] = (
    {"classify.mix": ("none", "cutmix", "mixup"), "augment": ("none", "trivial")},
    {
        "classify.epochs": ("60", "200", "400"),
        "classify.learning_rate": ("1e-4", "3e-4", "1e-3"),
    },
    {"classify.weight_decay": ("1e-2", "1e-1"), "smoothing": ("0", "0.1")},
)
_SOURCES: Grid = {
    "classify.real_weight": ("0.1", "0.2", "0.3", "0.5"),
    "generate.guidance_scale": ("1.5", "2.0", "3.0"),
}
SEARCHES: Mapping[str, Search] = {
    "real-tuned": Search("real", "real only, by its own best recipe", _RECIPE),
    "bob-tuned": Search("bob", "real + synthetic, by its own best recipe", (_SOURCES, *_RECIPE)),
}
