"""What was measured: one row a run, in a CSV that git tracks."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bob.commands.study.plan import Arm, Run
from bob.errors import BobError
from bob.formats.files import write_csv

HISTORY = ("commit", "repeats", "differs", "confirmed", "confirmed_by", "threads")
COLUMNS = ("setting", "data_seed", "overrides", "code", "inputs", *HISTORY)


@dataclass(frozen=True)
class Row:
    """The metrics of one run, and what it was a run of."""

    setting: str
    run: tuple[str, int]
    """The key of the run."""
    code: str
    inputs: str
    metrics: dict[str, float]
    commit: str = ""
    """The git commit of the code; ends in `-dirty` where something was not committed, and is empty
    where it is not known."""
    repeats: str = ""
    """The earlier code whose row this run repeated as part of a sample."""
    differs: str = ""
    """What of that row did not come out the same, in words."""
    confirmed: str = ""
    """The later code for which a sample has confirmed the row."""
    confirmed_by: str = ""
    """That sample's runs and their commit."""
    threads: str = ""
    """How many it had, since they decide the last digits; empty where that is not known."""

    @classmethod
    def of(cls, run: Run, metrics: dict[str, float], commit: str = "", threads: str = "") -> "Row":
        """What `run` measured with the code of `commit`."""
        return cls(
            run.setting.name, run.key, run.code, run.inputs, metrics, commit, threads=threads
        )

    def is_of(self, run: Run) -> bool:
        """Whether it holds for the code, models and params that `run` would have now.

        It was measured with them, or with other code and a sample has confirmed it for this.
        """
        return run.code in (self.code, self.confirmed) and self.inputs == run.inputs

    def repeating(self, earlier: "Row") -> "Row":
        """This row, marked as a repetition of what `earlier` holds."""
        names = sorted({**earlier.metrics, **self.metrics})
        pairs = [(name, earlier.metrics.get(name), self.metrics.get(name)) for name in names]
        # As text, digit by digit: a value that is not a number is the same as another.
        unequal = [pair for pair in pairs if str(pair[1]) != str(pair[2])]
        differs = ""
        if unequal:
            name, was, now = unequal[0]
            differs = f"{name} was {was}, is {now} ({len(unequal)} of {len(pairs)} figures differ)"
        return replace(self, repeats=earlier.confirmed or earlier.code, differs=differs)


def value(arm: Arm, seed: int, rows: Mapping[tuple[str, int], Row]) -> float | None:
    """What `arm` measured under a data seed; None where a run is missing.

    Of a sweep, that of the run best on validation, of several the first; test has no say. Raises
    BobError where its runs had no validation photo.
    """
    points = [rows.get(point.key(seed)) for point in arm.setting.points]
    found = [row for row in points if row is not None and arm.metric in row.metrics]
    if len(found) < len(points):
        return None
    if not arm.setting.swept or arm.chosen_by is None:
        return found[0].metrics[arm.metric]
    if any(arm.chosen_by not in row.metrics for row in found):
        raise BobError(
            f"setting {arm.setting.name} has runs without {arm.chosen_by}, so that none of its "
            "sweep can be chosen; raise data.val_per_class"
        )
    by = arm.chosen_by
    return max(found, key=lambda row: row.metrics[by]).metrics[arm.metric]


def write_results(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows in one step; a metric that a run does not have is left empty."""
    metrics = sorted({name for row in rows for name in row.metrics})
    write_csv(
        path,
        [*COLUMNS, *metrics],
        (
            [
                row.setting,
                row.run[1],
                row.run[0],
                row.code,
                row.inputs,
                *(getattr(row, name) for name in HISTORY),
                *(row.metrics.get(name, "") for name in metrics),
            ]
            for row in rows
        ),
    )


def read_results(path: Path) -> list[Row]:
    """Read the rows, none where there is no file; raises BobError naming a line that is none."""
    if not path.exists():
        return []
    rows: dict[tuple[str, int], Row] = {}
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for line in reader:
                row = Row(
                    line["setting"],
                    (line["overrides"], int(line["data_seed"])),
                    line["code"],
                    line["inputs"],
                    {
                        name: float(value)
                        for name, value in line.items()
                        if name not in COLUMNS and value != ""
                    },
                    # A file that was written before there were samples has none of these.
                    *(line.get(name, "") for name in HISTORY),
                )
                if row.run in rows:
                    raise ValueError("a run that stands there twice")
                rows[row.run] = row
        except (KeyError, TypeError, ValueError, csv.Error):
            raise BobError(
                f"{path}, line {max(reader.line_num, 2)} is no result of a study, or one that "
                "stands there twice; restore the file with git"
            ) from None
    return list(rows.values())
