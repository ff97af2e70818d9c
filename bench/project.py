"""Copies of this project for a measurement, and what was made in them."""

from pathlib import Path

from bench.counted import made
from bob.cache.index import Index
from tests.dvc_project import made_log


def object_of(project: Path, oid: str) -> Path:
    """Where an object lies in a project's DVC cache."""
    return project / ".dvc/cache/files/md5" / oid[:2] / oid[2:]


def forget_items(project: Path, stage: str) -> None:
    """Take a stage's items from a project's item cache, and their objects from the DVC cache."""
    index = Index(project / ".dvc/cache/bob/items.sqlite")
    rows = [row for row in index.all() if row.stage == stage]
    for row in rows:
        object_of(project, row.oid).unlink(missing_ok=True)
    index.drop(rows)
    index.drop_started()


def batches_made(project: Path, stage: str) -> list[int]:
    """Sizes of the batches that a stage of a counted project began, since the last `clear_log`."""
    return made(made_log(project)).get(stage, [])


def clear_log(project: Path) -> None:
    made_log(project).unlink(missing_ok=True)
