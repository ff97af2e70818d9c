"""DVC's list of who reads and writes what, freed from processes that were killed.

DVC keeps it in one file, `.dvc/tmp/rwlock`, which it rewrites in place. A process that is killed
leaves its entries there, for DVC removes only those that stand in its way; and one that is killed
while it writes leaves half a file, with which every later `dvc repro` fails.
"""

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from bob.errors import BobError
from bob.formats.files import replacing_file

if TYPE_CHECKING:
    from dvc.repo import Repo


def release_dead(repository: "Repo") -> None:
    """Take the entries of dead processes out of the list; half a file goes if its writer is dead.

    Raises BobError where half a file is left and a DVC is at work in this repository.
    """
    from dvc.lock import LockError, make_lock
    from dvc.rwlock import RWLOCK_FILE, RWLOCK_LOCK

    if repository.tmp_dir is None:
        return
    folder = Path(repository.tmp_dir)
    if not (folder / RWLOCK_FILE).exists():
        return
    guard = make_lock(
        str(folder / RWLOCK_LOCK),
        tmp_dir=str(folder),
        hardlink_lock=repository.config["core"].get("hardlink_lock", False),
    )
    try:
        with guard:
            _clean(folder / RWLOCK_FILE, Path(repository.root_dir))
    except LockError:
        pass  # another DVC is changing it now, and will get by without this


def _clean(path: Path, root: Path) -> None:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    try:
        lock = json.loads(text)
        alive = _alive(lock)
    except (ValueError, TypeError, KeyError, AttributeError):
        # Whoever holds the guard is the only writer, so this one's writer is dead. But those who
        # hold a lock still would fail when they look for their entries.
        at_work = _processes_of_dvc(root)
        if at_work:
            raise BobError(
                f"{path} was left half-written by a DVC that was killed, while another (process "
                f"{at_work[0]}) is at work; wait for it, or end it, and try again"
            ) from None
        path.unlink()
        return
    if alive != lock:
        with replacing_file(path) as draft:
            draft.write_text(json.dumps(alive), encoding="utf-8")


def _alive(lock: Any) -> dict[str, Any]:
    """The list without the dead; it has the form of `dvc.rwlock.SCHEMA`."""
    living = {
        pid: psutil.pid_exists(pid)
        for pid in {info["pid"] for info in lock.get("write", {}).values()}
        | {info["pid"] for infos in lock.get("read", {}).values() for info in infos}
    }
    writers = {name: info for name, info in lock.get("write", {}).items() if living[info["pid"]]}
    readers = {
        name: alive
        for name, infos in lock.get("read", {}).items()
        if (alive := [info for info in infos if living[info["pid"]]])
    }
    return {"write": writers, "read": readers}


def _processes_of_dvc(root: Path) -> list[int]:
    """Processes that run DVC in a repository, but for this one and those that started it."""
    ours = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        words, folder = process.info["cmdline"] or (), process.info["cwd"]
        if process.pid in ours or folder is None or not Path(folder).is_relative_to(root):
            continue
        if any(re.fullmatch(r"(.*/)?dvc", word) for word in words):
            found.append(process.pid)
    return found
