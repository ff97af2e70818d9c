"""Kill caption and generate at random moments, run them again, and compare with an undisturbed run.

    python -m bench.kills [--kills 50] [--seed 0]

A third of the kills (SIGKILL) hits DVC alone, a third the stage alone, a third the whole group.
After each, no process of the killed run may be left; the rerun's output must be the undisturbed one
byte for byte, and the items begun in both may exceed the need by no more than the batch being made
and the one before it, which is kept meanwhile.
"""

import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import psutil

from bench.project import batches_made, clear_log, forget_items
from bob.parent import alive
from tests.dvc_project import TINY, dvc, environment, make_project, real_python

OUTPUTS = {
    "caption": ["results/caption", "results/items/caption.jsonl"],
    "generate": ["results/generate", "results/items/generate.jsonl"],
}
TARGETS = ("dvc", "stage", "group")
# Batches enough that a kill often hits one, steps enough that a batch takes as long as it is.
SETTINGS = TINY | {
    "data": {"shots": 4},
    "caption": {"batch_size": 2},
    "generate": {"images_per_class": 12, "steps": 4, "batch_size": 4},
}


@dataclass(frozen=True)
class Kill:
    """One kill and the rerun after it."""

    stage: str
    target: str
    after: float
    """Seconds after the target had started."""
    excess: int
    """Items begun in the killed run and the rerun, less the need."""
    in_flight: int
    """The greatest excess that is allowed: the batches in flight."""
    faults: tuple[str, ...]


def digest(project: Path, stage: str) -> str:
    """Hash of everything that a stage has written."""
    hashed = hashlib.sha256()
    for output in OUTPUTS[stage]:
        path = project / output
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                hashed.update(f"{file.relative_to(project)}\n".encode() + file.read_bytes())
    return hashed.hexdigest()


def start(project: Path, stage: str, python: Path | None = None) -> subprocess.Popen[bytes]:
    """`dvc repro` of one stage, whatever DVC thinks of its state, in a process group of its own.

    What is to be killed, or timed, is to be run by the real Python.
    """
    return subprocess.Popen(
        ["python", "-m", "dvc", "repro", "--force", "--single-item", stage],
        cwd=project,
        env=environment(project, python),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def stage_of(dvc_process: psutil.Process) -> psutil.Process | None:
    """The stage that DVC runs, if it does at the moment."""
    try:
        for process in dvc_process.children(recursive=True):
            if "bench.counted" in process.cmdline():
                return process
    except psutil.NoSuchProcess:
        pass
    return None


def kill_and_rerun(
    project: Path, stage: str, target: str, after: float, need: int, expected: str
) -> Kill | None:
    """Begin with nothing made, kill `target` `after` seconds, run again to the end.

    Returns None where the target had ended before it could be killed.
    """
    forget_items(project, stage)
    clear_log(project)
    running = start(project, stage, real_python())
    dvc_process = psutil.Process(running.pid)
    faults = []
    victim = None
    while running.poll() is None and victim is None:
        victim = stage_of(dvc_process) if target == "stage" else dvc_process
        time.sleep(0.01)
    time.sleep(after)
    tree = [dvc_process, *_children(dvc_process)]
    if running.poll() is not None or victim is None or not alive(victim):
        running.wait()
        return None
    if target == "group":
        os.killpg(running.pid, signal.SIGKILL)
    else:
        victim.kill()
    running.wait()
    _, left = psutil.wait_procs(tree, timeout=5)
    left = [process for process in left if alive(process)]
    if left:
        faults.append(f"left running: {', '.join(process.name() for process in left)}")
    if start(project, stage).wait():
        faults.append("the rerun failed")
    elif digest(project, stage) != expected:
        faults.append("the rerun's output is another")
    batches = batches_made(project, stage)
    # A batch being made, and the one before it being kept.
    excess, in_flight = sum(batches) - need, 2 * max(batches, default=0)
    if excess > in_flight:
        faults.append(f"{excess} items too many were made")
    return Kill(stage, target, after, excess, in_flight, tuple(faults))


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def kills(project: Path, count: int, seed: int) -> Iterator[Kill]:
    """Kill `count` times in a project made with `make_project(..., counted=True)`."""
    draw = random.Random(seed)
    dvc(project, "repro", "generate")
    undisturbed = {}
    for stage in OUTPUTS:
        forget_items(project, stage)
        clear_log(project)
        began = time.monotonic()
        if start(project, stage, real_python()).wait():
            raise click.ClickException(f"{stage} failed undisturbed")
        seconds = time.monotonic() - began
        undisturbed[stage] = seconds, sum(batches_made(project, stage)), digest(project, stage)
    for number in range(count):
        stage = list(OUTPUTS)[number % 2]
        target = TARGETS[number // 2 % 3]
        seconds, need, expected = undisturbed[stage]
        kill = None
        while kill is None:
            after = draw.uniform(0, seconds)
            kill = kill_and_rerun(project, stage, target, after, need, expected)
        yield kill


@click.command(help=__doc__)
@click.option("--kills", "count", default=50, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(count: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        project = make_project(Path(folder) / "project", SETTINGS, counted=True)
        done = []
        for kill in kills(project, count, seed):
            done.append(kill)
            click.echo(
                f"{len(done):3} {kill.stage:8} {kill.target:5} after {kill.after:5.2f} s: "
                f"{kill.excess} items too many of {kill.in_flight} allowed"
                f"{''.join(f'; FAULT: {fault}' for fault in kill.faults)}"
            )
    faulty = sum(bool(kill.faults) for kill in done)
    again = sum(kill.excess > 0 for kill in done)
    click.echo(f"{len(done)} kills, {faulty} with faults; {again} lost a batch in flight")
    sys.exit(bool(faulty))


if __name__ == "__main__":
    main()
