"""A worker of a cluster, which is handed work and makes batches: what runs in Ray's processes."""

import os
import pickle
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from bob.cache import node
from bob.cache.executors.files import Asked, Brought, Parts
from bob.cache.recipe import Maker, code_hashes, versions
from bob.cache.work import Hardware
from bob.errors import BobError


@dataclass(frozen=True)
class Greeting:
    """What a worker says of itself before it is handed anything."""

    maker: Maker
    """What it would make items with."""
    hardware: Hardware | None
    """None where nobody has asked for it."""
    error: str = ""
    """Why it can make nothing."""


@dataclass(frozen=True)
class Refused:
    """An error that the user is to be told: another worker would meet it as well."""

    message: str


class Worker:
    """Makes batches in a folder of its own, where what they read lies by the project's paths.

    `root` is the project's on the driver's machine, `source` what hands out its files there. It
    computes with so many `threads`.
    """

    def __init__(self, root: str, source: Any, threads: int) -> None:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # read when torch is imported
        self._root, self._source = Path(root), source
        self._pickled = b""
        self._make: Callable[..., Sequence[Any]]
        self._encode: Callable[[Any], bytes]

    def where(self) -> tuple[str, str]:
        """Ray's id of its machine, and the host name.

        The first that it is asked, and little that could fail: whatever ends it later can be held
        against the machine.
        """
        import ray

        return ray.get_runtime_context().get_node_id(), platform.node()

    def greet(self, maker: Maker, look: bytes | None) -> Greeting:
        """What it would make items with, of the parts that this maker has.

        `look` finds out the hardware; pickled, because torch may fail where it is imported.
        """
        try:
            os.chdir(_own_folder())
            self._files = Brought(self._root, self._read)
            own = Maker(code_hashes(maker.code), versions(maker.libraries))
            return Greeting(own, pickle.loads(look)() if look else None)
        except metadata.PackageNotFoundError as error:
            reason = f"it has no {error.name}"
        except Exception as error:  # another worker of this machine would meet it as well
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return Greeting(maker, None, reason)

    def _read(self, asked: Asked) -> Parts:
        import ray

        parts: Parts = ray.get(self._source.read.remote(asked))
        return parts

    def make(
        self, pickled: bytes, inputs: tuple[Any, ...], files: Mapping[Path, str]
    ) -> list[bytes] | Refused:
        """A batch's items; `pickled` is what makes and encodes them, kept for the next batch."""
        try:
            self._files.bring(files)
            if pickled != self._pickled:
                self._make, self._encode = pickle.loads(pickled)
                self._pickled = pickled
            with ThreadPoolExecutor() as encoders:
                return list(encoders.map(self._encode, self._make(*inputs)))
        except BobError as error:
            return Refused(str(error))


def _own_folder() -> Path:
    """An empty folder for this process; those of processes that are gone are removed."""
    # With the machine's name: machines may share the user's home.
    parent, host = node.folder("workers"), platform.node()
    for left in parent.iterdir():
        name, _, pid = left.name.rpartition("-")  # a host's name may hold hyphens, a pid none
        if name == host and pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    own = parent / f"{host}-{os.getpid()}"
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir()
    return own
