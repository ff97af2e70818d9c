"""Break a Ray cluster while items are made on it, and look at what is left.

    python -m bench.cluster_faults [--faults 40] [--seed 0] [--kind KIND]

A head, which is the driver's machine, and two nodes of two workers, which do not see the project
(bench/machines.py). At a random moment one of these happens:

\b
worker  a worker, or the process that hands out the project's files, is killed
node    all processes of a node are killed
silent  all processes of a node stand still, as where its network is gone
raylet  Ray's process of a node is killed
driver  the driver is killed
head    Ray's server of the cluster (GCS) is killed
home    Ray's process of the driver's machine is killed
disk    a node's disk is full, before it has brought the files or meanwhile
late    a node joins

A run that does not survive must end by itself, with one line; it is run again, after the head was
lost on a new cluster. In the end all items must be there with the bytes they should have, those
made too many must not exceed the batches in flight and the ones before them, which are kept
meanwhile, no worker may be left, and all CPUs be free.
"""

import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from bench.clusters import Numbered, drive, numbered, numbered_photo, repository
from bench.machines import Cluster, Machine
from bench.project import object_of
from bob.cache.index import Index
from bob.cache.items import ItemCache, md5_of
from bob.cache.recipe import Maker, item_key
from bob.cache.wanted import Wanted
from bob.cache.work import Work
from bob.errors import BobError
from bob.parent import alive

KINDS = ("worker", "node", "silent", "raylet", "driver", "head", "home", "disk", "late")
ITEMS, BATCH = 150, 3
NODES, CPUS = 2, 2
# Items that may be made again: the batches that are being made, and those that are done and neither
# brought to the driver nor kept.
ALLOWED = {
    "worker": BATCH,
    **dict.fromkeys(("node", "silent", "raylet"), 2 * BATCH * CPUS),
    **dict.fromkeys(("driver", "head", "home"), 2 * BATCH * CPUS * NODES),
    **{"disk": 0, "late": 0},
}
RECIPES = [item_key(number=number) for number in range(ITEMS)]
SECONDS = 0.1  # an item
ATTEMPTS = 3  # at a cluster
LIMIT = 150  # seconds for a run, broken or not
SECONDS_TO_GO = 10  # for the workers of a driver that is gone
SECONDS_WITHOUT_HEAD = 90  # for those that have lost the head as well: Ray gives it 60 to come back
MODEL = Path("model.bin")  # large enough to be sent in parts


@dataclass(frozen=True)
class Fault:
    """One fault and what came of it."""

    kind: str
    after: float
    """Seconds after the driver had started."""
    survived: bool
    ended: str
    """How the run ended that did not survive."""
    excess: int
    """Items made in all, less the need."""
    lost: float
    """Seconds beyond an undisturbed run, until all items were there."""
    wrong: tuple[str, ...]

    def __str__(self) -> str:
        end = "survived" if self.survived else f"ended ({self.ended.splitlines()[-1:]})"
        return (
            f"{self.kind:7} after {self.after:4.1f} s: {end}, {self.excess} items too many, "
            f"{self.lost:.1f} s lost{''.join(f'; WRONG: {one}' for one in self.wrong)}"
        )


def photo(number: int) -> Path:
    """What an item is made of, so that something must be brought for each batch."""
    return Path(f"photos/{number}.bin")


def take(log: str) -> None:
    """Have all items made: the driver. Batches that are begun are written to the log."""
    md5s = {path: md5_of(path.read_bytes()) for path in (MODEL, *map(photo, range(ITEMS)))}
    wanted = Wanted(RECIPES, {}, Maker({}, {}))
    work = Work(
        Numbered(Path(log), SECONDS),
        inputs=lambda numbers: (numbers, [photo(number) for number in numbers]),
        files=lambda numbers: {p: md5s[p] for p in (MODEL, *map(photo, numbers))},
    )
    try:
        with ItemCache("bench") as cache:
            cache.take(wanted, work, BATCH)
    except BobError as error:
        sys.exit(f"bob: {error}")


class Bench:
    """A project whose items are made again and again, and a cluster that is repaired each time."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._draw = folder, random.Random(seed)
        self._log = folder / "made.log"
        self._project = repository(folder / "project")
        index = self._project / ".dvc/cache/bob/items.sqlite"
        index.parent.mkdir(parents=True)
        self._index = Index(index)
        (self._project / "photos").mkdir()
        for number in range(ITEMS):
            (self._project / photo(number)).write_bytes(numbered_photo(number))
        (self._project / MODEL).write_bytes(random.Random(0).randbytes(20 * 2**20))
        self._cluster: Cluster | None = None
        self.undisturbed = 0.0

    def cluster(self, nodes: int = NODES) -> Cluster:
        """A cluster that is whole."""
        for _ in range(ATTEMPTS):  # on a busy machine, some do not come up in Ray's time
            if self._cluster is None:
                self._cluster = Cluster(self._folder, self._project, CPUS)
            if self._cluster.resize(nodes):
                return self._cluster
        log = (self._folder / "ray.log").read_text()
        raise click.ClickException(f"{log[-3000:]}\nno cluster of {nodes} nodes")

    def shut_down(self) -> None:
        """End the cluster."""
        if self._cluster:
            self._cluster.shut_down()
        self._cluster = None

    def forget(self) -> None:
        """Begin with nothing made."""
        for row in self._index.all():
            object_of(self._project, row.oid).unlink(missing_ok=True)
        self._index.drop(self._index.all())
        self._log.unlink(missing_ok=True)

    def start(self, cluster: Cluster) -> "subprocess.Popen[str]":
        """The driver."""
        code = f"import bench.cluster_faults as b; b.take({str(self._log)!r})"
        return drive(code, self._project, cluster.environment)

    def measure(self, runs: int = 3) -> None:
        """Measure what an undisturbed run takes."""
        seconds = []
        for _ in range(runs):
            self.forget()
            cluster, began = self.cluster(), time.monotonic()
            errors, wrong = self._end(self.start(cluster))
            seconds.append(time.monotonic() - began)
            if wrong := wrong + self._wrong(errors):
                raise click.ClickException(f"an undisturbed run: {'; '.join(wrong)}")
        self.undisturbed = statistics.median(seconds)

    def fault(self, kind: str) -> Fault:
        """Begin with nothing made, break something, and run to the end."""
        while True:
            self.forget()
            cluster = self.cluster(NODES - 1 if kind == "late" else NODES)
            after = self._draw.uniform(0, self.undisturbed)
            began = time.monotonic()
            driver = self.start(cluster)
            time.sleep(after)
            if self._break(kind, cluster, driver):
                break
            driver.wait()  # it had ended, or was about to
        errors, wrong = self._end(driver)
        seconds = time.monotonic() - began
        survived = driver.returncode == 0
        if kind != "driver" and not survived and not _is_one_line(driver.returncode, errors):
            wrong.append(f"ended with {driver.returncode}")
        if left := self._left(kind, cluster):
            wrong.append(f"left running: {', '.join(left)}")
        self._repair(kind, cluster)
        ended = "" if survived else errors
        if not survived:
            cluster, began = self.cluster(), time.monotonic()
            errors, hung = self._end(self.start(cluster))
            seconds += time.monotonic() - began
            wrong += hung
        wrong += self._wrong(errors)
        excess = len(self._made()) - ITEMS
        if excess > ALLOWED[kind]:
            wrong.append(f"{excess} items too many were made")
        if self._cluster and not self._cluster.resize(NODES):
            wrong.append("not all CPUs of the cluster are free")
        lost = seconds - self.undisturbed
        return Fault(kind, after, survived, ended, excess, lost, tuple(wrong))

    def _break(self, kind: str, cluster: Cluster, driver: "subprocess.Popen[str]") -> bool:
        """Break it; False where the driver had ended by then."""
        node = self._draw.choice(cluster.nodes)
        while kind == "worker" and not cluster.workers() and driver.poll() is None:
            time.sleep(0.05)
        if driver.poll() is not None:
            return False
        if kind == "worker":
            self._draw.choice(cluster.workers()).kill()
        elif kind == "node":
            node.pull_the_plug()
        elif kind == "silent":
            node.stand_still()
        elif kind == "raylet":
            _kill(node, "raylet")
        elif kind == "driver":
            driver.kill()
        elif kind == "head":
            _kill(cluster.head, "gcs_server")
        elif kind == "home":
            _kill(cluster.head, "raylet")
        elif kind == "disk":
            node.fill()
        else:
            cluster.join()
        return True

    def _repair(self, kind: str, cluster: Cluster) -> None:
        """Take away what is broken; `cluster` puts new machines in its place."""
        if kind in ("head", "home"):
            self.shut_down()
        for node in cluster.nodes:
            if kind == "disk":
                node.empty()
            elif node.stands_still:
                node.pull_the_plug()

    def _end(self, driver: "subprocess.Popen[str]") -> tuple[str, list[str]]:
        """Wait for a driver's end: what it wrote on stderr, and what is wrong."""
        try:
            _, errors = driver.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            driver.kill()
            _, errors = driver.communicate()
            return errors.strip(), [f"hung for {LIMIT} s"]
        return errors.strip(), []

    def _left(self, kind: str, cluster: Cluster) -> list[str]:
        """Names of workers that do not go when the driver is gone."""
        seconds = SECONDS_WITHOUT_HEAD if kind in ("head", "home") else SECONDS_TO_GO
        end = time.monotonic() + seconds
        while (left := cluster.workers()) and time.monotonic() < end:
            time.sleep(0.2)
        return [process.name() for process in left if alive(process)]

    def _made(self) -> list[int]:
        """The items that were begun, in the order of it."""
        return [int(number) for number in self._log.read_text().split()]

    def _wrong(self, errors: str) -> list[str]:
        """What is not as it should be where all items should be there."""
        wrong = []
        if again := [n for n, times in Counter(self._made()).items() if times > 2]:
            wrong.append(f"items {again} were made more than twice")
        rows = {row.recipe: row for row in self._index.all()}
        for number, recipe in enumerate(RECIPES):
            if recipe not in rows:
                return [*wrong, f"item {number} is missing; the driver says: {errors}"]
            path = object_of(self._project, rows[recipe].oid)
            if not path.is_file() or path.read_bytes() != numbered(number):
                wrong.append(f"item {number} has other bytes")
        return wrong


def _kill(machine: Machine, name: str) -> None:
    for process in machine.named(name):
        process.kill()


def _is_one_line(code: int, errors: str) -> bool:
    """Whether it ended by itself and said why; warnings stand before it."""
    *warnings, last = errors.splitlines() or [""]
    told = all(line.startswith(("warning: ", "waiting for ")) for line in warnings)
    return code == 1 and told and last.startswith("bob: ")


@click.command(help=__doc__)
@click.option("--faults", "count", default=40, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--kind", "kinds", multiple=True, type=click.Choice(KINDS), default=KINDS)
def main(count: int, seed: int, kinds: tuple[str, ...]) -> None:
    done = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), seed)
        try:
            bench.measure()
            click.echo(f"an undisturbed run takes {bench.undisturbed:.1f} s")
            for number in range(count):
                fault = bench.fault(kinds[number % len(kinds)])
                done.append(fault)
                click.echo(f"{number + 1:3} {fault}")
        finally:
            bench.shut_down()
    click.echo()
    for kind in kinds:
        click.echo(summary(kind, [fault for fault in done if fault.kind == kind]))
    sys.exit(any(fault.wrong for fault in done))


def summary(kind: str, faults: Sequence[Fault]) -> str:
    """A row of the table."""
    lost = sorted(fault.lost for fault in faults) or [0.0]
    return (
        f"{kind:8}{len(faults):4} faults, {sum(fault.survived for fault in faults):3} survived, "
        f"{max((fault.excess for fault in faults), default=0):3} items too many at most, "
        f"{statistics.median(lost):6.1f} s lost ({lost[0]:.1f} to {lost[-1]:.1f}), "
        f"{sum(bool(fault.wrong) for fault in faults)} wrong"
    )


if __name__ == "__main__":
    main()
