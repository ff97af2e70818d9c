"""Shared by all tests: one thread, no network, and a project folder to work in."""

import ctypes
import os
import re
import sys

# Small networks gain nothing from a second thread, and with other processes beside them two
# threads that wait for each other make the suite ten times slower. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["DVC_NO_ANALYTICS"] = "1"

from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items):
    """Begin with the files that have slow tests, so that none of them runs on alone at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: slow[item.path], reverse=True)


@pytest.fixture(scope="session", autouse=True)
def _warm_python():
    """Projects in tests run a Python that has the libraries imported."""
    from tests import dvc_project, warm_python

    dvc_project.python_folder = warm_python.folder


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """An empty folder as the current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def bound_by_modes():
    """Files' modes hold for this thread, though it be root's."""
    if sys.platform != "linux":
        pytest.skip("root's capabilities are Linux's")
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    # Of each half the first are the effective ones, which may be taken back.
    assert libc.capset(header, (ctypes.c_uint32 * 6)(0, *sets[1:3], 0, *sets[4:6])) == 0
    yield
    assert libc.capset(header, sets) == 0


@pytest.fixture
def study_folder(workspace):
    """The real params and pipeline in the current folder, with models of no size."""
    from bob.commands.study import plan

    for name in ("params.yaml", "dvc.yaml"):
        (workspace / name).write_text((ROOT / name).read_text())
    for name in ("backbone", "base", "captioner"):
        (workspace / f"models/miniature-{name}").mkdir(parents=True)
        (workspace / f"models/miniature-{name}/weights").write_text(name)
    for name in ("contexts", "review"):
        (workspace / "data" / name).mkdir(parents=True)
    (workspace / "bob").symlink_to(ROOT / "bob")
    plan._content.cache_clear()
    return workspace


def documented(page, using):
    """The one block of Python in `docs/<page>` that has `using` in it."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / page).read_text(), re.M | re.S)
    (block,) = (block for block in blocks if using in block)
    return block


def told_of(path, content, old, new):
    """The one line that is told of a study's file with `old` in its `content` changed to `new`."""
    from bob.commands.study import plan
    from bob.errors import BobError

    assert old in content
    path.write_text(content.replace(old, new))
    with pytest.raises(BobError) as caught:
        plan.read_study(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def repository(workspace):
    """An empty DVC repository as the current directory."""
    from dvc.repo import Repo

    Repo.init(no_scm=True).close()
    return workspace
