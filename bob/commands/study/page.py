"""The page of a study: from what is committed alone, the same bytes every time."""

import math
import shutil
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from bob.commands.study.plan import (
    MEAN,
    Arm,
    Claim,
    Figure,
    Line,
    Published,
    Run,
    Study,
    common_seeds,
)
from bob.commands.study.results import Row, value
from bob.commands.study.samples import refuted
from bob.commands.study.statistics import (
    Interval,
    holm,
    mean_interval,
    p_value,
    paired,
    paired_interval,
    ratio_interval,
    smallest_visible,
)
from bob.formats.files import replacing, replacing_file

HOLDS, FAILS, OPEN, SHOWN = "holds", "does not hold", "not measured yet", "shown, not judged"
COLOURS = ("#8c8c8c", "#d9822b", "#1f6fb4", "#3a8f5c", "#9b59b6")
MINUS = "\N{MINUS SIGN}"
DASH, UNKNOWN = "\N{EN DASH}", "not known"

Results = Mapping[tuple[str, int], Row]


def write(study: Study, rows: Sequence[Row]) -> str:
    """Write the page and its plots; returns what of it answers the study's question in short.

    That is the tables beside the paper's, what was measured with other code, models or params
    than now, and what became of each claim. What is not measured yet is said to be so. Rows of
    other models or params are shown only where there are no others: the two are never compared.
    Contact sheets are kept: results have no pictures.
    """
    everything = {row.run: row for row in rows}
    runs = study.runs()
    results = _of_one_kind(runs, everything)
    tables = [Table.of(claim, results) for claim in study.claims]
    with replacing(study.plots) as folder:
        for table in tables:
            if table.seeds:
                _save(_plot(table), folder / f"{table.claim.id}.png")
        pictured = study.figure is not None and _is_measured(study.figure, results)
        if study.figure and pictured:
            _save(_picture(study.figure, results), folder / "figure.png")
        sheets = [
            sheet.file
            for sheet in study.sheets
            if sheet.setting.key(sheet.data_seed) in results and (study.plots / sheet.file).exists()
        ]
        for file in sheets:
            shutil.copyfile(study.plots / file, folder / file)
    state = _state(runs, everything, results)
    parts = [f"# {study.title}", study.about.strip(), _provenance(study, runs, results), *state]
    if pictured:
        parts.append(f"![{study.figure.title}]({study.plots.name}/figure.png)")  # type: ignore[union-attr]
    published = [_published(table, results) for table in study.tables]
    parts += [*published, _summary(tables)]
    corrected = _corrected(tables)
    parts += [_section(table, study.plots.name, sheets, corrected) for table in tables]
    with replacing_file(study.page) as draft:
        draft.write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")
    verdicts = [f"{_heading(table.claim)}: {table.verdict}" for table in tables]
    return "\n\n".join(filter(None, [*published, *state, "\n".join(verdicts)]))


@dataclass(frozen=True)
class Table:
    """A claim and what is measured of it: the values of all arms under the same data seeds."""

    claim: Claim
    wanted: list[int]
    """Data seeds that all arms are to be measured under."""
    seeds: list[int]
    """Those of them under which all arms are measured."""
    values: Mapping[str, list[float]]
    """Row label -> value under each of `seeds`."""

    @classmethod
    def of(cls, claim: Claim, results: Results) -> "Table":
        """Look up the measurements of `claim`."""
        wanted = common_seeds(arm.setting for arm in claim.arms)
        seeds, values = _values(claim.arms, results)
        return cls(claim, wanted, seeds, values)

    @property
    def complete(self) -> bool:
        """Whether every run is measured, and there are enough for an interval."""
        return self.seeds == self.wanted and len(self.seeds) > 1

    def difference(self, named: Mapping[str, str]) -> Interval:
        """Of the rows `larger` and `smaller`, paired by data seed."""
        return paired_interval(self.values[named["larger"]], self.values[named["smaller"]])

    def compared(self, named: Mapping[str, str]) -> "Compared":
        """What the rows `larger` and `smaller` show, and under which data seeds."""
        shown = {arm.label: (arm.setting.name, arm.metric) for arm in self.claim.arms}
        return shown[named["larger"]], shown[named["smaller"]], tuple(self.seeds)

    def paired(self, named: Mapping[str, str]) -> list[float]:
        """The difference under each of `seeds`."""
        return paired(self.values[named["larger"]], self.values[named["smaller"]])

    @property
    def verdict(self) -> str:
        """Whether every expectation is met by its 95 % interval."""
        claim = self.claim
        if not self.complete:
            return OPEN
        if not claim.expect and not claim.expect_zero:
            return SHOWN
        above = all(self.difference(named).low > 0 for named in claim.expect)
        return HOLDS if above and all(map(self.is_zero, claim.expect_zero)) else FAILS

    def is_zero(self, label: str) -> bool:
        """Whether a row that must be is no more than noise."""
        interval = mean_interval(self.values[label])
        return interval.low <= 0 and interval.high < self.claim.expect_zero[label]


def _of_one_kind(runs: Sequence[Run], rows: Results) -> Results:
    """The rows with the models, params and photos of now; where there is none, all.

    Where models or photos are not here, nobody can tell.
    """
    now = {
        run.key: rows[run.key]
        for run in runs
        if run.key in rows and (run.absent or rows[run.key].inputs == run.inputs)
    }
    return now or rows


def _values(arms: Sequence[Arm], results: Results) -> tuple[list[int], dict[str, list[float]]]:
    """The data seeds under which all arms are measured, and each arm's values under them."""
    seeds = [
        seed
        for seed in common_seeds(arm.setting for arm in arms)
        if all(value(arm, seed, results) is not None for arm in arms)
    ]
    return seeds, {arm.label: [value(arm, seed, results) or 0.0 for seed in seeds] for arm in arms}


# --- text ----------------------------------------------------------------------------------------


def _provenance(study: Study, runs: Sequence[Run], results: Results) -> str:
    measured = [run for run in runs if run.key in results]
    lines = [
        f"{len(measured)} of {len(runs)} runs are measured. Written by `bob study {study.path}` "
        f"from [{study.results.name}]({study.results.name}), which has every run; "
        f"[{study.path}](../{study.path}) says what is run and what is "
        f"{'claimed' if study.claims else 'compared'}.",
    ]
    if study.claims:
        lines.append(
            "Tables give means over data seeds with their 95 % confidence intervals, and "
            "differences paired by data seed with theirs (Student's t). A claim holds where the "
            "interval of every difference that it names lies above zero, on all data seeds "
            "planned. *p, Holm* is the p-value of such a difference (two-sided), corrected for the "
            "number of all of them; it decides nothing here, and says which would hold if the "
            "claims had to hold together. *Visible* is the smallest true difference that as many "
            "data seeds, with that spread, would show with 80 % power."
        )
    if study.tables:
        lines.append(
            "Under each figure of ours stands the paper's, and the difference. "
            f"{DASH} means that a run is missing, *{UNKNOWN}* that we know no figure of the "
            "paper's. Where there are several data seeds, ours is the mean with half the width of "
            "its 95 % confidence interval."
        )
    if any(setting.swept for setting in study.settings.values()):
        lines.append(
            "Of a sweep, each data seed's run best on validation is reported, on test; real only "
            "and real plus synthetic are chosen apart."
        )
    return "\n\n".join(lines)


def _state(runs: Sequence[Run], everything: Results, results: Results) -> list[str]:
    """What of the rows was measured with other code, models or params, and what confirms it.

    `results` are those of `everything` that the page shows.
    """
    measured = [run for run in runs if run.key in everything]
    same = [run for run in measured if everything[run.key].inputs == run.inputs]
    now = [results[run.key] for run in same if results[run.key].code == run.code]
    confirmed = [
        row
        for run in same
        for row in [results[run.key]]
        if row.code != run.code and row.confirmed == run.code
    ]
    lines = [_confirmation(now, confirmed)] if confirmed else []
    if count := len(same) - len(now) - len(confirmed):
        found = "; ".join(
            f"{row.setting}, data seed {row.run[1]}: {row.differs}"
            for row in refuted(runs, results).values()
        )
        how = f"them, since one came out otherwise ({found})" if found else "a sample of them"
        lines.append(
            f"**{count} of these runs were measured with other code than the project has now** and "
            f"are not confirmed for it; `--again` repeats {how}."
        )
    if count := len(measured) - len(same):
        shown = any(run.key in results for run in measured if run not in same)
        lines.append(
            f"**{count} of these runs were measured with other models or params than the project "
            "has now**; `--again` repeats them."
            if shown
            else f"{count} more were measured with other models or params than the project has "
            "now, and are left out here; `--again` repeats them."
        )
    return lines


def _confirmation(now: Sequence[Row], confirmed: Sequence[Row]) -> str:
    """Where the figures come from when some of them are of earlier code."""
    origins = Counter(f"commit {r.commit}" if r.commit else f"code {r.code}" for r in confirmed)
    earlier = ", ".join(f"{count} of {origin}" for origin, count in origins.items())
    samples = "; ".join(dict.fromkeys(row.confirmed_by for row in confirmed))
    return (
        f"With the code that the project has now, {len(now)} of these runs were measured. With "
        f"earlier code: {earlier}, confirmed by a sample. Its runs ({samples}) were repeated with "
        "the present code, and every figure came out the same to the last digit. They reused no "
        "caption, LoRA, image or classifier that other code had made."
    )


def _published(table: Published, results: Results) -> str:
    """A table of the paper: for each of its lines ours, the paper's and the difference."""
    columns = [*table.columns, *([MEAN] if table.mean else [])]
    rows = []
    for line in table.lines:
        ours = _measured(line, table.mean, results)
        paper = [line.published.get(column) for column in columns]
        rows += [
            [line.label, "ours", *map(_ours, ours)],
            ["", "paper", *(UNKNOWN if p is None else f"{p:.2f}" for p in paper)],
            ["", "difference", *(_gap(own, p) for own, p in zip(ours, paper, strict=True))],
        ]
    grid = _markdown([table.unit, "", *columns], rows)
    return "\n\n".join(filter(None, [f"## {table.title}", table.about.strip(), grid]))


def _measured(line: Line, mean: bool, results: Results) -> list[Interval | None]:
    """Ours in every column, the mean over complete lines last; None where a run is missing."""
    cells = [_cell(arm, results) for arm in line.arms]
    if mean:
        measured = [cell for cell in cells if cell is not None]
        complete = len(measured) == len(cells)
        cells.append([fmean(one) for one in zip(*measured, strict=True)] if complete else None)
    return [None if cell is None else mean_interval(cell) for cell in cells]


def _cell(arm: Arm, results: Results) -> list[float] | None:
    """By data seed; None where one is missing."""
    values = [value(arm, seed, results) for seed in arm.setting.seeds]
    known = [one for one in values if one is not None]
    return known if len(known) == len(values) else None


def _ours(interval: Interval | None) -> str:
    if interval is None:
        return DASH
    half = (interval.high - interval.low) / 2
    return f"{interval.mean:.2f}" + ("" if math.isnan(half) else f" ± {half:.2f}")


def _gap(ours: Interval | None, paper: float | None) -> str:
    if ours is None or paper is None:
        return DASH
    # Adding zero turns a negative zero into zero.
    return f"{round(round(ours.mean, 2) - paper, 2) + 0.0:+.2f}".replace("-", MINUS)


def _summary(tables: Sequence[Table]) -> str:
    if not tables:
        return ""
    rows = [
        [f"[{table.claim.id}](#{_anchor(table.claim)})", table.claim.title, f"**{table.verdict}**"]
        for table in tables
    ]
    return _markdown(["", "claim", ""], rows)


Measure = tuple[str, str]
"""A setting's name and a metric: what a row shows, whatever its label is."""
Compared = tuple[Measure, Measure, tuple[int, ...]]
"""The larger and the smaller of a difference, and the data seeds."""
Corrected = Mapping[Compared, float]
"""An expected difference -> its p-value after Holm's correction."""


def _corrected(tables: Sequence[Table]) -> Corrected:
    """For all differences that decide a claim and are measured: one family of tests.

    What two claims both expect is one test.
    """
    tests = {
        table.compared(named): p_value(table.paired(named))
        for table in tables
        for named in table.claim.expect
        if table.seeds
    }
    return dict(zip(tests, holm(list(tests.values())), strict=True))


def _section(table: Table, plots: str, sheets: Collection[str], corrected: Corrected) -> str:
    claim = table.claim
    parts = [f"## {_heading(claim)}", claim.about.strip()]
    if not table.seeds:
        return "\n\n".join(filter(None, [*parts, f"{OPEN.capitalize()}."]))
    n, unit = len(table.seeds), f", {claim.unit}" if claim.unit else ""
    parts.append(
        _markdown(
            [claim.x or "", f"mean{unit}", "95 % interval", "n"],
            [
                [label, _number(interval.mean), _ends(interval), str(n)]
                for label, interval in ((a, mean_interval(v)) for a, v in table.values.items())
            ],
        )
    )
    if claim.differences:
        parts.append(_differences(table, unit, corrected))
    if claim.expect_zero:
        parts.append(_zeros(table))
    if claim.share:
        of, start, end = (table.values[claim.share[key]] for key in ("of", "from", "to"))
        share = ratio_interval(*([a - b for a, b in zip(x, start, strict=True)] for x in (of, end)))
        parts.append(
            f"Share of the way from {claim.share['from']} to {claim.share['to']} that "
            f"{claim.share['of']} goes: {_number(share.mean)}, 95 % interval {_ends(share)} "
            "(Fieller's theorem)."
        )
    missing = len(table.wanted) - n
    verdict = f"**{table.verdict.capitalize()}**"
    parts.append(
        f"{verdict} ({missing} of {len(table.wanted)} data seeds missing)."
        if missing
        else f"{verdict}."
    )
    parts.append(f"![{claim.title}]({plots}/{claim.id}.png)")
    parts += [
        f"{sheet.label}, data seed {sheet.data_seed}: real on the left, generated on the right.\n\n"
        f"![Contact sheet, {sheet.label}]({plots}/{sheet.file})"
        for sheet in claim.sheets
        if sheet.file in sheets
    ]
    return "\n\n".join(filter(None, parts))


def _differences(table: Table, unit: str, corrected: Corrected) -> str:
    decisive = len(table.claim.expect)
    return _markdown(
        [f"difference{unit}", "mean", "95 % interval", "above zero", "p, Holm", "visible"],
        [
            [
                f"{named['larger']} {MINUS} {named['smaller']}",
                _number(interval.mean),
                _ends(interval),
                ("yes" if interval.low > 0 else "no") if number < decisive else "not claimed",
                p_text(corrected[table.compared(named)]) if number < decisive else DASH,
                _visible(table.paired(named)),
            ]
            for number, named in enumerate(table.claim.differences)
            for interval in [table.difference(named)]
        ],
    )


def _zeros(table: Table) -> str:
    """Which rows have to be zero, what that means, and whether they are."""
    return _markdown(
        ["has to be zero", "its interval has to reach 0 and to lie below", "does it"],
        [
            [label, _number(bound), "yes" if table.is_zero(label) else "no"]
            for label, bound in table.claim.expect_zero.items()
        ],
    )


def p_text(value: float) -> str:
    """A p-value as far as it matters on which side of 5 % it lies."""
    if math.isnan(value):
        return DASH
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _visible(differences: Sequence[float]) -> str:
    least = smallest_visible(differences)
    return DASH if math.isnan(least) else _number(least)


def _heading(claim: Claim) -> str:
    return f"{claim.id}. {claim.title}"


def _anchor(claim: Claim) -> str:
    """As GitHub makes them: small letters, spaces to hyphens, other punctuation dropped."""
    kept = (letter for letter in _heading(claim).lower() if letter.isalnum() or letter in " -_")
    return "".join(kept).replace(" ", "-")


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns also stand below each other in a terminal."""
    lines = [[cell.replace("|", "/") for cell in line] for line in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = ([c.ljust(width) for c, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def _number(value: float) -> str:
    """Two places, below 1 three: a percentage has no more to say."""
    if math.isnan(value):
        return "unbounded"
    places = 2 if abs(value) >= 1 else 3
    return f"{round(value, places) + 0.0:.{places}f}".replace("-", MINUS)


def _ends(interval: Interval) -> str:
    if math.isnan(interval.low):
        return "none"
    return f"{_number(interval.low)} to {_number(interval.high)}"


# --- plots ---------------------------------------------------------------------------------------


def _plot(table: Table) -> Canvas:
    """Means with their intervals: a curve where the rows are numbers, else a line a row."""
    claim = table.claim
    intervals = [mean_interval(values) for values in table.values.values()]
    means, errors = _error_bars(intervals)
    if claim.x:
        canvas = Canvas(figsize=(5.5, 3.2), layout="constrained")
        axes = canvas.subplots()
        x = [float(label) for label in table.values]
        axes.errorbar(x, means, errors, marker="o", capsize=3, color=COLOURS[2])
        axes.set(xlabel=claim.x, ylabel=claim.unit, xticks=x)
    else:
        canvas = Canvas(figsize=(6.5, 0.9 + 0.38 * len(means)), layout="constrained")
        axes = canvas.subplots()
        places = range(len(means))
        axes.errorbar(means, places, xerr=errors, fmt="o", capsize=3, color=COLOURS[2])
        axes.set(xlabel=claim.unit, yticks=places, yticklabels=table.values)
        axes.invert_yaxis()
        axes.set_ylim(len(means) - 0.5, -0.5)
    _plain(axes)
    return canvas


def _is_measured(figure: Figure, results: Results) -> bool:
    return all(_values(arms, results)[0] for arms in figure.groups.values())


def _picture(figure: Figure, results: Results) -> Canvas:
    """Groups of means with their intervals, a colour for each label."""
    canvas = Canvas(figsize=(6.5, 3.4), layout="constrained")
    axes = canvas.subplots()
    labels = list(dict.fromkeys(arm.label for arms in figure.groups.values() for arm in arms))
    for number, label in enumerate(labels):
        x, intervals = [], []
        for place, arms in enumerate(figure.groups.values()):
            values = _values(arms, results)[1].get(label)
            if values:
                x.append(place + (number - (len(labels) - 1) / 2) * 0.18)
                intervals.append(mean_interval(values))
        means, errors = _error_bars(intervals)
        colour = COLOURS[number % len(COLOURS)]
        axes.errorbar(x, means, errors, fmt="o", ms=7, capsize=4, color=colour, label=label)
        for at, mean in zip(x, means, strict=True):
            axes.annotate(
                f"{mean:.1f}",
                (at, mean),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                size=8,
            )
    axes.set(
        title=figure.title,
        ylabel=figure.unit,
        xticks=range(len(figure.groups)),
        xticklabels=figure.groups,
        xlim=(-0.5, len(figure.groups) - 0.5),
    )
    axes.legend(frameon=False)
    _plain(axes)
    return canvas


def _error_bars(intervals: Sequence[Interval]) -> tuple[list[float], list[list[float]]]:
    """Means, and what lies below and above them; nothing where there is no interval."""
    means = [interval.mean for interval in intervals]
    below = [0.0 if math.isnan(i.low) else i.mean - i.low for i in intervals]
    above = [0.0 if math.isnan(i.high) else i.high - i.mean for i in intervals]
    return means, [below, above]


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    if not axes.get_xlabel():
        axes.yaxis.set_major_locator(MaxNLocator(6))


def _save(canvas: Canvas, path: Path) -> None:
    # Without the library's version in it, so that the same results are the same bytes.
    canvas.savefig(path, dpi=130, metadata={"Software": None})
