"""A Ray cluster on this machine for a measurement, and the makers that its workers are handed.

Workers import this module and not the benches, so that they stay light.
"""

import os
import random
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# Ray lets in nobody else.
SECRET = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex()}
STORE = 2**29  # bytes of shared memory a node


@contextmanager
def cluster(folder: Path, slots: int) -> Iterator[Any]:
    """A head that makes nothing, as the driver's machine, and a node of so many CPU slots."""
    # Both before Ray is imported: its files lie in `folder`, and its processes find this module.
    os.environ |= {"RAY_TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0"} | SECRET
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE}
    ray_cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        if slots:
            ray_cluster.add_node(
                num_cpus=slots,
                object_store_memory=STORE,
                env_vars={"BOB_NODE_FOLDER": str(folder / "node")},
            )
        yield ray_cluster
    finally:
        ray_cluster.shutdown()


def drive(code: str, folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    """A driver: Python of its own in the DVC repository `folder`, for as long as it takes."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def repository(folder: Path) -> Path:
    """A DVC repository without Git in a new folder."""
    from dvc.repo import Repo

    folder.mkdir()
    Repo.init(str(folder), no_scm=True).close()
    return folder


class Sleeping:
    """Makes items of some bytes, each in so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, numbers: list[int]) -> list[bytes]:
        time.sleep(self.seconds * len(numbers))
        return [str(number).encode() for number in numbers]


class Meeting:
    """Makes an item as soon as `workers` processes are each at one."""

    def __init__(self, folder: Path, workers: int) -> None:
        self.folder, self.workers = folder, workers

    def __call__(self, numbers: list[int]) -> list[bytes]:
        (self.folder / str(os.getpid())).touch()
        while len(list(self.folder.iterdir())) < self.workers:
            time.sleep(0.05)
        return [f"met {number}".encode() for number in numbers]


class Instant:
    """Makes items of `size` bytes, all different, in no time."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.bytes = b""

    def __call__(self, numbers: list[int]) -> list[bytes]:
        self.bytes = self.bytes or random.Random(0).randbytes(self.size)
        return [number.to_bytes(8) + self.bytes[8:] for number in numbers]


def numbered_photo(number: int) -> bytes:
    """What `Numbered` reads for an item."""
    return random.Random(number).randbytes(20_000)


def numbered(number: int) -> bytes:
    """An item of `Numbered`: 20 to 80 kB, so that Ray carries some batches in its shared memory."""
    own = random.Random(-number - 1)
    return numbered_photo(number) + own.randbytes(own.randrange(60_000))


class Numbered:
    """Makes items of their numbers and photos, and logs the numbers before."""

    def __init__(self, log: Path, seconds: float) -> None:
        self.log, self.seconds = log, seconds

    def __call__(self, numbers: list[int], photos: list[Path]) -> list[bytes]:
        with self.log.open("a") as log:
            log.write(f"{' '.join(map(str, numbers))}\n")  # one write: lines of several stay whole
        time.sleep(self.seconds * len(numbers))
        read = [photo.read_bytes() for photo in photos]
        return [
            one + numbered(number)[len(one) :] for number, one in zip(numbers, read, strict=True)
        ]
