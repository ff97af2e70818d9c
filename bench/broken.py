"""Stages that run as forks of this process, on a file system of their own that can be filled."""

import atexit
import ctypes
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Self

from bench.counted import LOG, CountedCache

SECONDS = 120  # after which a run is taken to hang
_CAPSET_VERSION = 0x20080522
_AMPLE = {"pages": 2**17, "files": 2**16}


@dataclass(frozen=True)
class Run:
    """How a run of a stage has ended."""

    status: int
    """Exit status; where a signal has ended it, the signal's number, less than 0."""
    said: str
    """On standard error."""
    seconds: float
    pages: int
    """Of the file system, that it took at most."""
    files: int


class FaultySystem:
    """A tmpfs at `mount`, and a folder `outside` it that is never full; for a `with` block."""

    def __init__(self) -> None:
        # Not a TemporaryDirectory, which a fork would remove when it ends.
        folder = self._folder = Path(tempfile.mkdtemp())
        self.mount, self.outside = folder / "mount", folder / "outside"
        self.mount.mkdir()
        self.outside.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", self.mount], check=True)
        self._resize(**_AMPLE)
        (self.mount / "tmp").mkdir()
        self.log = self.outside / "made"
        # What DVC keeps outside of a project is on the same disk as it.
        os.environ |= {LOG: str(self.log), "DVC_SITE_CACHE_DIR": str(self.mount / "site")}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", self.mount], check=True)
        shutil.rmtree(self._folder)

    def used(self) -> tuple[int, int]:
        """Pages and files that there are."""
        now = os.statvfs(self.mount)
        return now.f_blocks - now.f_bfree, now.f_files - now.f_ffree

    @contextmanager
    def room(self, *, pages: int | None = None, files: int | None = None) -> Iterator[None]:
        """Leave room for so much more."""
        used_pages, used_files = self.used()
        # A size of 0 is none: the project is there already.
        self._resize(
            pages=_AMPLE["pages"] if pages is None else used_pages + pages,
            files=_AMPLE["files"] if files is None else used_files + files,
        )
        try:
            yield
        finally:
            self._resize(**_AMPLE)

    def _resize(self, pages: int, files: int) -> None:
        size = pages * os.statvfs(self.mount).f_bsize
        options = f"remount,size={size},nr_inodes={files}"
        subprocess.run(["mount", "-o", options, self.mount], check=True)

    def run(
        self,
        project: Path,
        stage: str,
        sent: signal.Signals | None = None,
        after: float = 0.0,
    ) -> Run:
        """Run a stage to its end; it is `sent` a signal `after` seconds, a stopped one goes on."""
        began, (pages, files) = time.monotonic(), self.used()
        said = self.outside / "said"
        child = os.fork()
        if child == 0:
            _become(project, stage, said, self.mount / "tmp")
        most_pages, most_files = pages, files
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            seconds = time.monotonic() - began
            if ended:
                break
            if sent is not None and seconds >= after:
                os.kill(child, sent)
                if sent == signal.SIGSTOP:
                    time.sleep(0.2)
                    os.kill(child, signal.SIGCONT)
                sent = None
            if seconds > SECONDS:
                os.kill(child, signal.SIGKILL)
            now = self.used()
            most_pages, most_files = max(most_pages, now[0]), max(most_files, now[1])
            time.sleep(0.002)
        return Run(
            os.waitstatus_to_exitcode(status),
            said.read_text(errors="backslashreplace") if said.exists() else "",
            seconds,
            most_pages - pages,
            most_files - files,
        )


def prepare(stages: Sequence[str]) -> None:
    """Import what these stages import, so that a fork need not.

    Which items are begun is logged, and a training run saves a checkpoint whenever it can.
    """
    import bob.cache.checkpoints
    import bob.cache.items
    from tests.warm_python import import_libraries

    if set(stages) - {"draw", "split"}:  # those need none of the large ones
        import_libraries()
    bob.cache.items.ItemCache = CountedCache  # type: ignore[misc]
    bob.cache.checkpoints.SECONDS_BETWEEN = 0.0
    for stage in stages:
        importlib.import_module(f"bob.stages.{stage}")


def _become(project: Path, stage: str, said: Path, temporary: Path) -> NoReturn:
    """Be `bob STAGE` in a project, as `python -m bob` is."""
    code: object = 1
    try:
        error = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream, number in ((nothing, 0), (nothing, 1), (error, 2)):
            os.dup2(stream, number)
        os.chdir(project)
        tempfile.tempdir = str(temporary)
        _drop_capabilities()
        # Who starts it in a shell's background has SIGINT ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["bob", stage]
        from bob.__main__ import main

        main()
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
    try:
        # As Python ends, but for tidying up after the libraries.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stderr.flush()
    finally:
        os._exit(code if isinstance(code, int) else 1)


def _drop_capabilities() -> None:
    """Be bound by the modes of files, as root is not."""
    header = (ctypes.c_uint32 * 2)(_CAPSET_VERSION, 0)
    if ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "capset")
