"""What the rows of `bench.arms` say: arms compared, and the page."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
from scipy import stats

from bench.arms_results import BOB, TUNING, VERDICT, Results, Row, by_arm, is_judged
from bob.commands.study.statistics import (
    CONFIDENCE,
    Interval,
    holm,
    p_value,
    paired,
    ratio_interval,
    smallest_visible,
)
from bob.formats.files import replacing_file

PAGE = Path("bench/results/arms.md")
TUNED = "bob:classify.real_weight=0.1,generate.guidance_scale=2.0"
"""What tuning has found; arms that are told its settings are to be seen against it."""
FLOOR, CEILING = "real", "drawn"
DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
RESAMPLES = 20_000


@dataclass(frozen=True)
class Comparison:
    """An arm against another, on the seeds that both have."""

    arm: str
    other: str
    rows: Sequence[Row]
    differences: Sequence[Sequence[float]]
    """A list for each data seed, of the classifier seeds' differences."""

    @classmethod
    def of(
        cls, arm: str, other: str, results: Results, metric: str, seeds: Iterable[int]
    ) -> "Comparison":
        """By a metric, on some data seeds."""
        own, others = results[arm], results.get(other, {})
        rows, differences = [], []
        for seed in seeds:
            pairs = [
                (row, others[seed][number])
                for number, row in own.get(seed, {}).items()
                if number in others.get(seed, {})
            ]
            rows += [row for row, _ in pairs]
            if pairs:
                differences.append([getattr(a, metric) - getattr(b, metric) for a, b in pairs])
        return cls(arm, other, rows, differences)

    @property
    def interval(self) -> Interval:
        """Of the mean difference, by the bootstrap on two levels; NaN without a pair."""
        if not self.differences:
            return Interval(math.nan, math.nan, math.nan)
        return two_level_interval(self.differences)

    @property
    def means(self) -> list[float]:
        """The difference under each data seed."""
        return [fmean(one) for one in self.differences]

    def mean(self, name: str) -> float:
        """Of a column, over the rows that have it."""
        values = [float(getattr(row, name)) for row in self.rows]
        known = [value for value in values if not math.isnan(value)]
        return fmean(known) if known else math.nan


def way_of(arm: str, results: Results, metric: str, seeds: Iterable[int]) -> Interval:
    """Percent of the way from real only to the ceiling that an arm goes, with Fieller's interval.

    Over the data seeds that all three have; NaN where there is none.
    """
    three = [results.get(one, {}) for one in (arm, FLOOR, CEILING)]
    own, floor, ceiling = (
        [
            fmean(getattr(row, metric) for row in one[seed].values())
            for seed in seeds
            if all(seed in other for other in three)
        ]
        for one in three
    )
    if not own:
        return Interval(math.nan, math.nan, math.nan)
    way = ratio_interval(paired(own, floor), paired(ceiling, floor))
    return Interval(*(100 * end for end in way))


def two_level_interval(differences: Sequence[Sequence[float]], seed: int = 0) -> Interval:
    """The mean of `differences` and its interval by a bootstrap on two levels.

    A list for each data seed, of the difference under each of its classifier seeds; the mean is
    that of the data seeds' means. Data seeds are drawn with replacement, and within each that is
    drawn its classifier seeds. The ends are percentiles of the means, expanded (Hesterberg 2015,
    arXiv 1411.5279, section 4.3): so few data seeds make percentiles too narrow, by about
    sqrt((n - 1) / n) * z / t, and other percentiles are taken that make up for it.
    """
    mean = float(np.mean([np.mean(one) for one in differences]))
    count = len(differences)
    if count < 2:
        return Interval(mean, math.nan, math.nan)
    random = np.random.default_rng(seed)
    # Of every data seed as many resampled means as it is drawn with all resamples.
    means = np.stack(
        [
            np.asarray(one)[random.integers(len(one), size=(RESAMPLES, count, len(one)))].mean(2)
            for one in differences
        ]
    )
    drawn = random.integers(count, size=(RESAMPLES, count))
    resampled = np.take_along_axis(means, drawn[None], axis=0)[0].mean(1)
    t = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)
    tail = stats.norm.cdf(-math.sqrt(count / (count - 1)) * t)
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Interval(mean, float(low), float(high))


def page(rows: Sequence[Row], about: Mapping[str, str], code: Mapping[str, str]) -> str:
    """The tables; `about` and `code` are what each arm that there is changes, and its code."""
    results = by_arm(rows)
    parts = [
        "# Arms against BOB, on the miniature",
        "Written by `python -m bench.arms --page` from `bench/results/arms.csv`. BOB is `bob`, as "
        f"the first of these arms were measured; *tuned* is `{TUNED}`, which the tuning has found. "
        "Differences are paired by data seed and classifier seed, with a 95 % interval by a "
        "bootstrap over both (data seeds, and classifier seeds within them). *Visible* is the "
        "smallest true difference that as many data seeds would show with 80 % power. *Way* is how "
        f"much of the way from `{FLOOR}` to `{CEILING}` an arm goes, in percent, with an interval "
        "by Fieller's theorem over data seeds. Evaluations are those of the UNet for all images "
        "that an arm makes, in thousands.",
        "## Tuning, on validation",
        f"Data seeds {TUNING[0]} to {TUNING[-1]}. Test is not measured there.",
        _table([arm for arm in results if set(results[arm]) & set(TUNING)], results, about),
    ]
    judged = [arm for arm, seeds in results.items() if is_judged(seeds)]
    if BOB in judged and len(judged) > 1:
        parts += [
            "## Verdicts, on test",
            f"Data seeds {VERDICT[0]} to {VERDICT[-1]}, which nothing was tuned on; each arm once. "
            "p-values (Student's t over data seeds) are corrected by Holm's method for the number "
            "of arms in their column.",
            _table(judged, results, about, verdict=True),
        ]
    other = [row for row in rows if row.arm in code and row.code != code[row.arm]]
    if other:
        names = ", ".join(dict.fromkeys(row.arm for row in other))
        parts.append(
            f"**{len(other)} of {len(rows)} rows were measured with other code than now** "
            f"({names}); `--again` measures those of the tuning anew."
        )
    return "\n\n".join(parts) + "\n"


def _table(
    arms: Sequence[str], results: Results, about: Mapping[str, str], verdict: bool = False
) -> str:
    metric, seeds = ("test_top1", VERDICT) if verdict else ("val_top1", TUNING)

    def against(other: str) -> dict[str, Comparison]:
        return {arm: Comparison.of(arm, other, results, metric, seeds) for arm in arms}

    references = {other: against(other) for other in (BOB, TUNED)}
    corrected = {
        other: _corrected([one for arm, one in compared.items() if arm != other])
        for other, compared in references.items()
    }
    header = ["arm", "n", "top-1"]
    for name in ("BOB", "tuned"):
        header += [f"{MINUS} {name}", "95 % interval", "visible"]
        header += ["p, Holm"] if verdict else []
    header += [
        "way",
        "leakage",
        "true leakage",
        "wrong",
        "dropped: wrong, unfamiliar",
        "images",
        "evaluations",
        "s",
        "",
    ]
    lines = [header, ["---"] * len(header)]
    own = {arm: one for arm, one in references[BOB].items() if one.differences}
    for arm, one in sorted(own.items(), key=lambda pair: -pair[1].mean(metric)):
        cells = [f"`{arm}`", str(len(one.differences)), _figure(one.mean(metric))]
        for other, compared in references.items():
            cells += _difference(compared[arm], corrected[other] if verdict else None)
        way = way_of(arm, results, metric, seeds)
        cells += [
            DASH
            if arm in (FLOOR, CEILING) or math.isnan(way.mean)
            else f"{_figure(way.mean, 0)} ({_ends(way, 0)})",
            _both(one.mean("leakage_background"), one.mean("leakage_pose"), 3),
            _both(one.mean("true_leakage_background"), one.mean("true_leakage_pose"), 3),
            _figure(one.mean("wrong"), 1),
            _both(one.mean("wrong_dropped"), one.mean("unfamiliar_dropped"), 1),
            _figure(one.mean("images"), 0),
            _figure(one.mean("evaluations") / 1000, 1),
            _figure(one.mean("seconds"), 0),
            about.get(arm, ""),
        ]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _corrected(compared: Sequence[Comparison]) -> dict[str, float]:
    """The p-value of each, by Holm's method."""
    return dict(
        zip(
            (one.arm for one in compared),
            holm([p_value(one.means) for one in compared]),
            strict=True,
        )
    )


def _difference(one: Comparison, corrected: Mapping[str, float] | None) -> list[str]:
    """The cells of an arm against another; dashes for an arm against itself."""
    count = 3 if corrected is None else 4
    if one.arm == one.other:
        return [DASH] * count
    cells = [
        _figure(one.interval.mean, sign=True),
        _ends(one.interval, 2, sign=True),
        _figure(smallest_visible(one.means)),
    ]
    return cells if corrected is None else [*cells, _figure(corrected[one.arm], 3)]


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
