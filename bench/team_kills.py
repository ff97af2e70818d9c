"""Kill pushes, pulls and takes of a team's cache at random moments; nothing may be lost or half.

    python -m bench.team_kills [--kills 20] [--seed 0] [--remote ssh]

Alice makes items and pushes them, Bob pulls and takes them; each is killed (SIGKILL) in turn. After
every kill, someone new pulls and takes all that the remote names: no shard or object may be damaged
or missing; and every object in Bob's cache must be whole. In the end both run undisturbed: Bob must
have all that Alice has made, byte for byte, and make nothing.
"""

import hashlib
import itertools
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from bench.remotes import REMOTES, Served

ROOT = Path(__file__).resolve().parents[1]
FIRST, MORE, SIZE = 1000, 300, 2000
"""Items at first and made before every push; bytes of one."""
MAKE = """
import random, sys
from bob.cache.items import ItemCache
from bob.cache.recipe import Maker, item_key
from bob.cache.wanted import Wanted
from bob.cache.work import Work

count = int(sys.argv[1])
with ItemCache("kills") as cache:
    if not count:  # all that are known
        recipes = [row.recipe for row in cache.index.all()]
    else:
        recipes = [item_key(number=number) for number in range(count)]
    rows = cache.take(
        Wanted(recipes, {"item": "kills"}, Maker({}, {})),
        Work(lambda positions: [random.Random(number).randbytes(SIZE) for number in positions]),
        500,
    )
    print(cache.made, len(rows))
""".replace("SIZE", str(SIZE))
PULL = ["-m", "bob", "cache", "pull"]
TAKE = f"from bob.cli import cli; cli(['cache', 'pull'], standalone_mode=False)\n{MAKE}"
PUSH = ["-m", "bob", "cache", "push"]


@dataclass(frozen=True)
class Kill:
    """One kill, and what was found after it."""

    what: str
    after: float
    """Seconds after it had started."""
    known: int
    """Items that the remote named then."""
    hit: bool
    """Whether it was still running."""
    faults: tuple[str, ...]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, *arguments: str) -> tuple[str, str]:
    """What a process says that must end well, and what it warns of."""
    process = start(folder, *arguments)
    said, warned = process.communicate()
    if process.returncode:
        raise click.ClickException(f"{arguments[:4]} failed: {warned}")
    return said, warned


def clone(folder: Path, served: Served) -> Path:
    folder.mkdir()
    run(folder, "-m", "dvc", "init", "--no-scm", "--quiet")
    served.configure(folder)
    return folder


def objects(folder: Path) -> list[Path]:
    """The objects in a repository's cache; not DVC's `.tmp` file of the one that a kill hit."""
    return list((folder / ".dvc/cache/files/md5").glob("*/" + "[0-9a-f]" * 30))


def damaged(folder: Path) -> list[str]:
    """What is wrong with the objects in a repository's cache."""
    return [
        f"{path} is damaged"
        for path in objects(folder)
        if hashlib.md5(path.read_bytes()).hexdigest() != path.parent.name + path.name
    ]


def seen(folder: Path, served: Served) -> tuple[int, list[str]]:
    """How many items someone new finds at the remote, and what is wrong with them."""
    clone(folder, served)
    _, warned = run(folder, *PULL)
    said, more = run(folder, "-c", MAKE, "0")
    made, known = map(int, said.split())
    faults = [line for line in (warned + more).splitlines() if line]
    return known, faults + ([f"{made} items had to be made"] if made else [])


def kills(folder: Path, served: Served, count: int, seed: int) -> Iterator[Kill]:
    """Kill until `count` were hit before their end; the last has what is wrong in the end, too."""
    draw = random.Random(seed)
    alice, bob = (clone(folder / name, served) for name in ("alice", "bob"))
    seconds = {"push": 5.0, "pull": 5.0}
    hits = 0
    for number in itertools.count():
        what = "pull" if number % 2 else "push"
        if what == "push":
            run(alice, "-c", MAKE, str(FIRST + number * MORE))
        process = start(alice, *PUSH) if what == "push" else start(bob, "-c", TAKE, "0")
        after = draw.uniform(0.2, 1) * seconds[what]
        took = killed_after(process, after)
        # By what is known of how long it takes: longer where it had to be killed.
        seconds[what] = took or 1.1 * seconds[what]
        hits += took is None
        known, faults = seen(folder / f"observer-{number}", served)
        if hits == count:
            faults += at_the_end(alice, bob, folder, served)
        yield Kill(what, after, known, took is None, (*faults, *damaged(bob)))
        if hits == count:
            return


def killed_after(process: subprocess.Popen[str], seconds: float) -> float | None:
    """Kill a process; returns its seconds where it had ended before."""
    began = time.monotonic()
    while (took := time.monotonic() - began) < seconds and process.poll() is None:
        time.sleep(0.01)
    ended = process.poll() is not None
    process.kill()
    process.communicate()
    return took if ended else None


def at_the_end(alice: Path, bob: Path, folder: Path, served: Served) -> list[str]:
    """What is wrong when all have run to their ends."""
    run(alice, *PUSH)
    total = len(objects(alice))
    run(bob, *PULL)
    made, known = map(int, run(bob, "-c", MAKE, "0")[0].split())
    faults = [f"Bob made {made} and has {known} of {total}"] if made or known != total else []
    return faults + seen(folder / "observer", served)[1] + damaged(alice)


@click.command(help=__doc__)
@click.option("--kills", "count", default=20, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--remote", type=click.Choice(list(REMOTES)), default="folder", show_default=True)
def main(count: int, seed: int, remote: str) -> None:
    faulty = 0
    with (
        tempfile.TemporaryDirectory() as folder,
        REMOTES[remote](Path(folder) / "storage") as served,
    ):
        for number, kill in enumerate(kills(Path(folder), served, count, seed), start=1):
            faulty += bool(kill.faults)
            click.echo(
                f"{number:3} {kill.what} after {kill.after:5.2f} s, {kill.known:5} items known"
                f"{'' if kill.hit else ', had ended'}"
                f"{''.join(f'; FAULT: {fault}' for fault in kill.faults)}"
            )
    click.echo(f"{remote}: {count} kills, {faulty} with faults")
    sys.exit(bool(faulty))


if __name__ == "__main__":
    main()
