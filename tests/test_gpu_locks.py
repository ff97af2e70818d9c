"""Each process takes a GPU of its own, and a process that dies gives it back."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import pytest

from bob.cache import gpu_locks
from bob.errors import BobError
from tests.conftest import ROOT

HOLDER = """
import os, sys, time
from bob.cache.gpu_locks import take_free

place = take_free(["one", "two"])
began = time.time()
time.sleep(float(sys.argv[1]))
with open(sys.argv[2], "a") as log:
    log.write(f"{place} {began} {time.time()}\\n")
"""


def hold(folder, seconds):
    """A process that takes one of two GPUs of the machine whose temporary files lie in `folder`."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(seconds), str(folder / "log")],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_no_two_processes_are_on_one_gpu_while_another_is_free(tmp_path):
    processes = [hold(tmp_path, 0.5) for _ in range(6)]
    errors = [process.communicate()[1] for process in processes]
    turns = [line.split() for line in (tmp_path / "log").open()]
    by_gpu = {
        gpu: sorted((float(began), float(ended)) for place, began, ended in turns if place == gpu)
        for gpu in ("0", "1")
    }
    assert sorted(map(len, by_gpu.values())) == [3, 3]
    for held in by_gpu.values():
        for (_, ended), (began, _) in pairwise(held):
            assert ended <= began
    waited = "waiting: all 2 GPUs are in use by other processes of bob\n"
    assert sorted(errors) == ["", "", *[waited] * 4]


def test_a_process_that_is_killed_gives_its_gpu_back(tmp_path):
    holders = [hold(tmp_path, 60) for _ in range(2)]
    while len(list(tmp_path.glob("bob-gpu-*"))) < 2:
        time.sleep(0.05)
    waiting = hold(tmp_path, 0)
    assert "waiting" in waiting.stderr.readline()
    holders[0].send_signal(signal.SIGKILL)
    assert waiting.wait() == 0
    holders[1].kill()
    for holder in holders:
        holder.wait()


def test_who_holds_a_gpu_knows_whether_another_waits_for_one(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(gpu_locks, "_held", [])
    others = [hold(tmp_path, 60) for _ in range(2)]
    while len(list(tmp_path.glob("bob-gpu-*"))) < 2:
        time.sleep(0.05)
    waiting = [hold(tmp_path, 60) for _ in range(2)]
    assert ["waiting" in one.stderr.readline() for one in waiting] == [True, True]
    assert not gpu_locks.in_demand()  # this one holds none
    assert gpu_locks.take_free(["third"]) == 0
    time.sleep(2 * gpu_locks.SECONDS_BETWEEN_LOOKS)
    assert gpu_locks.in_demand()
    for one in others:  # those who have waited hold them now
        one.kill()
        one.wait()
    while gpu_locks.in_demand():
        time.sleep(0.05)
    for one in waiting:
        one.kill()
        one.wait()


def test_a_lock_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(BobError, match=r"gone/bob-gpu-one\.lock, the lock of a GPU: No such file"):
        gpu_locks.take_free(["one"])


def test_a_lock_is_shared_by_users(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    lock = Path(tmp_path, "bob-gpu-one.lock")
    lock.touch(0o444)  # of another user, who has run bob before
    assert gpu_locks.take_free(["one"]) == 0
