"""Machines of a Ray cluster that are processes of this one, to be broken.

Each that makes items sees neither the project nor the others' files: it has a mount namespace of
its own, where the project's folder is empty and the node's folder a small disk. Needs Linux.
"""

import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from bench.clusters import ROOT, SECRET
from bob.parent import alive

DISK = 64 * 2**20  # bytes of a node's folder
STORE = 150 * 2**20  # bytes of shared memory of a machine
SECONDS_TO_JOIN = 60


class Machine:
    """`ray start` and all that it starts."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        with log.open("ab") as output:
            self._started = subprocess.Popen(
                command,
                env=os.environ | {"PYTHONPATH": str(ROOT)} | SECRET,
                stdout=output,
                stderr=output,
                start_new_session=True,  # no signal for this process reaches it
            )
        self._known: set[psutil.Process] = set()

    def processes(self) -> list[psutil.Process]:
        """All that run."""
        with suppress(psutil.NoSuchProcess):
            self._known.add(psutil.Process(self._started.pid))
        for process in list(self._known):  # some may have lost their parent
            with suppress(psutil.NoSuchProcess):
                self._known |= set(process.children(recursive=True))
        self._known = {process for process in self._known if alive(process)}
        return sorted(self._known, key=lambda process: process.pid)

    def named(self, *beginnings: str) -> list[psutil.Process]:
        """Those whose names begin so: `raylet`, `gcs_server`, `ray::Worker`."""
        found = []
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                if process.name().startswith(beginnings):
                    found.append(process)
        return found

    def stand_still(self) -> None:
        """Stop everything, so that it answers nobody and no connection is closed."""
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.suspend()

    @property
    def stands_still(self) -> bool:
        """Whether that was done."""
        processes = self.processes()
        return bool(processes) and processes[0].status() == psutil.STATUS_STOPPED

    def pull_the_plug(self) -> None:
        """End everything at once."""
        while processes := self.processes():
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.05)
        self._started.wait()


class Node(Machine):
    """A machine that makes items, on so many CPUs."""

    def __init__(self, address: str, cpus: int, project: Path, folder: Path, log: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        start = _ray_start(f"--address={address}", f"--num-cpus={cpus}")
        hidden = shlex.join(["mount", "-t", "tmpfs", "project", str(project)])
        disk = shlex.join(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "disk", str(folder)])
        alone = ["unshare", "--mount"]
        if os.geteuid():
            alone += ["--user", "--map-root-user"]
        settings = ["env", f"BOB_NODE_FOLDER={folder}"]
        script = f"{hidden} && {disk} && exec {shlex.join([*settings, *start])}"
        super().__init__([*alone, "sh", "-c", script], log)

    @property
    def disk(self) -> Path:
        """Its folder, as seen from outside."""
        return Path(f"/proc/{self._started.pid}/root{self._folder}")

    def fill(self) -> None:
        """Leave no byte on its disk."""
        with (self.disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))

    def empty(self) -> None:
        """Give the room on its disk back."""
        (self.disk / "filler").unlink(missing_ok=True)


class Cluster:
    """A head, which is the driver's machine and makes nothing, and nodes of `cpus` CPUs."""

    def __init__(self, folder: Path, project: Path, cpus: int) -> None:
        self._folder, self._project, self._cpus = folder, project, cpus
        self._log = folder / "ray.log"
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        self.head = Machine(
            _ray_start(
                "--head",
                f"--port={port}",
                "--num-cpus=0",
                "--include-dashboard=false",
                f"--temp-dir={folder / 'ray'}",
            ),
            self._log,
        )
        self.address = f"127.0.0.1:{port}"
        self.environment = {"RAY_ADDRESS": self.address} | SECRET
        self.nodes: list[Node] = []
        self.wait_for(0)

    def join(self) -> Node:
        """Another node; it is not waited for."""
        folder = self._folder / f"node{len(list(self._folder.glob('node*')))}"
        node = Node(self.address, self._cpus, self._project, folder, self._log)
        self.nodes.append(node)
        return node

    def resize(self, nodes: int) -> bool:
        """Have so many nodes that work, and wait for them; see `wait_for`."""
        for node in [node for node in self.nodes if not node.named("raylet")]:
            node.pull_the_plug()
            self.nodes.remove(node)
        while len(self.nodes) > nodes:
            self.nodes.pop().pull_the_plug()
        while len(self.nodes) < nodes:
            self.join()
        return self.wait_for(nodes)

    def wait_for(self, nodes: int) -> bool:
        """Wait until there are so many nodes and all is free; False where that took too long."""
        wanted = (nodes + 1, nodes * self._cpus, nodes * self._cpus)
        return any(self._resources() == wanted for _ in _until(SECONDS_TO_JOIN))

    def _resources(self) -> tuple[int, ...]:
        """How many machines there are, how many CPUs, and how many of these are free."""
        code = (
            "import sys; from ray._private.state import GlobalState as S;"
            "from ray._raylet import GcsClientOptions as O; s = S();"
            "s._initialize_global_state(O.create(sys.argv[1], None, allow_cluster_id_nil=True,"
            " fetch_cluster_id_if_nil=False));"
            "r = s.cluster_resources(), s.available_resources();"
            "print(sum(one['Alive'] for one in s.node_table()),"
            " *(int(one.get('CPU', 0)) for one in r))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, self.address],
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return tuple(map(int, done.stdout.split()))

    def workers(self) -> list[psutil.Process]:
        """bob's processes on all machines, the one that hands out the project's files too."""
        return [
            process
            for machine in (self.head, *self.nodes)
            if not machine.stands_still
            for process in machine.named("ray::Worker", "ray::Source")
        ]

    def shut_down(self) -> None:
        """End everything."""
        for machine in (*self.nodes, self.head):
            machine.pull_the_plug()


def _ray_start(*options: str) -> list[str]:
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block"),
        *("--disable-usage-stats", f"--object-store-memory={STORE}"),
        *options,
    ]


def _until(seconds: float) -> Iterator[None]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(0.5)
