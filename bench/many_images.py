"""What `dvc repro` takes where all of many images are cached, and how much of that is DVC's.

    python -m bench.many_images [--images 100000]

In a copy of this project at tiny settings, so many images of random bytes are put into the item
cache as those that `generate` wants. Then the stage is run alone, twice (the first run hashes every
object), then by `dvc repro`, and then there is nothing to do. What `dvc repro` takes beyond the
stage is DVC's: it hashes the output's files and writes the lock.
"""

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from bob.cache.items import ItemCache
from bob.cache.work import Work
from bob.formats import params
from bob.formats.layout import BANK, LORA
from bob.formats.photos import read_task
from bob.formats.prompts import read_bank
from bob.stages import generate
from tests.dvc_project import dvc, environment, make_project, set_params

SIZE = 200  # bytes


def fill() -> None:
    """Put what `generate` wants in the current folder into its item cache."""
    of: Any = params.for_stage("generate")
    base_model = Path(of.finetune.base_model)
    maker = generate.image_maker(base_model, of.generate)
    with ItemCache("generate") as cache:
        common = generate.decided_by(cache, base_model, cache.content_hash(LORA), maker)
        planned = generate.images_of(read_task(), read_bank(BANK), of.generate, common)
        wanted = generate.images_wanted(common, planned)
        cache.take(
            wanted,
            Work(lambda numbers: [random.Random(one).randbytes(SIZE) for one in numbers]),
            5000,
            "filling",
        )


def seconds(project: Path, *command: str) -> float:
    """How long a command takes."""
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", *command],
        cwd=project,
        env=environment(project),
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.monotonic() - began


@click.command(help=__doc__)
@click.option("--images", default=100_000, show_default=True)
def main(images: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        project = make_project(Path(folder) / "project")
        dvc(project, "repro", "finetune")
        set_params(project, {"generate": {"images_per_class": images // len(_classes(project))}})
        subprocess.run(
            [sys.executable, "-c", "import bench.many_images as bench; bench.fill()"],
            cwd=project,
            env=environment(project),
            check=True,
        )
        first = seconds(project, "bob", "generate")
        stage = seconds(project, "bob", "generate")
        whole = seconds(project, "dvc", "repro", "--single-item", "generate")
        idle = seconds(project, "dvc", "repro", "generate")
    click.echo(
        f"{images:,} cached images: the stage alone {first:.1f} s, then {stage:.1f} s; `dvc repro` "
        f"{whole:.1f} s, of which DVC's {whole - stage:.1f} s; with nothing to do {idle:.1f} s"
    )


def _classes(project: Path) -> tuple[str, ...]:
    return read_task(project / "results/split/classes.json").classes


if __name__ == "__main__":
    main()
