"""After a change of code: which runs a sample repeats, and what that says of the others.

The runs whose rows stand for the same earlier code are a group. Where every run that the sample
repeats of a group comes out with the figures of its row, the group's other rows are confirmed for
the present code; where one does not, the group is refuted, and all of it has to be repeated. All of
this is kept in the rows, so that a study that was killed goes on with the sample it had chosen.
"""

import hashlib
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bob.commands.study.plan import Run
from bob.commands.study.results import Row
from bob.formats.params import PIPELINE

DIRTY = "-dirty"

Rows = Mapping[tuple[str, int], Row]


def groups(runs: Sequence[Run], rows: Rows) -> dict[str, list[Run]]:
    """Earlier code -> the runs whose rows stand for it, or did before a sample repeated them.

    Left out are groups in which no row is outdated, and runs whose models, params or data have
    changed: no sample speaks for them.
    """
    found: dict[str, list[Run]] = {}
    for run in runs:
        row = rows.get(run.key)
        if row and row.inputs == run.inputs:
            code = row.repeats if row.code == run.code else row.confirmed or row.code
            found.setdefault(code, []).append(run)
    return {
        code: group
        for code, group in found.items()
        if code and not all(rows[run.key].is_of(run) for run in group)
    }


def refuted(runs: Sequence[Run], rows: Rows) -> dict[str, Row]:
    """Earlier code -> a row of its group that came out otherwise when it was repeated."""
    return {
        code: rows[run.key]
        for code, group in groups(runs, rows).items()
        for run in group
        if rows[run.key].code == run.code and rows[run.key].differs
    }


def choose(runs: Sequence[Run], rows: Rows, size: int) -> list[Run]:
    """The runs to repeat: `size`, or one of each group if these are more.

    One after the other, that which adds the most to those chosen: a group of its own, then what it
    does otherwise than they, then its data seed, then its setting. Among equals a hash of run and
    code decides. The same runs are chosen again when some of them have been repeated.
    """
    group_of = {run.key: code for code, group in groups(runs, rows).items() for run in group}
    waiting = sorted((run for run in runs if run.key in group_of), key=_hash)
    chosen: list[Run] = []
    while waiting:
        reached = {group_of[run.key] for run in chosen}
        done = {way for run in chosen for way in _ways(run)}
        seeds = {run.data_seed for run in chosen}
        settings = {run.setting.name for run in chosen}
        best = max(
            waiting,
            key=lambda run: (
                group_of[run.key] not in reached,
                len(_ways(run) - done),
                run.data_seed not in seeds,
                run.setting.name not in settings,
            ),
        )
        if len(chosen) >= size and group_of[best.key] in reached:
            break
        waiting.remove(best)
        chosen.append(best)
    return chosen


def confirm(runs: Sequence[Run], rows: Rows, chosen: Sequence[Run], commit: str) -> list[Row]:
    """The rows that `chosen`, the sample, confirms for the code of `commit`.

    Those of a group are confirmed when all runs of the sample in it came out the same.
    """
    confirmed = []
    for code, group in groups(runs, rows).items():
        keys = {run.key for run in group}
        sample = [run for run in chosen if run.key in keys]
        if sample and all(_same(rows[run.key], run, code) for run in sample):
            by = ", ".join(f"{run.setting.name} {run.data_seed}" for run in sample)
            confirmed += [
                replace(
                    rows[run.key],
                    confirmed=run.code,
                    confirmed_by=f"{by} at {commit}",
                    threads=rows[sample[0].key].threads,
                )
                for run in group
                if not rows[run.key].is_of(run)
            ]
    return confirmed


def commit_of_code() -> str:
    """The git commit of bob and its pipeline, with `-dirty` where they differ from it.

    Empty outside a git repository.
    """
    commit = _git("rev-parse", "HEAD")[:10]
    if commit and _git("status", "--porcelain", "--", "bob", PIPELINE.as_posix()):
        return commit + DIRTY
    return commit


def is_changed(path: Path) -> bool:
    """Whether a file that git has is another here than in the last commit."""
    return bool(_git("diff", "--name-only", "HEAD", "--", path.as_posix()))


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def _same(row: Row, run: Run, code: str) -> bool:
    return row.code == run.code and row.repeats == code and not row.differs


def _ways(run: Run) -> set[str]:
    """What may lead a run through other code: its switches, and which numbers are its own."""
    switches = {
        f"{section}.{name}={value}"
        for section, values in run.values.items()
        for name, value in values.items()
        if isinstance(value, str | bool)
    }
    return switches | set(run.setting.overrides) | ({"drawn"} if run.setting.drawn else set())


def _hash(run: Run) -> str:
    return hashlib.sha256(repr((run.key, run.code)).encode()).hexdigest()
