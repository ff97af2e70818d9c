"""A study's runs in DVC's queue: put in, worked off, and read.

The queue and the experiments are DVC's, so `dvc queue status`, `dvc queue logs`, `dvc exp show` and
`dvc exp apply` see every run, and what runs share is taken from DVC's caches.
"""

import io
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import click
import psutil
from PIL import Image

from bob.cache.items import TRIALS
from bob.commands.study.plan import TARGETS, Run
from bob.dvc import experiments
from bob.dvc.experiments import FAILED, QUEUED, RUNNING, SUCCESS, Queue
from bob.formats.layout import ACCURACY_METRICS, AUDIT, SYNTHETIC_METRICS

SHEET = AUDIT / "contact_sheets/01.png"
POLL_SECONDS = 5
STRICT = "strict"
IDLE_POLLS = 6  # polls without any worker after which none will come; one takes seconds to start

Measured = Iterator[tuple[Run, dict[str, float]]]


def run_all(runs: Sequence[Run], jobs: int, keep: Callable[[Measured], None]) -> list[str]:
    """Run the experiments in the queue, `jobs` at once; hands each to `keep` when it is finished.

    Goes on where it was killed: an experiment that finished meanwhile is not run again, one that
    waits in the queue or is being run is not queued twice. Returns the names of those that failed.

    Needs `environment()` around the call. Strict runs need `strict()` too, and none that is not
    strict among them.
    """
    left = {run.name: run for run in runs}
    try:
        keep(_finished(left))
        if not left:
            return []
        with Queue() as queue:
            _bury(queue)
            _clear(queue, left)
            if any(run.strict for run in runs):
                _wait_for_lax_workers(queue)
            _fill(queue, left)
            queue.start_workers(jobs)
        return _follow(left, keep)
    except KeyboardInterrupt:
        click.echo(
            "study: the queue goes on in the background; the same command follows it again, "
            "`dvc queue stop --kill` ends it",
            err=True,
        )
        raise


def environment(jobs: int) -> AbstractContextManager[None]:
    """Of what is run meanwhile, by workers too: DVC starts `dvc` and `python` from the PATH."""
    return _environment(
        PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        OMP_NUM_THREADS=threads(jobs),
    )


def threads(jobs: int) -> str:
    """How many each of `jobs` runs has: OMP_NUM_THREADS, or else an equal share of the cores.

    With as many threads as cores in each, they would wait for each other.
    """
    return os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // jobs))


def strict() -> AbstractContextManager[None]:
    """What is run meanwhile, by workers too, reuses no item that other code has made."""
    return _environment(**{TRIALS: STRICT})


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _clear(queue: Queue, left: Mapping[str, Run]) -> None:
    """Take out of the queue what an earlier study left there."""
    outdated = [
        name
        for name, state in queue.states().items()
        if name.startswith("study-")
        and (state == FAILED or name not in left)
        and state not in (RUNNING, SUCCESS)
    ]
    if outdated:
        queue.remove(outdated)


def _wait_for_lax_workers(queue: Queue) -> None:
    """Wait for the end of workers that would not run strict runs as such.

    A worker has the environment that it was started with. It ends when the queue is empty.
    """
    lax = [worker for worker in queue.workers() if not _is_strict(worker)]
    if lax:
        click.echo("study: waiting for the worker of earlier runs, which ends when they have ended")
        psutil.wait_procs(lax)


def _is_strict(worker: psutil.Process) -> bool:
    try:
        return bool(worker.environ().get(TRIALS) == STRICT)
    except psutil.Error:  # it has just ended
        return False


def _fill(queue: Queue, left: Mapping[str, Run]) -> None:
    """Queue what is not in the queue yet."""
    states = queue.states()
    for name, run in left.items():
        if states.get(name) not in (QUEUED, RUNNING):
            queue.put(
                name,
                targets=TARGETS,
                params=[*run.setting.written, f"data.seed={run.data_seed}"],
                message=f"Study: {run.setting.name}, data seed {run.data_seed}",
                # Else DVC might restore a stage that was run with items of other code.
                force=run.strict,
            )


def _bury(queue: Queue) -> None:
    """End what stands as running although no worker is there any more: it was killed."""
    if queue.workers():
        return
    dead = [name for name, state in queue.states().items() if state == RUNNING]
    if dead:
        queue.kill(dead)


def _follow(left: dict[str, Run], keep: Callable[[Measured], None]) -> list[str]:
    """Wait until every run is finished or has failed; the names of those that failed."""
    idle = 0
    while left and idle < IDLE_POLLS:
        time.sleep(POLL_SECONDS)
        # Opened anew: a repository that stays open does not see the references that others add.
        with Queue() as queue:
            states, working = queue.states(), bool(queue.workers())
        keep(_finished(left))
        if not any(states.get(name) in (QUEUED, RUNNING) for name in left):
            break
        idle = 0 if working else idle + 1
    return list(left)


def _finished(left: dict[str, Run]) -> Measured:
    """Take the runs that are finished out of `left`, with their metrics."""
    revisions = experiments.finished() if left else {}
    for name in [name for name in left if name in revisions]:
        yield left[name], metrics(revisions[name])
        del left[name]


def contact_sheet(name: str) -> Image.Image | None:
    """The first contact sheet of an experiment that was run here.

    None where the sheet is no longer in DVC's cache.
    """
    with suppress(FileNotFoundError):
        sheet = io.BytesIO(experiments.read_bytes(SHEET, experiments.finished()[name]))
        return Image.open(sheet, formats=["PNG"])
    return None


def metrics(revision: str) -> dict[str, float]:
    """All numbers in the metrics of an experiment, `section.name` -> value."""
    return {
        name: value
        for path in (ACCURACY_METRICS, SYNTHETIC_METRICS)
        for name, value in numbers(experiments.metrics(path, revision))
    }


def numbers(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    """The numbers in nested metrics, with dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", float(value)
