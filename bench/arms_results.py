"""What `bench.arms` has measured: the rows, and the rule of seeds."""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from bob.errors import BobError
from bob.formats.files import locked, write_csv

RESULTS = Path("bench/results/arms.csv")
TUNING = range(10)
"""Data seeds for tuning: there test is not measured, so that nothing can be chosen by it."""
STUDY = range(16, 21)
VERDICT = range(21, 31)
"""Data seeds that nothing was tuned on; on all of them, an arm is judged once."""
JUDGED_BY = range(3)
"""The classifier seeds of a verdict."""
BOB = "bob"


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
            whose = next((told for own, told in purposes.items() if seed in own), "for nothing")
            raise BobError(
                f"data seed {seed} is {whose}; these are "
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
