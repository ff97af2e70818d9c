"""What `bench.arms` has measured: the rows, the rule of seeds, and the page."""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from bob.commands.study.statistics import (
    Interval,
    holm,
    p_value,
    paired,
    ratio_interval,
    smallest_visible,
    two_level_interval,
)
from bob.errors import BobError
from bob.formats.files import locked, replacing_file, write_csv

RESULTS = Path("bench/results/arms.csv")
PAGE = Path("bench/results/arms.md")
TUNING = range(10)
"""Data seeds for tuning: there test is not measured, so that nothing can be chosen by it."""
STUDY = range(11, 16)
VERDICT = range(21, 31)
"""Data seeds that nothing was tuned on; on all of them, an arm is judged once."""
JUDGED_BY = range(3)
"""The classifier seeds of a verdict."""
BOB = "bob"
TUNED = "bob:classify.real_weight=0.1,generate.guidance_scale=2.0"
"""What tuning has found; arms that are told its settings are to be seen against it."""
FLOOR, CEILING = "real", "drawn"
DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Row:
    """One classifier of an arm; what does not apply is NaN."""

    arm: str
    data_seed: int
    classifier_seed: int
    code: str
    """Of the arm."""
    val_top1: float
    """Percent, of the epoch that was kept."""
    test_top1: float
    images: int
    """Synthetic ones that are trained on."""
    evaluations: int
    """How often the UNet is asked for all images that the arm has made, dropped ones too."""
    seconds: float
    """That it took here; little where the item cache had what was wanted."""
    leakage_background: float = math.nan
    """How much the background that the captioner sees tells of the label."""
    leakage_pose: float = math.nan
    true_leakage_background: float = math.nan
    """The same by a judge of contexts that is in no part of the method."""
    true_leakage_pose: float = math.nan
    wrong: float = math.nan
    """Percent of the images left that show another class, by the judge that knows the truth."""
    wrong_dropped: float = math.nan
    """The same of the images dropped."""
    unfamiliar_dropped: float = math.nan
    """Percent of the dropped whose prompt has a background that no shot of the class has."""


COLUMNS = [field.name for field in fields(Row)]
Results = Mapping[str, Mapping[int, Mapping[int, Row]]]
"""Arm -> data seed -> classifier seed -> row."""


def read_rows(path: Path = RESULTS) -> list[Row]:
    """The rows, none where there is no file; raises BobError naming a line that is none."""
    if not path.exists():
        return []
    rows = []
    with path.open(encoding="utf-8", newline="") as file:
        for number, line in enumerate(csv.DictReader(file), start=2):
            try:
                # Columns with a default are younger than some files.
                known = [one for one in fields(Row) if one.name in line or one.default is MISSING]
                rows.append(Row(**{one.name: _value(one.type, line[one.name]) for one in known}))
            except (KeyError, TypeError, ValueError):
                raise BobError(
                    f"{path}, line {number} is no result of bench.arms; restore the file with git"
                ) from None
    return rows


def _value(kind: object, text: str) -> Any:
    if kind is str:
        return text
    return int(text) if kind is int else float(text or math.nan)


def add_row(row: Row, path: Path = RESULTS) -> None:
    """Add a row in one step, in place of one of the same arm and seeds."""
    with locked(path.parent):
        rows = {_key(one): one for one in (*read_rows(path), row)}
        write_csv(
            path,
            COLUMNS,
            ([_text(getattr(one, name)) for name in COLUMNS] for one in rows.values()),
        )


def _key(row: Row) -> tuple[str, int, int]:
    return row.arm, row.data_seed, row.classifier_seed


def _text(value: str | int | float) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return str(value)


def by_arm(rows: Iterable[Row]) -> dict[str, dict[int, dict[int, Row]]]:
    """The rows by arm, data seed and classifier seed."""
    results: dict[str, dict[int, dict[int, Row]]] = {}
    for row in rows:
        results.setdefault(row.arm, {}).setdefault(row.data_seed, {})[row.classifier_seed] = row
    return results


# --- the rule of seeds ---------------------------------------------------------------------------


def check_seeds(seeds: Sequence[int], allowed: range) -> None:
    """Raises BobError for a data seed that is not for tuning, or not for a verdict: `allowed`."""
    purposes = {TUNING: "for tuning", STUDY: "the study's", VERDICT: "for verdicts (--verdict)"}
    for seed in seeds:
        if seed not in allowed:
            whose = [purpose for own, purpose in purposes.items() if seed in own]
            raise BobError(
                f"data seed {seed} is {(*whose, 'for nothing')[0]}; these are "
                f"{purposes[allowed]}: {allowed[0]} to {allowed[-1]}"
            )


def check_not_judged(arms: Mapping[str, str], results: Results) -> None:
    """Raises BobError where an arm (name -> its code) is judged already, or with other code.

    A verdict that was killed goes on.
    """
    for name, code in arms.items():
        rows = [row for seed in VERDICT for row in results.get(name, {}).get(seed, {}).values()]
        if is_judged(results.get(name, {})):
            raise BobError(f"{name} is judged already, and an arm is judged once")
        if any(row.code != code for row in rows):
            raise BobError(
                f"the verdict on {name} was begun with other code; go back to it, or give what is "
                "another arm now another name"
            )


def is_judged(seeds: Mapping[int, Mapping[int, Row]]) -> bool:
    """Whether all rows of the verdict are there."""
    return all(number in seeds.get(seed, {}) for seed in VERDICT for number in JUDGED_BY)


# --- the page ------------------------------------------------------------------------------------


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
