"""A study: the same measurements under several settings and data seeds, and a page about them.

What is measured, and what it is to show or is compared with, stands in a file that a person edits
(`experiments/<name>.yaml`). The measurements are experiments of DVC, run from its queue; what they
measured is kept in `docs/<name>-study.csv`, and the page is written from that file alone.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import click

from bob.commands.study import drawn, page, queue, samples
from bob.commands.study.plan import Run, Study, read_study
from bob.commands.study.results import Row, read_results, write_results
from bob.errors import BobError
from bob.formats.files import replacing_file
from bob.formats.params import PARAMS, PIPELINE


def study(
    path: Path,
    *,
    jobs: int = 1,
    again: bool = False,
    sample: int = 5,
    only: Sequence[str] = (),
    page_only: bool = False,
) -> None:
    """Run what is missing of the study at `path`, `jobs` at once; write its page, print its tables.

    A run that stands in the study's CSV is not repeated, unless `again` is set and its code, models
    or params have changed since. Where only the code has, `sample` of these runs are repeated, and
    the others if one of them comes out otherwise; with 0 all are. With `only`, patterns of names,
    no other settings are run; with `page_only` nothing is.

    Raises BobError naming models or photos that runs wait for, before any is run, and where a
    sample is to be repeated with code that is not committed; and, after the page is written, naming
    the runs that failed.
    """
    plan = read_study(path)
    failed: list[str] = []
    if not page_only:
        runs = plan.runs()
        part = plan.part(only).runs() if only else runs
        failed = _Campaign(plan, runs, jobs).run(part, again, sample)
    click.echo(f"\n{page.write(plan, read_results(plan.results))}\n")
    click.echo(f"study: {plan.page} is written")
    if failed:
        raise BobError(
            f"{len(failed)} runs failed: {', '.join(failed)}; `dvc queue logs {failed[0]}` says "
            "why, and the same command tries them again"
        )


class _Campaign:
    """The rows of a study while it is run; each is written down when it is measured."""

    def __init__(self, plan: Study, everything: Sequence[Run], jobs: int) -> None:
        self._plan, self._everything, self._jobs = plan, everything, jobs
        self._rows = {row.run: row for row in read_results(plan.results)}
        self._commit = samples.commit_of_code()
        self._threads = queue.threads(jobs)

    def run(self, runs: Sequence[Run], again: bool, size: int) -> list[str]:
        """Run those of `runs` that are to be run; the names of those that failed."""
        rows = self._rows
        missing = [run for run in runs if run.key not in rows]
        outdated = [run for run in runs if run.key in rows and not rows[run.key].is_of(run)]
        click.echo(f"study: {len(runs)} runs, {len(runs) - len(missing)} measured")
        if outdated and not again:
            click.echo(
                f"study: {len(outdated)} of the measured runs are of other code, models or params; "
                "--again repeats them, or a sample where only the code is other"
            )
        # In the file's order, so that what a claim compares is measured side by side.
        wanted = [
            run for run in runs if run.key not in rows or (again and not rows[run.key].is_of(run))
        ]
        absent = sorted({path for run in wanted for path in run.absent})
        if absent:
            raise BobError(
                f"{', '.join(absent)}: not here; `bob fetch` brings models, `bob dataset` "
                "published photos, `dvc pull` what is tracked, and --only leaves out the settings "
                "that need them"
            )
        if wanted:
            self._check_params()
            if missing and not again:
                held = [rows[run.key] for run in runs if run.key in rows]
                self._check_threads(held, "the runs measured up to now")
        if not again or size == 0:
            return self._measure(wanted)
        failed = self._repeat_sample(runs, size)
        return failed + self._measure(
            [
                run
                for run in wanted
                if run.key not in rows
                or rows[run.key].inputs != run.inputs  # no sample tells of it
            ]
        )

    def _check_params(self) -> None:
        """Raises BobError where `params.yaml` is not what git has."""
        if samples.is_changed(PARAMS):
            raise BobError(
                f"{PARAMS} has changes that are not committed; commit them, or restore the file: a "
                "study that was killed while it filled the queue can leave it as one of its runs "
                "wanted it (`git stash list` then has what else was not committed)"
            )

    def _check_threads(self, rows: Iterable[Row], what: str) -> None:
        """Raises BobError where these had another number of threads each than runs have now."""
        others = {row.threads for row in rows} - {"", self._threads}
        if others:
            raise BobError(
                f"{what} had {' or '.join(sorted(others))} threads each and would have "
                f"{self._threads} now, which changes the last digits; set OMP_NUM_THREADS or "
                "--jobs as they were, or repeat all runs with --again --sample 0"
            )

    def _repeat_sample(self, runs: Sequence[Run], size: int) -> list[str]:
        """Repeat a sample of the runs of other code, and where it differs the others too."""
        rows = self._rows
        chosen = samples.choose(runs, rows, size)
        if chosen and (not self._commit or self._commit.endswith(samples.DIRTY)):
            raise BobError(
                f"bob/ or {PIPELINE} has changes that are not committed, and a sample confirms "
                "runs for a commit; commit them, or repeat all runs with --sample 0"
            )
        self._check_threads((rows[run.key] for run in chosen), "the runs to repeat")
        failed = self._measure_strictly(chosen, in_sample=True)
        confirmed = samples.confirm(runs, rows, chosen, self._commit)
        if confirmed:
            self._keep(*confirmed)
            click.echo(
                "study: the sample came out the same to the last digit, which confirms other "
                f"runs: {len(confirmed)}"
            )
        for code, row in samples.refuted(runs, rows).items():
            click.echo(
                f"study: {row.setting}, data seed {row.run[1]}: {row.differs}; all runs of that "
                "earlier code are repeated"
            )
            failed += self._measure_strictly(samples.groups(runs, rows)[code])
        return failed

    def _measure_strictly(self, runs: Iterable[Run], in_sample: bool = False) -> list[str]:
        """Run those of `runs` whose rows do not hold, reusing nothing that other code has made."""
        outdated = [run for run in runs if not self._rows[run.key].is_of(run)]
        with queue.strict():
            return self._measure([replace(run, strict=True) for run in outdated], in_sample)

    def _measure(self, runs: Sequence[Run], in_sample: bool = False) -> list[str]:
        """Run all of `runs`; the names of those that failed."""
        left = {run.key for run in runs}

        def keep(measured: Iterable[tuple[Run, dict[str, float]]]) -> None:
            for run, metrics in measured:
                self._take_contact_sheet(run)
                row = Row.of(run, metrics, self._commit, self._threads)
                self._keep(row.repeating(self._rows[run.key]) if in_sample else row)
                left.remove(run.key)
                name = run.setting.name
                click.echo(f"study: {name}, data seed {run.data_seed} measured; {len(left)} to go")

        with queue.environment(self._jobs):
            # First what runs here, from the code and the models as they are now.
            for run in runs:
                if run.setting.drawn:
                    keep([(run, dict(queue.numbers(drawn.measure(run.values))))])
            return queue.run_all([run for run in runs if not run.setting.drawn], self._jobs, keep)

    def _take_contact_sheet(self, run: Run) -> None:
        """Put the contact sheet of a run that was done here beside the plots, if the page wants it.

        As JPEG, a sixth of the size: git keeps every version.
        """
        files = [one.file for one in self._plan.sheets if one.setting.key(one.data_seed) == run.key]
        if files and (sheet := queue.contact_sheet(run.name)):
            self._plan.plots.mkdir(parents=True, exist_ok=True)
            for file in files:
                with replacing_file(self._plan.plots / file) as draft:
                    sheet.save(draft, "JPEG", quality=85)

    def _keep(self, *rows: Row) -> None:
        """Take the rows in, in the place of those of the same runs, and write all down."""
        self._rows |= {row.run: row for row in rows}
        write_results(self._plan.results, _ordered(self._rows.values(), self._everything))


def _ordered(rows: Iterable[Row], runs: Sequence[Run]) -> list[Row]:
    """In the order of the study's file; rows that are no longer in it come last."""
    place = {run.key: number for number, run in enumerate(runs)}
    return sorted(rows, key=lambda row: (place.get(row.run, len(place)), row.run))
