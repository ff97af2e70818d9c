"""A study's runs in DVC's queue: put in, worked off, and read.

The queue and the experiments are DVC's, so `dvc queue status`, `dvc queue logs`, `dvc exp show` and
`dvc exp apply` see every run, and what runs share is taken from DVC's caches.
"""

import hashlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click
import dvc.api
import psutil
from dvc.exceptions import DvcException
from dvc.repo import Repo
from PIL import Image
from scmrepo.exceptions import SCMError

from bob.cache.items import TRIALS
from bob.commands.study.plan import TARGETS, Run
from bob.errors import BobError
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

    Strict runs need `strict()` around the call, and none that is not strict among them.
    """
    left = {run.name: run for run in runs}
    _environment(jobs)
    try:
        keep(_finished(left))
        if not left:
            return []
        with Repo() as repo:
            queue = repo.experiments.celery_queue
            _bury(queue)
            _clear(queue, left)
            if any(run.strict for run in runs):
                _wait_for_lax_workers(queue)
            _fill(repo, left)
            queue.start_workers(jobs)
        return _follow(left, keep)
    except KeyboardInterrupt:
        click.echo(
            "study: the queue goes on in the background; the same command follows it again, "
            "`dvc queue stop --kill` ends it",
            err=True,
        )
        raise
    except (DvcException, SCMError) as error:
        raise BobError(" ".join(str(error).split())) from None


def _environment(jobs: int) -> None:
    """For the workers, which inherit it: DVC starts `dvc` and `python` from the PATH."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # With as many threads as cores in each job, the jobs would wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))


@contextmanager
def strict() -> Iterator[None]:
    """What is run meanwhile, by workers too, reuses no item that other code has made."""
    before = os.environ.get(TRIALS)
    os.environ[TRIALS] = STRICT
    try:
        yield
    finally:
        if before is None:
            del os.environ[TRIALS]
        else:
            os.environ[TRIALS] = before


def _clear(queue: Any, left: Mapping[str, Run]) -> None:
    """Take out of the queue what an earlier study left there."""
    outdated = [
        name
        for name, state in _status(queue).items()
        if name.startswith("study-")
        and (state == "Failed" or name not in left)
        and state not in ("Running", "Success")
    ]
    if outdated:
        queue.remove(outdated)


def _wait_for_lax_workers(queue: Any) -> None:
    """Wait for the end of workers that would not run strict runs as such.

    A worker has the environment that it was started with. It ends when the queue is empty.
    """
    lax = [worker for worker in _workers(queue) if not _is_strict(worker)]
    if lax:
        click.echo("study: waiting for the worker of earlier runs, which ends when they have ended")
        psutil.wait_procs(lax)


def _is_strict(worker: psutil.Process) -> bool:
    try:
        return bool(worker.environ().get(TRIALS) == STRICT)
    except psutil.Error:  # it has just ended
        return False


def _fill(repo: Any, left: Mapping[str, Run]) -> None:
    """Queue what is not in the queue yet."""
    status = _status(repo.experiments.celery_queue)
    for name, run in left.items():
        if status.get(name) not in ("Queued", "Running"):
            repo.experiments.run(
                targets=list(TARGETS),
                params=[*run.setting.written, f"data.seed={run.data_seed}"],
                queue=True,
                # Else DVC might restore a stage that was run with items of other code.
                force=run.strict,
                name=name,
                message=f"Study: {run.setting.name}, data seed {run.data_seed}",
            )


def _bury(queue: Any) -> None:
    """End what stands as running although no worker is there any more: it was killed."""
    if _workers(queue):
        return
    dead = [name for name, state in _status(queue).items() if state == "Running"]
    if dead:
        queue.kill(dead, force=True)


def _workers(queue: Any) -> list[psutil.Process]:
    """The workers of this repository's queue.

    Seen by their processes: `queue.worker_status()` gives a worker one second to answer, and on a
    busy machine it takes longer.
    """
    name = f"dvc-exp-{hashlib.sha256(queue.wdir.encode()).hexdigest()[:6]}-"  # as DVC makes it
    workers = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "queue-worker" in command and any(word.startswith(name) for word in command):
            workers.append(process)
    return workers


def _follow(left: dict[str, Run], keep: Callable[[Measured], None]) -> list[str]:
    """Wait until every run is finished or has failed; the names of those that failed."""
    idle = 0
    while left and idle < IDLE_POLLS:
        time.sleep(POLL_SECONDS)
        # Opened anew: a repository that stays open does not see the references that others add.
        with Repo() as repo:
            queue = repo.experiments.celery_queue
            status, working = _status(queue), bool(_workers(queue))
        keep(_finished(left))
        if not any(status.get(name) in ("Queued", "Running") for name in left):
            break
        idle = 0 if working else idle + 1
    return list(left)


def _finished(left: dict[str, Run]) -> Measured:
    """Take the runs that are finished out of `left`, with their metrics."""
    revisions = _revisions() if left else {}
    for name in [name for name in left if name in revisions]:
        yield left[name], metrics(revisions[name])
        del left[name]


def contact_sheets(names: Iterable[str]) -> Iterator[tuple[str, Image.Image]]:
    """Those of the named experiments that were run here, with the first contact sheet of each.

    One whose sheet is no longer in DVC's cache is left out.
    """
    revisions = _revisions()
    for name in names:
        if name in revisions:
            files = dvc.api.DVCFileSystem(rev=revisions[name])
            with suppress(FileNotFoundError):
                yield name, Image.open(io.BytesIO(files.read_bytes(SHEET.as_posix())))


def _revisions() -> dict[str, str]:
    """Name -> revision of every experiment that is finished."""
    with Repo() as repo:
        return {
            name: revision
            for experiments in repo.experiments.ls(all_commits=True).values()
            for name, revision in experiments
        }


def metrics(revision: str) -> dict[str, float]:
    """All numbers in the metrics of an experiment, `section.name` -> value."""
    return {
        name: value
        for path in (ACCURACY_METRICS, SYNTHETIC_METRICS)
        for name, value in numbers(dvc.api.metrics_show(path.as_posix(), rev=revision))
    }


def numbers(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    """The numbers in nested metrics, with dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", float(value)


def _status(queue: Any) -> dict[str, str]:
    """Name -> state. Of several tasks of one name, the one that is furthest from its end counts."""
    states: dict[str, str] = {}
    for task in reversed(queue.status()):  # DVC lists running, queued, failed, done
        states[task["name"]] = task["status"]
    return states
