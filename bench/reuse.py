"""What a second run makes, and how long it takes.

    python -m bench.reuse [--tiny]

In a copy of this project, at the parameters of params.yaml or at tiny ones:

1. twice the images a class, then as few as before; one shot more;
2. another guidance and back, with DVC's run cache and without it;
3. four experiments that overlap in images, from the queue at once.

Exit status 1 where anything was made that had been made before, where four experiments make more
than 1.25 times what they want together, or (not with --tiny) where the missing half of the images
takes more than 1.1 times half as long as all, what DVC and imports take in any run apart.
"""

import hashlib
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from bench.project import batches_made, clear_log, forget_items, object_of
from bob.cache.index import Index
from bob.cache.lists import read_items
from tests.dvc_project import TINY, dvc, make_project, ran, read_params, restored, run, set_params

SETTINGS = TINY | {"generate": {"images_per_class": 8, "steps": 2, "batch_size": 2}}


@dataclass(frozen=True)
class Finding:
    """One measured fact."""

    what: str
    good: bool


def repro(project: Path, stage: str, **changes: Any) -> tuple[str, int, float]:
    """`dvc repro` up to a stage with changed parameters of it.

    Returns DVC's output, how many items the stage made, and the seconds it all took.
    """
    set_params(project, {stage: changes})
    clear_log(project)
    began = time.monotonic()
    output = dvc(project, "repro", stage)
    return output, sum(batches_made(project, stage)), time.monotonic() - began


def more_images(project: Path, *, timed: bool) -> Iterator[Finding]:
    """Twice the images, then as few as before."""
    whole = read_params(project)["generate"]["images_per_class"]
    half = whole // 2
    dvc(project, "repro", "finetune")
    _, first, _ = repro(project, "generate", images_per_class=half)
    _, second, seconds = repro(project, "generate", images_per_class=whole)
    shutil.rmtree(project / ".dvc/cache/runs")
    _, back, seconds_of_none = repro(project, "generate", images_per_class=half)
    forget_items(project, "generate")
    shutil.rmtree(project / ".dvc/cache/runs")
    _, everything, seconds_of_all = repro(project, "generate", images_per_class=whole)
    yield Finding(
        f"{half} -> {whole} images a class: {second} of {everything} made", 2 * second == everything
    )
    share = (seconds - seconds_of_none) / (seconds_of_all - seconds_of_none)
    yield Finding(
        f"in {seconds:.0f} s of the {seconds_of_all:.0f} s of all; without the "
        f"{seconds_of_none:.0f} s that a run takes that makes none: {share:.2f} of it",
        not timed or share <= 1.1 * 0.5,
    )
    yield Finding(f"back to {half}: {back} made", back == 0 and first == second)


def one_shot_more(project: Path) -> Iterator[Finding]:
    """One photo more of each class."""

    def keys() -> set[str]:
        return {item.recipe for item in read_items(project / "results/items/caption.jsonl")}

    dvc(project, "repro", "caption")
    before = keys()
    shots = read_params(project)["data"]["shots"]
    set_params(project, {"data": {"shots": shots + 1}})
    _, made, _ = repro(project, "caption")
    new = len(keys() - before)
    set_params(project, {"data": {"shots": shots}})
    yield Finding(
        f"{shots} -> {shots + 1} shots: {made} answers made, {new} of them new, "
        f"{len(before)} reused",
        made == new > 0,
    )


def guidance(project: Path) -> Iterator[Finding]:
    """Another guidance scale and back."""
    dvc(project, "repro", "generate")
    scale = read_params(project)["generate"]["guidance_scale"]
    repro(project, "generate", guidance_scale=scale + 1)
    output, made, _ = repro(project, "generate", guidance_scale=scale)
    yield Finding(
        f"guidance {scale} -> {scale + 1} -> {scale}: DVC's run cache restores, {made} made",
        restored(output) == {"generate"} and made == 0,
    )
    repro(project, "generate", guidance_scale=scale + 1)
    shutil.rmtree(project / ".dvc/cache/runs")
    output, made, seconds = repro(project, "generate", guidance_scale=scale)
    yield Finding(
        f"and without the run cache: generate runs {seconds:.0f} s, {made} made",
        ran(output) == {"generate"} and made == 0,
    )


def queue(project: Path) -> Iterator[Finding]:
    """Four experiments that want a share each of the same images."""
    dvc(project, "repro", "generate")
    run(project, "git", "add", "--all")
    run(project, "git", "commit", "--quiet", "--message", "before the queue")
    whole = read_params(project)["generate"]["images_per_class"]
    classes = read_params(project)["draw"]["classes"]
    shares = [whole * share // 8 for share in (5, 6, 7, 8)]
    clear_log(project)
    dvc(
        *(project, "exp", "run", "--queue", "-S", "generate.seed=7"),
        *("-S", f"generate.images_per_class={','.join(map(str, shares))}", "generate"),
    )
    dvc(project, "exp", "run", "--run-all", "--jobs", "4")
    status = dvc(project, "queue", "status")
    made, union = sum(batches_made(project, "generate")), whole * classes
    yield Finding(
        f"4 experiments in parallel: {made} images made, {union} wanted in all, "
        f"{sum(shares) * classes} wanted by each for itself",
        union <= made <= 1.25 * union,
    )
    yield Finding("all four succeeded", status.count("Success") == 4)
    rows = Index(project / ".dvc/cache/bob/items.sqlite").all()
    whole_objects = sum(
        hashlib.md5(object_of(project, row.oid).read_bytes()).hexdigest() == row.oid for row in rows
    )
    yield Finding(f"{whole_objects} of {len(rows)} items are whole", whole_objects == len(rows))


@click.command(help=__doc__)
@click.option("--tiny", is_flag=True, help="A few images; times mean nothing.")
def main(tiny: bool) -> None:
    good = True
    with tempfile.TemporaryDirectory() as folder:
        project = make_project(Path(folder) / "project", SETTINGS if tiny else {}, counted=True)
        for findings in (
            more_images(project, timed=not tiny),
            one_shot_more(project),
            guidance(project),
            queue(project),
        ):
            for finding in findings:
                good &= finding.good
                click.echo(f"{'ok  ' if finding.good else 'BAD '} {finding.what}")
    sys.exit(not good)


if __name__ == "__main__":
    main()
