"""A study: the same measurements under several settings and data seeds, and a page about them.

What is measured, and what it is to show or is compared with, stands in a file that a person edits
(`experiments/<name>.yaml`). The measurements are experiments of DVC, run from its queue; what they
measured is kept in `docs/<name>-study.csv`, and the page is written from that file alone.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import click

from bob.commands.study import drawn, page, queue
from bob.commands.study.plan import Run, Study, read_study
from bob.commands.study.results import Row, read_results, write_results
from bob.errors import BobError
from bob.formats.files import replacing_file


def study(
    path: Path,
    *,
    jobs: int = 1,
    again: bool = False,
    only: Sequence[str] = (),
    page_only: bool = False,
) -> None:
    """Run what is missing of the study at `path`, `jobs` at once; write its page, print its tables.

    A run that stands in the study's CSV is not repeated, unless `again` is set and its code, models
    or params have changed since. With `only`, patterns of names, no other settings are run; with
    `page_only` nothing is.

    Raises BobError naming models or photos that runs wait for, before any is run; and, after the
    page is written, naming the runs that failed.
    """
    plan = read_study(path)
    failed: list[str] = []
    if not page_only:
        runs = plan.runs()
        failed = _run_missing(plan, runs, jobs, again, only)
        _take_contact_sheets(plan, runs)
    click.echo(f"\n{page.write(plan, read_results(plan.results))}\n")
    click.echo(f"study: {plan.page} is written")
    if failed:
        raise BobError(
            f"{len(failed)} runs failed: {', '.join(failed)}; `dvc queue logs {failed[0]}` says "
            "why, and the same command tries them again"
        )


def _run_missing(
    plan: Study, everything: Sequence[Run], jobs: int, again: bool, only: Sequence[str]
) -> list[str]:
    """Run, measure and write down what is missing; the names of the runs that failed."""
    rows = {row.run: row for row in read_results(plan.results)}
    runs = plan.part(only).runs() if only else everything
    missing = [run for run in runs if _is_missing(run, rows, again)]
    stale = sum(run.key in rows and not rows[run.key].is_of(run) for run in runs)
    click.echo(f"study: {len(runs)} runs, {len(runs) - len(missing)} measured")
    if stale and not again:
        click.echo(
            f"study: {stale} of the measured runs are of other code, models or params; "
            "--again repeats them"
        )

    absent = sorted({path for run in missing for path in run.absent})
    if absent:
        raise BobError(
            f"{', '.join(absent)}: not here; `bob fetch` brings models, `bob dataset` published "
            "photos, `dvc pull` what is tracked, and --only leaves out the settings that need them"
        )

    def keep(measured: Iterable[tuple[Run, dict[str, float]]]) -> None:
        for run, metrics in measured:
            rows[run.key] = Row.of(run, metrics)
            write_results(plan.results, _ordered(rows.values(), everything))
            left = sum(_is_missing(run, rows, again) for run in missing)
            name = run.setting.name
            click.echo(f"study: {name}, data seed {run.data_seed} measured; {left} to go")

    failed = queue.run_all([run for run in missing if not run.setting.drawn], jobs, keep)
    for run in missing:
        if run.setting.drawn:
            keep([(run, dict(queue.numbers(drawn.measure(run.values))))])
    return failed


def _take_contact_sheets(plan: Study, runs: Iterable[Run]) -> None:
    """Put the contact sheets of those `runs` that were done here beside the plots of the page."""
    if not plan.sheets:
        return
    names = {run.key: run.name for run in runs}
    files = {names[sheet.setting.key(sheet.data_seed)]: sheet.file for sheet in plan.sheets}
    plan.plots.mkdir(parents=True, exist_ok=True)
    for name, sheet in queue.contact_sheets(files):
        with replacing_file(plan.plots / files[name]) as draft:
            # As JPEG, a sixth of the size: git keeps every version.
            sheet.save(draft, "JPEG", quality=85)


def _is_missing(run: Run, rows: dict[tuple[str, int], Row], again: bool) -> bool:
    row = rows.get(run.key)
    return row is None or (again and not row.is_of(run))


def _ordered(rows: Iterable[Row], runs: Sequence[Run]) -> list[Row]:
    """In the order of the study's file; rows that are no longer in it come last."""
    place = {run.key: number for number, run in enumerate(runs)}
    return sorted(rows, key=lambda row: (place.get(row.run, len(place)), row.run))
