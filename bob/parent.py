"""A stage dies with the DVC that runs it.

DVC that is killed leaves its stage running, and the stage would then write into the output of the
next run.
"""

import ctypes
import os
import signal
import sys
import threading
import time

import psutil

_SHELLS = {"ash", "bash", "csh", "dash", "fish", "ksh", "sh", "tcsh", "zsh"}
_PR_SET_PDEATHSIG = 1
_SECONDS_BETWEEN_LOOKS = 0.2


def die_with_dvc() -> None:
    """Have the kernel, or else a thread, kill this process when the DVC that started it dies.

    To be called as early as possible, and only by a process that DVC started: a stage that a user
    started must outlive the user's shell where the user wants it to. Exits at once where DVC is
    dead already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    dvc = _starter()
    if dvc is None:
        sys.exit("bob: the DVC that started this stage is gone")
    # DVC starts its stages through a shell, which may stay between them and then outlive DVC: the
    # kernel tells of the shell's death alone.
    threading.Thread(target=_die_with, args=(dvc,), daemon=True).start()


def _starter() -> psutil.Process | None:
    """The nearest ancestor that is no shell; None where that is who adopts orphans."""
    for process in psutil.Process().parents():
        if process.name() in _SHELLS:
            continue
        # In a container, DVC itself may be the first process.
        orphaned = process.pid == 1 or process.name() == "systemd"
        return None if orphaned and not _may_be_dvc(process) else process
    return None


def _may_be_dvc(process: psutil.Process) -> bool:
    try:
        command = process.cmdline()
    except psutil.AccessDenied:  # of another user
        return False
    return any("dvc" in word or "python" in word for word in command)


def _die_with(process: psutil.Process) -> None:
    while alive(process):
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    os.kill(os.getpid(), signal.SIGKILL)


def alive(process: psutil.Process) -> bool:
    """Whether a process runs still; one that is dead and not yet collected does not."""
    try:
        # `is_running` knows a process from another that has its number by now, and counts zombies.
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
