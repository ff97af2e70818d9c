"""Break stages at random moments, look at what is left, run them again, and compare.

    python -m bench.faults [--rounds 100] [--minutes M] [--seed 0] [--kind KIND] [--stage STAGE]

A round takes a finished tiny project, takes away or alters a stage's output and forgets some of its
items, runs the stage, and breaks it:

* kill: SIGKILL
* stop: SIGTERM, SIGINT, or SIGSTOP and SIGCONT
* disk: the file system, a tmpfs, has room for a part of what the stage writes, in bytes or in files
* rights: a folder or a file that may not be written to, or not be read

Then the exit status and what is said must be what docs/errors.md promises, every output whole or
absent, every object named by its hash, and every row of the index must have its object. Run again,
the stage must write the undisturbed run's bytes, and begin no more items a second time than those
in flight. A round is known by its seed and number: `--first NUMBER --rounds 1` repeats it, but for
the moment at which a signal arrives. Needs Linux, and root or user namespaces, to mount the tmpfs;
the stages run without root's capabilities, since these ignore modes.
"""

import hashlib
import math
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from ruamel.yaml import YAML

from bench.broken import FaultySystem, Run, prepare
from bench.counted import made
from bench.project import forget, index_of, object_of
from bob.cache.index import Index
from tests.dvc_project import TINY, make_project

KINDS = ("kill", "stop", "disk", "rights")
STAGES = (
    "split",
    "caption",
    "finetune",
    "generate",
    "audit",
    "classify",
    "evaluate",
    "export",
    "card",
    "report",
)
# In this order they make all that those above need.
PIPELINE = ("draw", *STAGES[:8], "benchmark", *STAGES[8:])
# Batches enough that a fault often hits one.
SETTINGS = TINY | {
    "data": {"shots": 3},
    "caption": {"batch_size": 2},
    "generate": {"images_per_class": 6, "steps": 2, "batch_size": 3},
    "classify": {"epochs": 2, "seeds": [0, 1], "batch_size": 4, "warmup_epochs": 1},
}
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGSTOP)
STATUSES = {
    "SIGKILL": [-signal.SIGKILL],
    "SIGTERM": [-signal.SIGTERM],
    "SIGINT": [130, -signal.SIGINT],  # the latter when it has done its work
}
PLACES = (
    ".",
    ".dvc",
    ".dvc/cache",
    ".dvc/cache/bob",
    ".dvc/cache/files/md5",
    ".dvc/tmp",
    "data",
    "data/miniature",
    "metrics",
    "models",
    "results",
    "results/items",
    "results/split",
    "results/{stage}",
)
SECONDS_TO_LISTEN = 0.05  # after which a fork is in the stage, and Ctrl-C no longer this module's
RIGHTS = ("not written to", "not written to, nor what is in it", "not read", "a file not read")


@dataclass
class Undisturbed:
    """What a stage does when nothing breaks it, nothing of it being there."""

    run: Run
    outputs: dict[str, str | None]
    """Path -> digest."""
    items: int


@dataclass
class Round:
    """One fault, and what came of it."""

    number: int
    kind: str
    stage: str
    fault: str = ""
    run: Run | None = None
    again: int = 0
    """Items begun in the broken run and the one after it, less the need."""
    losses: list[str] = field(default_factory=list)


# --- what is on the disk ------------------------------------------------------------------------


def digest(path: Path) -> str | None:
    """Hash of a file, or of all files in a folder and their names; None where there is nothing."""
    if not os.path.lexists(path):
        return None
    hashed = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        hashed.update(f"{file.relative_to(path)}\n".encode())
        if file.is_file():
            hashed.update(file.read_bytes())
    return hashed.hexdigest()


def outputs_of(project: Path, stage: str) -> list[str]:
    """Paths of a stage's outputs and metrics in dvc.yaml."""
    described = YAML(typ="safe").load(project / "dvc.yaml")["stages"][stage]
    return [
        one if isinstance(one, str) else next(iter(one))
        for one in (*described["outs"], *described.get("metrics", ()))
    ]


def workspace(project: Path, outputs: Sequence[str]) -> set[str]:
    """All paths in the project that are neither DVC's, git's nor below the outputs."""
    found = set()
    for folder, folders, files in os.walk(project):
        here = Path(folder).relative_to(project)
        folders[:] = [
            one
            for one in folders
            if str(here / one) not in outputs and one not in (".dvc", ".git", "__pycache__")
        ]
        found |= {str(here / one) for one in (*folders, *files)}
    return found - set(outputs)


def faults_of_cache(project: Path) -> Iterator[str]:
    """What is wrong in the object store and in the index."""
    store = project / ".dvc/cache/files/md5"
    for path in store.glob("*/*"):
        name = path.parent.name + path.name
        if len(name) == 32 and hashlib.md5(path.read_bytes()).hexdigest() != name:
            yield f"object {name} is not what its name says"
    folder = project / ".dvc/cache/bob"
    # A copy, since who opens it rolls back what was begun in it, and that is bob's to do.
    with tempfile.TemporaryDirectory() as copy:
        for path in folder.glob("items.sqlite*"):
            shutil.copy(path, copy)
        index = Path(copy, "items.sqlite")
        if not index.exists():
            return
        db = sqlite3.connect(index)
        if (said := db.execute("PRAGMA quick_check").fetchall()) != [("ok",)]:
            yield f"the index is damaged: {said}"
        db.close()
        for row in Index(index).all():
            path = object_of(project, row.oid)
            if not path.exists() or path.stat().st_size != row.size:
                yield f"the index names object {row.oid} of {row.stage}, which is not there"


def needed(stages: Sequence[str]) -> Sequence[str]:
    """These stages and all before them, in their order."""
    return PIPELINE[: 1 + max(map(PIPELINE.index, stages))]


# --- a round ------------------------------------------------------------------------------------


class Project:
    """A finished tiny project that is broken and mended again and again."""

    def __init__(self, system: FaultySystem, stages: Sequence[str]) -> None:
        self.system = system
        self.root = make_project(system.mount / "project", SETTINGS)
        self.undisturbed: dict[str, Undisturbed] = {}
        for stage in needed(stages):
            system.log.unlink(missing_ok=True)
            run = system.run(self.root, stage)
            if run.status:
                raise click.ClickException(f"{stage} failed undisturbed: {run.said}")
            outputs = {one: digest(self.root / one) for one in outputs_of(self.root, stage)}
            self.undisturbed[stage] = Undisturbed(run, outputs, self._begun(stage))
        self._whole = system.outside / "whole"
        shutil.copytree(self.root, self._whole, symlinks=True)

    def restore(self) -> None:
        """Bring back the finished project."""
        shutil.rmtree(self.root)
        shutil.copytree(self._whole, self.root, symlinks=True)

    def _begun(self, stage: str) -> int:
        return sum(self._batches(stage))

    def _batches(self, stage: str) -> list[int]:
        return made(self.system.log).get(stage, [])

    def unmake(self, stage: str, draw: random.Random) -> dict[str, str | None]:
        """Take away a stage's output, or make it another; returns path -> digest as it is then."""
        older = draw.random() < 0.5
        for name in self.undisturbed[stage].outputs:
            path = self.root / name
            if not older:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            elif path.is_dir():
                (path / "older").write_text("what was there before\n")
            else:
                path.unlink()
                path.write_text("what was there before\n")
        return {name: digest(self.root / name) for name in self.undisturbed[stage].outputs}

    def forget(self, stage: str, draw: random.Random) -> int:
        """Forget a random part of the stage's items, all as often as not; returns how many."""
        index = index_of(self.root)
        if not index.path.exists():  # as long as no stage with items has run
            return 0
        rows = [row for row in index.all() if row.stage == stage]
        if draw.random() < 0.5:
            rows = draw.sample(rows, draw.randint(0, len(rows)))
        forget(self.root, rows)
        # What `split` keeps in the index are no items that a log tells of.
        return len(rows) if self.undisturbed[stage].items else 0

    def round(self, number: int, kind: str, stage: str, draw: random.Random) -> Round:
        """Break `stage` once, and run it again."""
        done = Round(number, kind, stage)
        before, need = self.unmake(stage, draw), self.forget(stage, draw)
        self.system.log.unlink(missing_ok=True)
        outputs = self.undisturbed[stage].outputs
        beside = workspace(self.root, list(outputs))
        done.fault, done.run = getattr(self, f"_{kind}")(stage, draw)
        done.losses += self._said(done)
        done.losses += self._left(done, before, beside)
        run = self.system.run(self.root, stage)
        if run.status or "Traceback" in run.said:
            done.losses.append(f"run again it ended with {run.status}: {run.said}")
        for name, expected in outputs.items():
            if digest(self.root / name) != expected:
                done.losses.append(f"{name} is another when run again")
        if extra := workspace(self.root, list(outputs)) ^ beside:
            done.losses.append(f"not as before when run again: {sorted(extra)}")
        done.losses += faults_of_cache(self.root)
        batches = self._batches(stage)
        done.again = sum(batches) - need
        if done.again > 2 * max(batches, default=0):
            done.losses.append(f"{done.again} items too many were begun")
        return done

    def _left(self, done: Round, before: dict[str, str | None], beside: set[str]) -> Iterator[str]:
        """What is wrong with what the broken run has left."""
        assert done.run
        after = self.undisturbed[done.stage].outputs
        for name in after:
            found = digest(self.root / name)
            if found not in (None, before[name], after[name]):
                yield f"{name} is half-written"
            if done.run.status == 0 and found != after[name]:
                yield f"it ended well, and {name} is another"
            if found is None and before[name] and done.run.status >= 0:
                yield f"{name}, which was there, is gone"
        extra = workspace(self.root, list(after)) - beside
        if done.run.status < 0:  # nobody was there to tidy up
            extra = {one for one in extra if not _is_draft(one)}
        if extra:
            yield f"left behind: {sorted(extra)}"
        yield from faults_of_cache(self.root)

    def _said(self, done: Round) -> Iterator[str]:
        """What is wrong with the exit status and with what was said."""
        assert done.run
        status, kind = done.run.status, done.kind
        expected = {"disk": [1], "rights": [1]}.get(kind, STATUSES.get(done.fault.split()[0], []))
        if status not in (0, *expected):
            yield f"exit status {status}"
        usual = set(self.undisturbed[done.stage].run.said.splitlines())
        # A blank line ends the one that the terminal's ^C is in.
        lines = [one for one in done.run.said.splitlines() if one.strip() and one not in usual]
        errors = [one for one in lines if one.startswith("Error: ")]
        if len(errors) != (status == 1) or "Traceback" in done.run.said:
            yield "not one line is said"
        others = [one for one in lines if one not in errors and "warning: " not in one]
        if others:
            yield f"said beside it: {others}"
        if kind == "disk" and errors and "full" not in errors[0]:
            yield "the line does not say that the disk is full"

    # --- the faults ------------------------------------------------------------------------------

    def _moment(self, stage: str, draw: random.Random) -> float:
        """Seconds after which a stage is likely to run still: the first run was the slowest."""
        return draw.uniform(0, 0.8 * self.undisturbed[stage].run.seconds)

    def _kill(self, stage: str, draw: random.Random) -> tuple[str, Run]:
        after = self._moment(stage, draw)
        run = self.system.run(self.root, stage, signal.SIGKILL, after)
        return f"SIGKILL after {after:.3f} s", run

    def _stop(self, stage: str, draw: random.Random) -> tuple[str, Run]:
        after = SECONDS_TO_LISTEN + self._moment(stage, draw)
        number = draw.choice(SIGNALS)
        run = self.system.run(self.root, stage, number, after)
        return f"{number.name} after {after:.3f} s", run

    def _disk(self, stage: str, draw: random.Random) -> tuple[str, Run]:
        run = self.undisturbed[stage].run
        if draw.random() < 0.75:
            room, what = draw.randint(0, run.pages), "pages"
        else:
            room, what = draw.randint(0, run.files), "files"
        with self.system.room(**{what: room}):
            return f"room for {room} {what}", self.system.run(self.root, stage)

    def _rights(self, stage: str, draw: random.Random) -> tuple[str, Run]:
        place = draw.choice(PLACES).format(stage=stage)
        how = draw.choice(RIGHTS)
        path = self.root / place
        if not path.is_dir():
            path = path.parent
        if how == "a file not read":
            files = [one for one in sorted(path.rglob("*")) if one.is_file()]
            path = draw.choice(files or [path])
        changed = [path]
        if "nor" in how:
            changed += [one for one in path.rglob("*") if not one.is_symlink()]
        modes = [one.stat().st_mode for one in changed]
        for one, mode in zip(changed, modes, strict=True):
            one.chmod(mode & 0o555 if "written" in how else 0)
        try:
            run = self.system.run(self.root, stage)
        finally:
            for one, mode in zip(changed, modes, strict=True):
                if one.exists():
                    one.chmod(mode)
        return f"{path.relative_to(self.root)}: {how}", run


def _is_draft(path: str) -> bool:
    return any(part.startswith(".") for part in Path(path).parts)


# --- all rounds ---------------------------------------------------------------------------------


def rounds(
    project: Project, numbers: Iterable[int], seed: int, kinds: Sequence[str], stages: Sequence[str]
) -> Iterator[Round]:
    """Break the project once for each number; it is restored where that has lost something."""
    for number in numbers:
        draw = random.Random(f"{seed}:{number}")
        done = project.round(number, draw.choice(kinds), draw.choice(stages), draw)
        if done.losses:
            project.restore()
        yield done


def table(done: Sequence[Round]) -> Iterator[str]:
    """Rounds by kind, in Markdown."""
    yield "| kind | rounds | of which broke the stage | items begun again | losses |"
    yield "|---|---|---|---|---|"
    for kind in KINDS:
        of_kind = [one for one in done if one.kind == kind]
        broken = sum(one.run is not None and one.run.status != 0 for one in of_kind)
        again = sum(one.again for one in of_kind)
        losses = sum(bool(one.losses) for one in of_kind)
        yield f"| {kind} | {len(of_kind)} | {broken} | {again} | {losses} |"


def repeat(system: FaultySystem, options: dict[str, Any]) -> int:
    """Break a project as the options say; returns how many rounds have lost something."""
    stages, kinds = options["stages"] or STAGES, options["kinds"] or KINDS
    prepare(needed(stages))
    project = Project(system, stages)
    first, until = options["first"], time.monotonic() + 60 * options["minutes"]
    done = []
    for one in rounds(
        project, range(first, first + options["count"]), options["seed"], kinds, stages
    ):
        done.append(one)
        status = one.run.status if one.run else ""
        if one.losses or options["verbose"]:
            click.echo(f"{one.number:5} {one.kind:6} {one.stage:8} {one.fault}: {status}")
            if options["verbose"] and one.run:
                click.echo(f"      {one.run.said.strip()}")
        for loss in one.losses:
            click.echo(f"      LOST: {loss}")
        if time.monotonic() > until:
            break
    click.echo("\n".join(table(done)))
    return sum(bool(one.losses) for one in done)


@click.command(help=__doc__)
@click.option("--rounds", "count", default=100, show_default=True)
@click.option("--minutes", default=math.inf, help="After which no other round begins.")
@click.option("--seed", default=0, show_default=True)
@click.option("--first", default=0, show_default=True, help="Number of the first round.")
@click.option("--kind", "kinds", multiple=True, type=click.Choice(KINDS), help="[default: all]")
@click.option("--stage", "stages", multiple=True, type=click.Choice(STAGES), help="[default: all]")
@click.option("--verbose", is_flag=True, help="Say of every round how it has ended.")
@click.option("--inside", is_flag=True, hidden=True)
def main(inside: bool, **options: Any) -> None:
    if not inside:  # of a mount namespace, which takes the tmpfs with it when it ends
        user = ["--user", "--map-root-user"] if os.geteuid() else []
        this = [sys.executable, "-m", "bench.faults", "--inside", *sys.argv[1:]]
        os.execvp("unshare", ["unshare", *user, "--mount", *this])
    with FaultySystem() as system:
        lost = repeat(system, options)
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
