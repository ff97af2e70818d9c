"""DVC's experiments: its queue, their metrics and files."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from bob.dvc.repository import OnRepository, open_repository, translated

QUEUED, RUNNING, FAILED, SUCCESS = "Queued", "Running", "Failed", "Success"


class Queue(OnRepository):
    """The queue of the repository; its methods raise BobError with DVC's words.

    A queue that stays open does not see the experiments that others finish.
    """

    def __init__(self) -> None:
        super().__init__()
        self._queue = self.repository.experiments.celery_queue

    def states(self) -> dict[str, str]:
        """Name -> QUEUED, RUNNING, FAILED or SUCCESS.

        Of several tasks of one name, the one that is furthest from its end counts.
        """
        with translated():
            tasks = self._queue.status()  # running, queued, failed, done
        return {task["name"]: task["status"] for task in reversed(tasks)}

    def put(
        self, name: str, *, targets: Sequence[str], params: Sequence[str], message: str, force: bool
    ) -> None:
        """Queue an experiment; with `force`, one for which DVC restores no stage."""
        with translated():
            self.repository.experiments.run(
                targets=list(targets),
                params=list(params),
                queue=True,
                force=force,
                name=name,
                message=message,
            )

    def remove(self, names: Sequence[str]) -> None:
        """Take tasks out that are not running."""
        with translated():
            self._queue.remove(list(names))

    def kill(self, names: Sequence[str]) -> None:
        """End running tasks at once.

        DVC keeps the number of a task's process, and would kill whatever has that number now.
        """
        with translated():
            for entry in self._queue.iter_active():
                process = self._queue.proc.get(entry.stash_rev)
                if entry.name in names and process and not _runs_experiment(process.pid):
                    process.returncode = -1  # as DVC notes of one that is gone
                    self._queue.proc[entry.stash_rev] = process
            self._queue.kill(list(names), force=True)

    def start_workers(self, count: int) -> None:
        """Start workers in the background, which work the queue off and end when it is empty."""
        with translated():
            self._queue.start_workers(count)

    def workers(self) -> list[psutil.Process]:
        """The workers of this queue.

        Seen by their processes: DVC's own question gives a worker one second to answer, and on a
        busy machine it takes longer.
        """
        wdir = self._queue.wdir
        name = f"dvc-exp-{hashlib.sha256(wdir.encode()).hexdigest()[:6]}-"  # as DVC makes it
        workers = []
        for process in psutil.process_iter(["cmdline"]):
            command = process.info["cmdline"] or []
            if "queue-worker" in command and any(word.startswith(name) for word in command):
                workers.append(process)
        return workers


def _runs_experiment(pid: int) -> bool:
    try:
        return "exec-run" in psutil.Process(pid).cmdline()
    except psutil.Error:
        return False


def finished() -> dict[str, str]:
    """Name -> revision of every experiment that is finished."""
    with translated(), open_repository() as repository:
        return {
            name: revision
            for experiments in repository.experiments.ls(all_commits=True).values()
            for name, revision in experiments
        }


def metrics(path: Path, revision: str) -> Mapping[str, Any]:
    """A file of metrics as it is in a revision."""
    import dvc.api

    with translated():
        return dvc.api.metrics_show(path.as_posix(), rev=revision)


def read_bytes(path: Path, revision: str) -> bytes:
    """A file as it is in a revision; raises FileNotFoundError where the cache has it no more."""
    import dvc.api

    with translated():
        return dvc.api.DVCFileSystem(rev=revision).read_bytes(path.as_posix())


def begin_with_same_cache(folder: Path) -> None:
    """Make `folder` a repository without git, with the cache and the remotes of the current one."""
    from dvc.repo import Repo

    with translated():
        with open_repository() as repository:
            cache, remotes = repository.cache.local_cache_dir, dict(repository.config["remote"])
        with Repo.init(str(folder), no_scm=True) as scratch, scratch.config.edit() as config:
            config["cache"]["dir"] = cache
            config["remote"] = remotes  # which items may have to be fetched from
