"""What a team's cache of many items costs: to push, to join, to take from and to pack.

    python -m bench.team_cache [--items 1000000] [--size 200] [--taken 1000]

The remote is a folder. Each step is a process of its own; printed are its seconds (imports
included), the memory that it took beyond its imports, and the bytes of the index at the remote.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from bench.remotes import folder as folder_remote
from bench.team_kills import ROOT, clone
from bob.cache.items import ItemCache
from bob.cache.recipe import Maker, item_key
from bob.cache.wanted import Wanted
from bob.cache.work import Work

MEASURED = """
import json, sys, time
from bench.item_cache import _peak_mb
from bob.cache.items import ItemCache
from bob.commands import team

began = time.monotonic()
with ItemCache():  # imports DVC
    pass
import dvc.data_cloud
imported = _peak_mb()
{work}
print(json.dumps([time.monotonic() - began, _peak_mb() - imported]))
"""
FILL = """
from bench.team_cache import fill
fill({first}, {last}, {size})
"""


def fill(first: int, last: int, size: int) -> None:
    """Take these items in the current folder; those that are not there are random bytes."""
    recipes = [item_key(number=number) for number in range(first, last)]
    with ItemCache("team") as cache:
        cache.take(
            Wanted(recipes, {"item": "team"}, Maker({}, {})),
            Work(lambda numbers: [random.Random(first + one).randbytes(size) for one in numbers]),
            5000,
        )


def measure(what: str, folder: Path, work: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", MEASURED.format(work=work)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    *said, line = result.stdout.splitlines()
    seconds, memory = json.loads(line)
    click.echo(f"{what:34} {seconds:8.1f} s {memory:7.0f} MB  {'; '.join(said)}")


@click.command(help=__doc__)
@click.option("--items", "count", default=1_000_000, show_default=True)
@click.option("--size", default=200, show_default=True, help="Bytes of an item.")
@click.option("--taken", default=1000, show_default=True, help="Items that one who joins takes.")
def main(count: int, size: int, taken: int) -> None:
    with tempfile.TemporaryDirectory() as name, folder_remote(Path(name) / "storage") as served:
        alice, bob = (clone(Path(name) / one, served) for one in ("alice", "bob"))
        push, pull = "team.push(None)", "team.pull(None, read_only=False)"
        measure(f"make {count:,} items", alice, FILL.format(first=0, last=count, size=size))
        measure("push", alice, push)
        shards = list((Path(name) / "storage/bob/index").iterdir())
        total = sum(path.stat().st_size for path in shards)
        click.echo(
            f"  {len(shards)} shards, {total / 1e6:.1f} MB, {total / count:.1f} bytes an item"
        )
        measure("push again", alice, push)
        measure("pull where nothing is known", bob, pull)
        measure("pull again", bob, pull)
        measure(f"take {taken:,} items", bob, FILL.format(first=0, last=taken, size=size))
        more = FILL.format(first=count, last=count + taken, size=size)
        measure(f"make {taken:,} more", bob, more)
        measure("push those", bob, push)
        measure("gc --remote", alice, "team.gc(None)")
        measure("pull after gc", bob, pull)


if __name__ == "__main__":
    main()
