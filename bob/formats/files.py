"""Files that are either whole or not there, and whose bytes depend on their content alone."""

import csv
import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from bob.errors import BobError, shown

_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_SOME_FILES = 16
_SECONDS_KEPT = 86400.0  # a draft from elsewhere, since it was written to


@contextmanager
def naming(target: Path) -> Iterator[None]:
    """Let what writing raises name `target` where it names nothing: an open file does not know."""
    try:
        yield
    except OSError as error:
        if error.errno in _OF_WRITING and error.filename is None:
            error.filename = str(target)
        raise


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target` that takes its place when the block ends well.

    If the block raises, the folder is removed and what was at `target` stays as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    folder = Path(tempfile.mkdtemp(prefix=f"{_draft_of(target)}.", dir=target.parent))
    try:
        folder.chmod(0o777 & ~_umask())  # mkdtemp's 0700 would follow the output to its consumers
        with naming(target):
            yield folder
        if target.is_dir():
            _exchange(target, folder)
        else:
            folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _exchange(target: Path, new: Path) -> None:
    """Put the folder `new` in the place of `target`, which stays where that fails."""
    old = Path(tempfile.mkdtemp(prefix=f"{new.name}.", dir=target.parent))
    try:
        target.rename(old / target.name)
        new.rename(target)
    except BaseException:
        if not target.exists():
            (old / target.name).rename(target)
        shutil.rmtree(old, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)  # the next to replace `target` removes what stays


def check_room(folder: Path, size: int) -> None:
    """Raise OSError where the disk of `folder` has no room for `size` bytes and some files.

    For after the failure of a library that does not say that the disk was full.
    """
    disk = os.statvfs(folder)
    files = disk.f_favail if disk.f_files else _SOME_FILES  # some file systems do not count them
    if disk.f_bavail * disk.f_frsize < size or files < _SOME_FILES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def _draft_of(target: Path) -> str:
    """How the name of this process's draft of `target` begins: `.<name>.<process>.<where>`."""
    return f".{target.name}.{os.getpid()}.{_where()}"


@cache
def _where() -> str:
    """Where a process's number tells whether it lives: this machine, and container if in one.

    A hash, for host names can be long, and have dots in them.
    """
    try:  # Linux numbers the spaces of process numbers, of which a container may have its own
        space = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        space = 0
    return hashlib.sha256(f"{platform.node()} {space}".encode()).hexdigest()[:8]


def _sweep(target: Path) -> None:
    """Remove the drafts that processes which were killed have left beside `target`.

    Of a draft from elsewhere, which may share the disk, nobody knows here whether its process
    lives; it goes when nothing was written to it for a day.
    """
    for draft in target.parent.glob(f".{glob.escape(target.name)}.*"):
        process, _, more = draft.name.removeprefix(f".{target.name}.").partition(".")
        if not (process.isascii() and process.isdigit()):
            continue
        with suppress(FileNotFoundError):  # its process, or another that sweeps, was faster
            if more.split(".")[0] == _where():
                left = not psutil.pid_exists(int(process))
            else:
                left = _last_written(draft) < time.time() - _SECONDS_KEPT
            if left:
                shutil.rmtree(draft) if draft.is_dir() else draft.unlink()


def _last_written(draft: Path) -> float:
    """When something was written last to a file, or into a folder."""
    return max(path.lstat().st_mtime for path in (draft, *draft.rglob("*")))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def replacing_file(target: Path) -> Iterator[Path]:
    """Yield a path beside `target` that takes its place when the block ends well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    draft = target.with_name(f"{_draft_of(target)}.tmp")
    try:
        with naming(target):
            yield draft
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes and threads that lock `folder` waiting until the block ends.

    The kernel releases the lock with its process, however that ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Never removed: a lock on a file that has another name by now, or none, would lock nothing.
    with (folder / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON with sorted keys, indented, in one step."""
    with replacing_file(path) as draft:
        text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        draft.write_text(text + "\n", encoding="utf-8")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line, keys sorted, in one step."""
    with replacing_file(path) as draft, draft.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table with a header, in one step."""
    with replacing_file(path) as draft, draft.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def read_json(path: Path) -> Any:
    """Read a JSON file; raises BobError naming the file when it is missing or malformed."""
    return _parsed(_read(path), str(path))


def read_jsonl(
    path: Path, check: Callable[[str, dict[str, Any]], None] | None = None
) -> list[dict[str, Any]]:
    """Read JSON lines; raises BobError naming the file and the line that is no JSON object.

    `check`, called with "<path>, line <n>" and the object, may raise one, too.
    """
    rows = []
    # Not by `splitlines`: a class's name may hold what that takes for the end of a line.
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = _parsed(line, where)
        if not isinstance(row, dict):
            raise BobError(f"{where}: a JSON object was expected, found {shown(line, 40)}")
        if check is not None:
            check(where, row)
        rows.append(row)
    return rows


def _parsed(text: str, where: str) -> Any:
    """The value of a JSON text of finite numbers; raises BobError that begins with `where`."""
    try:
        value = json.loads(text, parse_constant=_finite, parse_float=_finite)
        if "\\u" in text:  # half of a character, "\ud83d", could be written nowhere
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise BobError(f"{where}: not JSON that bob reads (it is nested too deeply)") from None
    except ValueError as error:  # also of a number with thousands of digits
        raise BobError(f"{where}: not JSON ({shown(error)})") from None
    return value


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{shown(number, 40)} is no finite number")
    return value


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BobError(
            f"{path} is missing; `dvc repro` makes it or `dvc pull` fetches it"
        ) from None
    except UnicodeDecodeError:
        raise BobError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise BobError(f"{path} cannot be read ({error.strerror})") from None


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
