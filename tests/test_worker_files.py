"""The project's files at a worker: brought once a machine, by their content."""

import fcntl
import hashlib
import os
import time
from pathlib import Path

import pytest

from bob.cache import node
from bob.cache.executors import files
from bob.cache.executors.files import PART, Brought, Source
from bob.errors import BobError


def unheard(asked):
    """A driver that must not be asked."""
    raise AssertionError(asked)


@pytest.fixture
def project(tmp_path):
    """A project's files, by their content."""
    folder = tmp_path / "project"
    contents = {"model/weights": os.urandom(PART + 100), "photos/a.jpg": b"a", "photos/b.jpg": b"b"}
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder, {Path(name): hashlib.sha256(one).hexdigest() for name, one in contents.items()}


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """The current folder is that of a worker."""
    (tmp_path / "worker").mkdir()
    monkeypatch.chdir(tmp_path / "worker")
    monkeypatch.setenv(node.FOLDER, str(tmp_path / "node"))


def test_what_the_machine_does_not_see_is_brought_once(project, worker, tmp_path):
    folder, contents = project
    asked = []

    def read(these):
        asked.append(these)
        return Source(str(folder)).read(these)

    Brought(tmp_path / "unseen", read).bring(contents)
    for path, content in contents.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == content
    assert len(asked) == 2  # a large file in parts, the small ones with its end
    Brought(tmp_path / "unseen", unheard).bring(contents)


def test_what_the_machine_sees_is_not_copied(project, worker, monkeypatch):
    monkeypatch.setattr(files, "_LARGE", PART)
    folder, contents = project
    Brought(folder, unheard).bring(contents)
    assert {path.resolve() for path in contents} == {folder / path for path in contents}
    hashed: list[str] = []

    def digest(path, content):
        hashed.append(path.name)
        return content

    monkeypatch.setattr(files, "_digest", digest)
    Brought(folder, unheard).bring(contents)
    assert hashed == ["a.jpg", "b.jpg"]  # the large one was hashed for the first


def test_a_file_that_is_another_than_was_asked_for_is_not_used(project, worker, tmp_path):
    folder, contents = project
    (folder / "photos/a.jpg").write_bytes(b"another")
    with pytest.raises(BobError, match=r"photos/a\.jpg has changed while it was in use"):
        Brought(folder, Source(str(folder)).read).bring(contents)
    assert not Path("photos/a.jpg").exists()


def test_a_file_outside_the_project_must_be_seen(project, worker, tmp_path):
    folder, _ = project
    content = hashlib.sha256(b"a").hexdigest()
    Brought(tmp_path / "unseen", unheard).bring({folder / "photos/a.jpg": content})
    with pytest.raises(BobError, match="lies outside the project"):
        Brought(folder, unheard).bring({tmp_path / "gone.jpg": content})


@pytest.fixture
def kept(worker):
    """What a machine has kept: two files that nothing has asked for in long, one young, a lock."""
    folder = node.folder("files")
    long_ago = time.time() - (files.DAYS_KEPT + 1) * 86400
    for name in ("old", "older", "young", "lock"):
        (folder / name).touch()
        if name != "young":
            os.utime(folder / name, (long_ago, long_ago))
    return folder


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_what_nothing_asks_for_is_removed_and_the_lock_never(kept):
    lock = (kept / "lock").stat().st_ino
    Brought(Path("unseen"), unheard)
    assert names(kept) == {"lock", "young"}
    assert (kept / "lock").stat().st_ino == lock


def test_a_worker_that_brings_files_is_neither_waited_for_nor_disturbed(kept):
    with (kept / "lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        Brought(Path("unseen"), unheard)
    assert names(kept) == {"lock", "old", "older", "young"}


def test_a_file_that_is_gone_when_it_is_to_be_removed_is_no_failure(kept, monkeypatch):
    iterdir = Path.iterdir

    def slow(folder):
        found = list(iterdir(folder))
        (kept / "old").unlink(missing_ok=True)
        return iter(found)

    monkeypatch.setattr(Path, "iterdir", slow)
    Brought(Path("unseen"), unheard)
    assert names(kept) == {"lock", "young"}
