"""What the rows of `bench.arms` say: arms compared, and the page."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from bench.arms_results import (
    BOB,
    TUNING,
    VERDICT,
    Results,
    Row,
    by_arm,
    is_judged,
)
from bob.commands.study.page import p_text
from bob.commands.study.statistics import (
    Interval,
    holm,
    mean_interval,
    p_value,
    paired,
    ratio_interval,
    smallest_visible,
)
from bob.formats.files import replacing_file

PAGE = Path("bench/results/arms.md")
TUNED = "bob:classify.real_weight=0.1,generate.guidance_scale=2.0"
"""What tuning has found; arms that are told its settings are to be seen against it."""
RECIPE = frozenset(TUNED.partition(":")[2].split(","))
FLOOR, CEILING = "real", "drawn"
BEST_FLOOR = (
    "real:augment=none,classify.epochs=60,classify.learning_rate=3e-4,classify.mix=none,"
    "classify.weight_decay=1e-1,smoothing=0.1"
)
"""Real only by the recipe that a search has found for it."""
BEST_CEILING = "drawn:classify.real_weight=0.1"
NONE = Interval(math.nan, math.nan, math.nan)
DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Comparison:
    """An arm against another, on the data seeds that both have whole."""

    arm: str
    other: str
    rows: Sequence[Row]
    differences: Sequence[float]
    """Of each data seed, the mean over the classifier seeds."""

    @classmethod
    def of(
        cls, arm: str, other: str, results: Results, metric: str, seeds: Iterable[int]
    ) -> "Comparison":
        """By a metric, on some data seeds."""
        shared = _shared(results, arm, [other], seeds)
        rows = [row for own, _ in shared for row in own]
        return cls(arm, other, rows, paired(*_means(shared, metric)) if shared else [])

    @property
    def interval(self) -> Interval:
        """Of the mean difference, by Student's t over data seeds.

        That of a mixed model with data seeds at random and classifier seeds within them, since each
        data seed has as many: what classifier seeds add is in the spread of the data seeds' means.
        """
        return mean_interval(self.differences)

    def mean(self, name: str) -> float:
        """Of a column, over the rows that have it."""
        values = [float(getattr(row, name)) for row in self.rows]
        known = [value for value in values if not math.isnan(value)]
        return fmean(known) if known else math.nan


def way_of(
    arm: str,
    results: Results,
    metric: str,
    seeds: Iterable[int],
    ends: tuple[str, str] = (FLOOR, CEILING),
) -> Interval:
    """Percent of the way from one end to the other that an arm goes, with Fieller's interval.

    Over the data seeds that all three have, whole; NaN where there is none.
    """
    shared = _shared(results, arm, ends, seeds)
    if not shared:
        return NONE
    own, floor, ceiling = _means(shared, metric)
    way = ratio_interval(paired(own, floor), paired(ceiling, floor))
    return Interval(*(100 * end for end in way))


def _shared(
    results: Results, arm: str, others: Sequence[str], seeds: Iterable[int]
) -> list[list[list[Row]]]:
    """For each data seed that an arm and all others have whole, the rows of each, in one order.

    Whole is one with as many classifier seeds as the arm has under any, and the others have them
    too.
    """
    own = results.get(arm, {})
    most = max(map(len, own.values()), default=0)
    shared = []
    for seed in seeds:
        numbers = sorted(own.get(seed, {}))
        all_rows = [results.get(one, {}).get(seed, {}) for one in (arm, *others)]
        if numbers and len(numbers) == most and all(rows.keys() >= {*numbers} for rows in all_rows):
            shared.append([[rows[number] for number in numbers] for rows in all_rows])
    return shared


def _means(shared: Sequence[Sequence[Sequence[Row]]], metric: str) -> list[list[float]]:
    """Of the arm and of each other, the mean under each data seed."""
    means = [[fmean(getattr(row, metric) for row in rows) for rows in one] for one in shared]
    return [list(one) for one in zip(*means, strict=True)]


def page(rows: Sequence[Row], about: Mapping[str, str], code: Mapping[str, str]) -> str:
    """The tables; `about` and `code` are what each arm that there is changes, and its code."""
    results = by_arm(rows)
    parts = [
        "# Arms against BOB, on the miniature",
        "Written by `python -m bench.arms --page` from `bench/results/arms.csv`. BOB is `bob`, as "
        f"the first of these arms were measured; *tuned* is `{TUNED}`, the best of 13 points on "
        "validation of data seeds 0 to 4, so there it flatters itself. Arms that are told its "
        "settings stand against it too.",
        "Differences are paired by data seed and classifier seed; intervals (95 %) are Student's t "
        "over data seeds, each the mean of its classifier seeds. *Visible* is the smallest true "
        "difference that one such test, at 5 % and not corrected, would show with 80 % power. "
        f"*Way* is how much of the way from `{FLOOR}` to `{CEILING}` an arm goes, in percent, and "
        f"*at their best* that from `{BEST_FLOOR}` to `{BEST_CEILING}`; intervals by Fieller's "
        "theorem. *Leakage* is that of background and pose, as a judge sees them that true "
        "pictures have taught. *Evaluations* are those of the UNet for all images that an arm "
        "makes, in thousands.",
        "What varies between data seeds are the shots and which contexts each class is tied to. "
        "The 576 test photos, the 288 of validation, the noise of each image and the place in the "
        "bank of its context are the same under all of them, so no interval covers these.",
        "## Tuning, on validation",
        f"Data seeds {TUNING[0]} to {TUNING[-1]}, where they have all classifier seeds. Test is "
        "not measured there. Nothing is corrected for how many arms there are.",
        _table([arm for arm in results if set(results[arm]) & set(TUNING)], results, about),
    ]
    judged = {arm: seeds for arm, seeds in results.items() if is_judged(seeds)}
    if BOB in judged and len(judged) > 1:
        parts += [
            "## Verdicts, on test",
            f"Data seeds {VERDICT[0]} to {VERDICT[-1]}, which nothing was tuned on; each arm once. "
            "p-values (Student's t) are corrected by Holm's method for the number of arms in their "
            "column.",
            _table(list(judged), judged, about, verdict=True),
        ]
    other = [row for row in rows if row.arm in code and row.code != code[row.arm]]
    if other:
        arms = len({row.arm for row in other})
        parts.append(
            f"**{len(other)} of {len(rows)} rows, of {arms} arms, were measured with other code "
            "than now**; `--again` measures those of the tuning anew."
        )
    return "\n\n".join(parts) + "\n"


def _table(
    arms: Sequence[str], results: Results, about: Mapping[str, str], verdict: bool = False
) -> str:
    metric, seeds = ("test_top1", VERDICT) if verdict else ("val_top1", TUNING)

    def against(other: str, which: Iterable[str]) -> dict[str, Comparison]:
        found = (Comparison.of(arm, other, results, metric, seeds) for arm in which)
        return {one.arm: one for one in found if one.differences}

    from_bob = against(BOB, arms)
    references = (from_bob, against(TUNED, filter(_is_of_recipe, arms)))
    corrected = [_corrected(compared) if verdict else None for compared in references]
    header = ["arm", "top-1"]
    for name in ("BOB", "tuned"):
        header += [f"{MINUS} {name}", "95 % interval", "n", "visible"]
        header += ["p, Holm"] if verdict else []
    header += [
        "way",
        "at their best",
        "leakage",
        "wrong",
        "dropped: wrong, unfamiliar",
        "images",
        "evaluations",
        "",
    ]
    lines = [header, ["---"] * len(header)]
    for arm, one in sorted(from_bob.items(), key=lambda pair: -fmean(pair[1].differences)):
        cells = [f"`{arm}`", _figure(one.mean(metric))]
        for compared, p_values in zip(references, corrected, strict=True):
            cells += _difference(compared.get(arm), p_values)
        for ends in ((FLOOR, CEILING), (BEST_FLOOR, BEST_CEILING)):
            way = NONE if arm in ends else way_of(arm, results, metric, seeds, ends)
            cells.append(_way(way))
        cells += [
            _both(one.mean("true_leakage_background"), one.mean("true_leakage_pose"), 3),
            _figure(one.mean("wrong"), 1),
            _both(one.mean("wrong_dropped"), one.mean("unfamiliar_dropped"), 1),
            _figure(one.mean("images"), 0),
            _figure(one.mean("evaluations") / 1000, 1),
            about.get(arm, ""),
        ]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _is_of_recipe(arm: str) -> bool:
    """Whether an arm has the tuned settings, as far as they act on it."""
    base, _, told = arm.partition(":")
    if base == FLOOR:  # which has no synthetic image
        return True
    acting = {one for one in RECIPE if base != CEILING or one.startswith("classify.")}
    return acting <= set(told.split(","))


def _corrected(compared: Mapping[str, Comparison]) -> dict[str, float]:
    """The p-value of each, by Holm's method."""
    tests = [one for one in compared.values() if one.arm != one.other]
    corrected = holm([p_value(one.differences) for one in tests])
    return dict(zip((one.arm for one in tests), corrected, strict=True))


def _difference(one: Comparison | None, p_values: Mapping[str, float] | None) -> list[str]:
    """The cells of an arm against another; dashes where there is no other."""
    if one is None or one.arm == one.other:
        return [DASH] * (4 if p_values is None else 5)
    cells = [
        _figure(one.interval.mean, sign=True),
        _ends(one.interval, 2, sign=True),
        str(len(one.differences)),
        _figure(smallest_visible(one.differences)),
    ]
    if p_values is None:
        return cells
    return [*cells, p_text(p_values[one.arm])]


def _way(way: Interval) -> str:
    return DASH if math.isnan(way.mean) else f"{_figure(way.mean, 0)} ({_ends(way, 0)})"


def _figure(value: float, places: int = 2, sign: bool = False) -> str:
    if math.isnan(value):
        return DASH
    return f"{value:{'+' if sign else ''}.{places}f}".replace("-", MINUS)


def _ends(interval: Interval, places: int, sign: bool = False) -> str:
    if math.isnan(interval.low):
        return DASH
    return f"{_figure(interval.low, places, sign)} to {_figure(interval.high, places, sign)}"


def _both(one: float, other: float, places: int) -> str:
    return DASH if math.isnan(one) else f"{_figure(one, places)}, {_figure(other, places)}"


def write_page(text: str, path: Path = PAGE) -> None:
    """Write the page in one step."""
    with replacing_file(path) as draft:
        draft.write_text(text, encoding="utf-8")
