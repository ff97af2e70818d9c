"""A stage dies with the DVC that runs it, and a user's own does not; on real processes."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.conftest import ROOT

STAGE = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
if "DVC_STAGE" in os.environ:
    from bob.parent import die_with_dvc
    die_with_dvc()
print(os.getpid(), flush=True)
time.sleep(60)
"""
# In the place of DVC: it starts a shell, and waits.
STARTER = """
import subprocess, sys
subprocess.run(["/bin/sh", "-c", sys.argv[1]])
"""
DIRECT = "exec {python} -c '{stage}' {root}"
BEHIND_A_SHELL = "{python} -c '{stage}' {root}; true"


def start(command, **environment):
    shell = command.format(python=sys.executable, stage=STAGE.replace("'", '"'), root=ROOT)
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, shell],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
        start_new_session=True,
    )
    assert starter.stdout
    return starter, psutil.Process(int(starter.stdout.readline()))


def gone(process, seconds=10):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("command", [DIRECT, BEHIND_A_SHELL])
def test_a_stage_dies_with_dvc(command):
    starter, stage = start(command, DVC_STAGE="generate")
    assert (stage.ppid() == starter.pid) is (command == DIRECT)
    starter.kill()
    starter.wait()
    assert gone(stage)


def test_what_a_user_started_outlives_who_started_it():
    starter, stage = start(DIRECT)
    starter.kill()
    starter.wait()
    assert not gone(stage, seconds=2)
    stage.send_signal(signal.SIGKILL)


ORPHAN = """
import psutil
from bob.parent import die_with_dvc

class Adopter:
    pid, name, cmdline = 1, lambda _: "init", lambda _: ["/sbin/init"]

psutil.Process.parents = lambda _: [Adopter()]
die_with_dvc()
"""


def test_a_stage_whose_dvc_has_died_already_does_not_begin():
    """An orphan's nearest ancestor is who adopted it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", ORPHAN], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert result.stderr == "bob: the DVC that started this stage is gone\n"


def test_dvc_may_be_the_first_process_of_a_container(monkeypatch):
    from bob import parent

    class Dvc:
        pid = 1

        def name(self):
            return "dvc"

        def cmdline(self):
            return ["python3", "/usr/local/bin/dvc", "repro"]

    monkeypatch.setattr(psutil.Process, "parents", lambda _: [Dvc()])
    assert isinstance(parent._starter(), Dvc)
