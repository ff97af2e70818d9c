"""The ceiling: what a perfect generator would give, its images drawn by the true renderer.

The stages before and after it are the pipeline's own; they run in a folder of their own, so that
neither the pipeline nor its params know of a generator that only the miniature can have.
"""

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from bob.dvc.experiments import begin_with_same_cache
from bob.errors import BobError
from bob.formats import params
from bob.formats.files import read_json, replacing
from bob.formats.layout import ACCURACY_METRICS, GENERATE, GENERATED, TRAIN
from bob.formats.manifest import Generated, write_manifest
from bob.formats.names import folder_of
from bob.formats.photos import read_photos, read_task
from bob.formats.prompts import Context, prompt
from bob.miniature.world import CONTEXTS, DESCRIPTOR, TASK, draw
from bob.stages.generate import images_by_class

# Pictures of its own: training follows data.seed, validation and test have 1,000,001 and 1,000,002.
SEED = 2_000_000


def measure(values: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a run under the params `values`, with a drawn set in place of a generated one.

    Raises BobError for another dataset than the miniature, and where a stage fails.
    """
    if values["data"]["name"] != "miniature":
        raise BobError(
            f"data.name is {values['data']['name']}; only the miniature has a renderer, so drawn: "
            "true needs data.name: miniature"
        )
    with sandbox(values) as folder:
        for module in (
            "bob draw",
            "bob split",
            "bob.commands.study.drawn",
            "bob classify",
            "bob evaluate",
        ):
            run_module(module, folder)
        return read_json(folder / ACCURACY_METRICS)


@contextmanager
def sandbox(values: Mapping[str, Any]) -> Iterator[Path]:
    """A folder with the project's code and models and the params `values`, and without results.

    Its cache is the project's, so that what both need is computed once.
    """
    with tempfile.TemporaryDirectory(prefix="bob-study-") as scratch:
        folder = Path(scratch)
        shutil.copytree("bob", folder / "bob", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copyfile(params.PIPELINE, folder / params.PIPELINE)
        (folder / "models").symlink_to(Path("models").absolute())
        with (folder / params.PARAMS).open("w", encoding="utf-8") as file:
            YAML(typ="safe").dump(values, file)
        begin_with_same_cache(folder)
        yield folder


def run_module(module: str, folder: Path) -> None:
    """Run `python -m <module>` in `folder`; raises BobError with its last line where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", *module.split()],
        cwd=folder,
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise BobError(f"python -m {module}: {last.removeprefix('Error: ')}")


def write_drawn_set(images_per_class: int, seed: int) -> None:
    """Write `results/generate` as the stage does: every class in all contexts equally often."""
    variants = {variant.name: variant for variant in TASK}
    real = (photo.class_name for photo in read_photos(TRAIN))
    counts = images_by_class(read_task().classes, real, images_per_class)
    images = []
    with replacing(GENERATE) as folder:
        for class_name, count in counts.items():
            contexts = itertools.islice(itertools.cycle(CONTEXTS), count)
            for number, (background, pose) in enumerate(contexts):
                context = Context(background, pose)
                file = f"images/{folder_of(class_name)}/{number:04d}.png"
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                picture = draw(variants[class_name], background, pose, number, seed)
                picture.save(folder / file)
                said = prompt(DESCRIPTOR, class_name, context)
                images.append(Generated(class_name, context, said, number, file))
        write_manifest(folder / GENERATED.name, images)


if __name__ == "__main__":
    settings = params.load()
    write_drawn_set(settings["generate"]["images_per_class"], SEED + settings["data"]["seed"])
