"""Arms of `bench.arms` that drop generated images: does a filter bring the bias back?"""

import math
from collections.abc import Callable

import numpy as np

from bench.arms_critics import CRITICS, truly_wrong
from bench.arms_task import FewShot, Images, TrainingSet
from bench.arms_training import chosen

SHARES = (10, 20, 30)
"""Percent of the images of a class that are dropped."""


def filtered(critic: str, percent: int) -> Callable[[FewShot], TrainingSet]:
    """The arm that drops of each class the share that a critic believes in least."""

    def make(shots: FewShot) -> TrainingSet:
        images = shots.bobs_images()
        belief = CRITICS[critic](shots, images).numpy()
        dropped = worst_of_each_class(belief, np.array(images.labelled.labels), percent)
        kept = [place for place in range(len(images)) if place not in dropped]
        left = _only(images, kept)
        wrong = truly_wrong(shots, images)
        return TrainingSet(
            shots.real,
            left.labelled,
            images=left,
            figures={
                "wrong": 100 * float(wrong[kept].mean()),
                "wrong_dropped": 100 * float(wrong[sorted(dropped)].mean()),
                "unfamiliar_dropped": 100 * _unfamiliar(shots, images, sorted(dropped)),
            },
        )

    return make


def worst_of_each_class(belief: np.ndarray, labels: np.ndarray, percent: int) -> set[int]:
    """Places of the images of each class with the least belief; at least one, and never all."""
    worst: set[int] = set()
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        count = min(max(1, round(percent / 100 * len(own))), len(own) - 1)
        worst.update(own[np.argsort(belief[own], kind="stable")[:count]].tolist())
    return worst


def _unfamiliar(shots: FewShot, images: Images, places: list[int]) -> float:
    """Share of images whose prompt has a background that no shot of their class has.

    NaN where prompts have none.
    """
    own = {(entry.class_name, entry.context.background) for entry in shots.bank if entry.context}
    asked = [(images.about[place].class_name, images.about[place].context) for place in places]
    strange = [(name, one.background) not in own for name, one in asked if one]
    return float(np.mean(strange)) if strange else math.nan


def _only(images: Images, places: list[int]) -> Images:
    return Images(tuple(images.about[place] for place in places), chosen(images.labelled, places))
