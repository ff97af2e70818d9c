"""What a Ray cluster costs where the work itself costs nothing: speed-up, items a second, memory.

    python -m bench.cluster_overhead [--part speedup] [--part rate] [--part memory]

A cluster on this machine, of a head that makes nothing and a node with N logical CPUs; the driver
is a process of its own. Speed-up: items of one second's sleep, 20 a worker. Rate: items of 400 kB
that are made in no time, so that everything but the making is measured. Memory: what the driver has
of its own, shared memory left out, while 100,000 small items and 10,000 of 400 kB come.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import psutil

from bench.clusters import Instant, Meeting, Sleeping, cluster, drive, repository
from bob.cache.index import Row
from bob.cache.items import ItemCache
from bob.cache.recipe import Maker, item_key
from bob.cache.wanted import Wanted
from bob.cache.work import Work

WORKERS = (1, 2, 4, 8, 16, 32, 64)
IMAGE = 400_000  # bytes


class WatchedCache(ItemCache):
    """An item cache that notes the driver's memory as items come."""

    def __init__(self, stage: str) -> None:
        super().__init__(stage)
        self.seen: list[tuple[int, float]] = []

    def keep(self, *arguments: Any) -> dict[str, Row]:
        rows = super().keep(*arguments)
        memory = psutil.Process().memory_info()
        self.seen.append((self.made, (memory.rss - memory.shared) / 2**20))
        return rows


def wanted(name: str, count: int) -> Wanted:
    return Wanted([item_key(name=name, number=n) for n in range(count)], {}, Maker({}, {}))


def take(make: Callable[..., Any], workers: int, items: int, batch: int, meet: bool) -> None:
    """Have the items made and print how long it took, as JSON; `meet`: all workers begin first."""
    with WatchedCache("bench") as cache:
        began = time.monotonic()
        if meet:
            folder = Path("meeting")
            folder.mkdir()
            cache.take(wanted("met", workers), Work(Meeting(folder.absolute(), workers)), 1)
        started = time.monotonic()
        cpu = time.process_time()
        cache.seen.clear()
        cache.take(wanted("item", items), Work(make), batch)
        ended = time.monotonic()
        click.echo(
            json.dumps(
                {
                    "start": started - began,
                    "work": ended - started,
                    "cpu": time.process_time() - cpu,
                    "seen": cache.seen[:: max(1, len(cache.seen) // 100)],
                }
            )
        )


def run(folder: Path, address: str | None, make: str, *settings: object) -> dict[str, Any]:
    """Call `take` in a driver of its own, in a new repository."""
    arguments = ", ".join(map(repr, settings))
    project = repository(folder / "project")
    driver = drive(
        f"from bench.cluster_overhead import *; take({make}, {arguments})",
        project,
        {"RAY_ADDRESS": address} if address else {"BOB_EXECUTOR": "local"},
    )
    output, _ = driver.communicate()
    shutil.rmtree(project)
    if driver.returncode:
        raise click.ClickException("the driver failed")
    measured: dict[str, Any] = json.loads(output.splitlines()[-1])
    return measured


def speedup(folder: Path, workers: Sequence[int], rounds: int) -> list[dict[str, float]]:
    """Items of one second, `rounds` a worker: seconds with the workers there already, and not."""
    found = []
    for count in workers:
        with cluster(folder, count) as ray_cluster:
            settings = ("Sleeping(1.0)", count, count * rounds, 1)
            warm = run(folder, ray_cluster.address, *settings, True)
            cold = run(folder, ray_cluster.address, *settings, False)
        row = {
            "workers": count,
            "start": warm["start"],
            "warm": warm["work"],
            "cold": cold["work"],
            "cpu": warm["cpu"],
        }
        click.echo(
            f"{count:3} workers: {count * rounds / row['warm']:6.2f} times one a second "
            f"({rounds / row['warm']:.1%} of ideal); with their start {count * rounds / row['cold']:6.2f} "
            f"({rounds / row['cold']:.1%}); they start in {row['start']:.1f} s; "
            f"driver's CPU {row['cpu'] / row['warm']:.1%}"
        )
        found.append(row)
    return found


def rate(folder: Path, items: int, workers: Sequence[int], batch: int) -> list[dict[str, float]]:
    """Items of 400 kB that are made in no time: how many a second are kept."""
    found = []
    made_by = [(0, None), *((count, count) for count in workers)]
    for count, slots in made_by:
        settings = (f"Instant({IMAGE})", count, items, batch, slots is not None)
        if slots is None:
            measured = run(folder, None, *settings)
        else:
            with cluster(folder, slots) as ray_cluster:
                measured = run(folder, ray_cluster.address, *settings)
        row = {"workers": count, "rate": items / measured["work"], "cpu": measured["cpu"]}
        click.echo(
            f"{count or 'no'} workers: {row['rate']:.0f} items of {IMAGE // 1000} kB a second; "
            f"driver's CPU {row['cpu'] / measured['work']:.0%}"
        )
        found.append(row)
    return found


@click.command(help=__doc__)
@click.option("--part", "parts", multiple=True, default=("speedup", "rate", "memory"))
@click.option("--workers", multiple=True, type=int, default=WORKERS, show_default=True)
@click.option("--rounds", default=20, show_default=True, help="Items of a second for each worker.")
@click.option("--items", default=4000, show_default=True, help="Items of 400 kB.")
@click.option("--batch", default=8, show_default=True)
def main(parts: Sequence[str], workers: Sequence[int], rounds: int, items: int, batch: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "speedup" in parts:
            speedup(folder, workers, rounds)
        if "rate" in parts:
            rate(folder, items, (1, 2), batch)


if __name__ == "__main__":
    main()
