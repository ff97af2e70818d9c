"""`bench.faults` breaks stages at random moments, and finds what is lost."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.faults import digest, faults_of_cache
from bench.project import index_of, object_of
from bob.cache.index import Row
from tests.conftest import ROOT

NAMESPACE = ["unshare", *(["--user", "--map-root-user"] if os.geteuid() else []), "--mount"]
BROKEN_SPLIT = """
from contextlib import contextmanager
import bob.stages.split

@contextmanager
def writing(target):
    target.mkdir(parents=True, exist_ok=True)
    yield target

bob.stages.split.replacing = writing
"""


def break_split(before: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Rounds of bench.faults on `split`, in a process in which `before` has been run."""
    if subprocess.run([*NAMESPACE, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    code = f"{before}\nfrom bench.faults import main; main()"
    return subprocess.run(
        [*NAMESPACE, sys.executable, "-c", code, "--inside", "--stage", "split", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_split_loses_nothing_whatever_breaks_it() -> None:
    done = break_split("", "--rounds", "12", "--verbose")
    assert done.returncode == 0, done.stdout + done.stderr
    for kind in ("kill", "stop", "disk", "rights"):
        assert f" {kind} " in done.stdout


@pytest.mark.slow
def test_a_stage_that_writes_in_place_is_found_out() -> None:
    done = break_split(BROKEN_SPLIT, "--rounds", "3", "--kind", "disk")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "LOST: results/split is half-written" in done.stdout


def test_a_wrong_object_and_a_row_without_one_are_found(repository: Path) -> None:
    (repository / ".dvc/cache/bob").mkdir(parents=True)
    right = object_of(repository, "900150983cd24fb0d6963f7d28e17f72")
    right.parent.mkdir(parents=True)
    right.write_text("abc")  # its MD5
    index_of(repository).add([Row("r", "m", "900150983cd24fb0d6963f7d28e17f72", 3, "caption")])
    assert list(faults_of_cache(repository)) == []
    right.write_text("abd")
    assert "is not what its name says" in next(faults_of_cache(repository))
    right.unlink()
    assert "names object 900150983cd24fb0d6963f7d28e17f72" in next(faults_of_cache(repository))


def test_a_folder_has_another_digest_where_a_name_or_a_byte_is_another(workspace: Path) -> None:
    (workspace / "out").mkdir()
    seen = {digest(workspace / "out"), digest(workspace / "none")}
    for name, text in (("a", "1"), ("a", "2"), ("b", "2")):
        (workspace / "out" / name).write_text(text)
        seen.add(digest(workspace / "out"))
    assert len(seen) == 5
