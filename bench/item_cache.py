"""What it costs to plan a large set of images and to find all of them in the item cache.

    python -m bench.item_cache [--items 100000] [--size 8000]

A DVC repository is made with that many objects of random bytes; then a process of its own plans the
set, hashes every recipe and looks all up, as `bob generate` does before it links the files, and so
does another: the first hashes every object, the second finds that they have been. Printed: seconds
of each step, and how much memory the process took beyond its imports.
"""

import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from bob.cache.items import ItemCache
from bob.cache.recipe import Maker
from bob.cache.wanted import Wanted
from bob.cache.work import Work
from bob.formats.manifest import Generated
from bob.formats.photos import Task
from bob.formats.prompts import Context, Entry
from bob.stages.generate import plan

CLASSES = 100
SETTINGS = {"model": "0" * 32, "lora": "0" * 32, "steps": 20, "batch_size": 32}


def planned(count: int) -> list[Generated]:
    task = Task("bird", tuple(f"Bird {number}" for number in range(CLASSES)))
    bank = [
        Entry(str(number), f"Bird {number % CLASSES}", Context(f"place {number}", f"pose {number}"))
        for number in range(500)
    ]
    return plan(
        task, bank, source="bank", images_per_class=count // CLASSES, seed=0, common=SETTINGS
    )


def wanted_of(images: list[Generated]) -> Wanted:
    return Wanted([image.recipe for image in images], SETTINGS, Maker({}, {}))


def fill(count: int, size: int) -> None:
    """Make a DVC repository of the current folder, and `count` items of `size` bytes in it."""
    from dvc.repo import Repo

    Repo.init(no_scm=True).close()
    with ItemCache("generate") as cache:
        cache.take(
            wanted_of(planned(count)),
            Work(lambda numbers: [random.Random(one).randbytes(size) for one in numbers]),
            5000,
            "filling",
        )


def look_up(count: int) -> None:
    """Print what it takes to plan and find them."""
    with ItemCache("generate") as cache:  # imports DVC
        pass
    imported = _peak_mb()
    began = time.monotonic()
    images = planned(count)
    planning = time.monotonic()
    wanted = wanted_of(images)
    hashing = time.monotonic()
    with ItemCache("generate") as cache:
        cache.take(wanted, Work(_none), 32)
        if cache.made or cache.reused != len(wanted.recipes):
            raise click.ClickException("not all items were found")
    found = time.monotonic()
    click.echo(
        f"{len(images):,} items: plan {planning - began:.1f} s, "
        f"recipes {hashing - planning:.1f} s, "
        f"look up and verify {found - hashing:.1f} s; memory {_peak_mb() - imported:.0f} MB "
        f"beyond the {imported:.0f} MB of the imports"
    )


def _none(positions: list[int]) -> list[bytes]:
    raise click.ClickException(f"{len(positions)} items were not found")


def _peak_mb() -> float:
    status = Path("/proc/self/status")
    if status.exists():  # `ru_maxrss` would count what the parent had when it started this process
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024**2 if sys.platform == "darwin" else 1024)


@click.command(help=__doc__)
@click.option("--items", "count", default=100_000, show_default=True)
@click.option("--size", default=8000, show_default=True, help="Bytes of an item.")
def main(count: int, size: int) -> None:
    root = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            fill(count, size)
            for _ in range(2):
                subprocess.run(
                    [sys.executable, "-c", f"import bench.item_cache as b; b.look_up({count})"],
                    env=os.environ | {"PYTHONPATH": str(root)},
                    check=True,
                )
        finally:
            os.chdir(root)


if __name__ == "__main__":
    main()
