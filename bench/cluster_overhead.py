"""What a Ray cluster costs where the work itself costs nothing: speed-up, items a second, memory.

    python -m bench.cluster_overhead [--part speedup] [--part rate] [--part memory] [--plot FILE]

A cluster on this machine, of a head that makes nothing and a node of N logical CPUs; the driver is
a process of its own. Speed-up: items of one second's sleep, one a batch, 20 a worker; once with
workers that are there already, once with their start. Rate: items of 400 kB that are made in no
time, so that all but the making is measured, also without Ray. Memory: what the driver has of its
own, shared memory left out, while 100,000 small items and 10,000 of 400 kB come.
"""

import json
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import psutil

from bench.clusters import Instant, Meeting, Sleeping, cluster, drive, repository
from bob.cache.index import Index, Row
from bob.cache.items import ItemCache
from bob.cache.recipe import Maker, item_key
from bob.cache.wanted import Wanted
from bob.cache.work import Work

PARTS = ("speedup", "rate", "memory")
WORKERS = (1, 2, 4, 8, 16, 32, 64)
IMAGE, SMALL = 400_000, 200  # bytes of an item
MAKERS: dict[str, Callable[..., Sequence[bytes]]] = {
    "sleeping": Sleeping(1.0),
    "images": Instant(IMAGE),
    "small": Instant(SMALL),
}


class WatchedCache(ItemCache):
    """An item cache that notes the driver's memory as items come."""

    def __init__(self, stage: str) -> None:
        super().__init__(stage)
        self.memory: list[tuple[int, float]] = []
        """Items made, and megabytes."""

    def keep(self, *arguments: Any) -> dict[str, Row]:
        rows = super().keep(*arguments)
        used = psutil.Process().memory_info()
        self.memory.append((self.made, (used.rss - used.shared) / 2**20))
        return rows


def take(maker: str, workers: int, items: int, batch: int, meet: bool) -> None:
    """The driver: print what it took to have the items made, as JSON.

    With `meet`, all workers have begun before that is measured.
    """
    seconds: dict[str, float] = defaultdict(float)
    timed(seconds, "hash and write", ItemCache, "_put")
    timed(seconds, "index", Index, "add")
    timed(seconds, "announce", Index, "start")
    with WatchedCache("bench") as cache:
        began = time.monotonic()
        if meet:
            folder = Path("meeting").absolute()
            folder.mkdir()
            cache.take(wanted("met", workers), Work(Meeting(folder, workers)), 1)
        started, cpu = time.monotonic(), time.process_time()
        seconds.clear()
        cache.memory.clear()
        cache.take(wanted("item", items), Work(MAKERS[maker]), batch)
        measured = {
            "start": started - began,
            "seconds": time.monotonic() - started,
            "cpu": time.process_time() - cpu,
            "steps": dict(seconds),
            "memory": cache.memory,
        }
    click.echo(json.dumps(measured))


def wanted(name: str, count: int) -> Wanted:
    return Wanted([item_key(name=name, number=n) for n in range(count)], {}, Maker({}, {}))


def timed(seconds: dict[str, float], step: str, owner: type, method: str) -> None:
    """Add what a method takes to the seconds of a step, whichever thread calls it."""
    original = getattr(owner, method)

    def call(*arguments: Any, **named: Any) -> Any:
        began = time.monotonic()
        try:
            return original(*arguments, **named)
        finally:
            seconds[step] += time.monotonic() - began

    setattr(owner, method, call)


def run(folder: Path, address: str | None, *settings: object) -> dict[str, Any]:
    """What `take` measures in a driver of its own, in a new repository; no address: without Ray."""
    arguments = ", ".join(map(repr, settings))
    project = repository(folder / "project")
    driver = drive(
        f"import bench.cluster_overhead as b; b.take({arguments})",
        project,
        {"RAY_ADDRESS": address} if address else {"BOB_EXECUTOR": "local"},
    )
    output, errors = driver.communicate()
    shutil.rmtree(project)
    if driver.returncode:
        raise click.ClickException(f"the driver failed: {errors}")
    measured: dict[str, Any] = json.loads(output.splitlines()[-1])
    return measured


def speedup(folder: Path, workers: Sequence[int], rounds: int) -> list[dict[str, float]]:
    """Times as fast as one worker that loses nothing."""
    click.echo(
        "| workers | speed-up | of ideal | with their start | all there after | driver's CPU |\n"
        "|---|---|---|---|---|---|"
    )
    rows = []
    for count in workers:
        with cluster(folder, count) as ray_cluster:
            settings = ("sleeping", count, count * rounds, 1)
            warm = run(folder, ray_cluster.address, *settings, True)
            cold = run(folder, ray_cluster.address, *settings, False)
        row = {
            "workers": count,
            "speedup": count * rounds / warm["seconds"],
            "with_start": count * rounds / cold["seconds"],
        }
        rows.append(row)
        click.echo(
            f"| {count} | {row['speedup']:.2f} | {row['speedup'] / count:.1%} | "
            f"{row['with_start']:.2f} | {warm['start']:.1f} s | "
            f"{warm['cpu'] / warm['seconds']:.1%} |"
        )
    return rows


def rate(folder: Path, items: int, batch: int, workers: Sequence[int]) -> None:
    """Items of 400 kB a second, and what the driver does for one."""
    click.echo(
        f"| batches of {batch} by | items a second | driver's CPU | hash and write | index | "
        "announce |\n|---|---|---|---|---|---|"
    )
    for count in (0, *workers):
        settings = ("images", count, items, batch, bool(count))
        if count:
            with cluster(folder, count) as ray_cluster:
                measured = run(folder, ray_cluster.address, *settings)
        else:
            measured = run(folder, None, *settings)
        each = [
            measured["cpu"],
            *(measured["steps"][step] for step in ("hash and write", "index", "announce")),
        ]
        columns = " | ".join(f"{1000 * seconds / items:.2f} ms" for seconds in each)
        who = f"{count} workers" if count else "the driver itself"
        click.echo(f"| {who} | {items / measured['seconds']:.0f} | {columns} |")


def memory(folder: Path, maker: str, items: int, batch: int) -> None:
    """What the driver has while items come."""
    with cluster(folder, 2) as ray_cluster:
        measured = run(folder, ray_cluster.address, maker, 2, items, batch, True)
    seen = dict(measured["memory"])
    at = [min(seen, key=lambda n: abs(n - items * tenth // 10)) for tenth in (1, 2, 4, 6, 8, 10)]
    click.echo(
        f"{items:,} {maker} in batches of {batch}, {items / measured['seconds']:.0f} a second; "
        f"the driver's memory: {', '.join(f'{seen[n]:.0f} MB at {n:,}' for n in at)}"
    )


def plot(rows: Sequence[dict[str, float]], path: Path) -> None:
    """Speed-up against workers, both axes logarithmic."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    plt.rcParams["svg.hashsalt"] = "bob"  # the same figure, the same bytes
    figure, axes = plt.subplots(figsize=(5, 4))
    workers = [row["workers"] for row in rows]
    axes.plot(workers, workers, color="0.7", label="ideal")
    axes.plot(workers, [row["speedup"] for row in rows], "o-", label="workers that are there")
    axes.plot(workers, [row["with_start"] for row in rows], "s--", label="with their start")
    for set_scale in (axes.set_xscale, axes.set_yscale):
        set_scale("log", base=2)
    axes.set(
        xlabel="workers", ylabel="items a second", xticks=workers, xticklabels=map(str, workers)
    )
    axes.set(yticks=workers, yticklabels=map(str, workers))
    axes.legend()
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")


@click.command(help=__doc__)
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), default=PARTS)
@click.option("--workers", multiple=True, type=int, default=WORKERS, show_default=True)
@click.option("--rounds", default=20, show_default=True, help="Items of a second for each worker.")
@click.option("--items", default=10_000, show_default=True, help="Items of 400 kB.")
@click.option("--batch", default=32, show_default=True, help="Of items of 400 kB.")
@click.option("--plot", "path", type=click.Path(path_type=Path), help="SVG of the speed-up.")
def main(
    parts: Sequence[str],
    workers: Sequence[int],
    rounds: int,
    items: int,
    batch: int,
    path: Path | None,
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "speedup" in parts:
            rows = speedup(folder, workers, rounds)
            if path:
                plot(rows, path)
        if "rate" in parts:
            rate(folder, items, batch, (1, 2))
        if "memory" in parts:
            memory(folder, "small", 10 * items, 100)
            memory(folder, "images", items, batch)


if __name__ == "__main__":
    main()
