"""Copies of this project for a measurement, and what was made in them."""

from collections.abc import Sequence
from pathlib import Path

from bench.counted import made
from bob.cache.index import Index, Row
from tests.dvc_project import made_log


def object_of(project: Path, oid: str) -> Path:
    """Where an object lies in a project's DVC cache."""
    return project / ".dvc/cache/files/md5" / oid[:2] / oid[2:]


def forget_items(project: Path, stage: str) -> None:
    """Take a stage's items from a project's item cache, and their objects from the DVC cache."""
    forget(project, [row for row in index_of(project).all() if row.stage == stage])


def index_of(project: Path) -> Index:
    """The index of a project's item cache."""
    return Index(project / ".dvc/cache/bob/items.sqlite")


def forget(project: Path, rows: Sequence[Row]) -> None:
    """Take these items from a project's item cache, and their objects from the DVC cache."""
    index = index_of(project)
    index.drop(rows)
    for oid in {row.oid for row in rows} - {row.oid for row in index.all()}:
        object_of(project, oid).unlink(missing_ok=True)


def batches_made(project: Path, stage: str) -> list[int]:
    """Sizes of the batches that a stage of a counted project began, since the last `clear_log`."""
    return made(made_log(project)).get(stage, [])


def clear_log(project: Path) -> None:
    made_log(project).unlink(missing_ok=True)
