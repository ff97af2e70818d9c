"""What the study has found of making half as many images."""

import math
import re
from pathlib import Path
from typing import NamedTuple

from bob.commands.study.results import read_results
from bob.commands.study.statistics import Interval, paired_interval

RESULTS = Path("docs/miniature-study.csv")
IMAGES = "generate.images_per_class="
_SETTING = re.compile(re.escape(IMAGES) + "[1-9][0-9]*")
METRIC = "real_and_synthetic.top1"


class Half(NamedTuple):
    """A number of images a class and half of it."""

    whole: int
    half: int
    gain: Interval
    """Of the half over the whole: points of top-1 on test, paired by data seed."""


def half_as_many(per_class: int, results: Path = RESULTS) -> Half | None:
    """What of the study is nearest to `per_class` and its half; None where there is no such.

    Raises BobError where the file is none of a study.
    """
    rows = [row for row in read_results(results) if {METRIC, "images"} <= row.metrics.keys()]
    told = {row.run: row for row in rows if _SETTING.fullmatch(row.run[0])}
    plain = {row.run: row for row in rows if row.run[0] == ""}  # as params.yaml has it
    if not told:
        return None
    setting, one = next(iter(told.items()))
    classes = one.metrics["images"] / int(setting[0].removeprefix(IMAGES))
    curve: dict[int, dict[tuple[int, str], float]] = {}
    for (_, seed), row in (told | plain).items():
        key = seed, row.confirmed or row.code  # rows of other code are no pair
        curve.setdefault(round(row.metrics["images"] / classes), {})[key] = row.metrics[METRIC]
    halved = [
        whole
        for whole in curve
        if whole % 2 == 0 and curve[whole].keys() & curve.get(whole // 2, {}).keys()
    ]
    if not halved or per_class < 1:
        return None
    whole = min(halved, key=lambda images: abs(math.log(images / per_class)))
    more, fewer = curve[whole], curve[whole // 2]
    pairs = sorted(more.keys() & fewer.keys())
    gain = paired_interval([fewer[pair] for pair in pairs], [more[pair] for pair in pairs])
    return Half(whole, whole // 2, gain)
