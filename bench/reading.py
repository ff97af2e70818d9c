"""Images a second of every stage that reads images, with one worker and with two, in one run.

    python -m bench.reading [--images 100] [--side 512] [--photo-side 3000]

Generated images (PNG of `--side` pixels) for classify, the audit, evaluate and captioning; photos
(JPEG of `--photo-side`) for split, captioning and fine-tuning. Workers are torch's threads, or, for
split and captioning, those of their pools.
"""

import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest.mock import patch

import click
import torch

from bench.classifier_input import PREPROCESSING, draw_images
from bench.speed import seconds, write_photos
from bob.formats.files import sha256
from bob.formats.photos import Photo, open_image
from bob.models import captioner
from bob.models.preprocessing import read_inputs
from bob.models.threads import in_threads
from bob.models.training import Labelled, TrainingImages
from bob.stages import audit, split

WORKERS = (1, 2)
IMAGE_SIDE = 768  # caption.image_side
CAPTIONED = 16  # caption.batch_size


class Silent:
    """A model that has nothing to say, at once."""

    made_by: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    elsewhere = False
    settings: dict[str, object] = {}  # noqa: RUF012

    def answer(self, images: Sequence[object], question: str, max_tokens: int) -> list[str]:
        return [""] * len(images)


def reads(images: Labelled, photos: Sequence[Path]) -> dict[str, tuple[int, Callable[[], object]]]:
    """What reads how many images, by the stage."""
    asking = captioner.Captioner(Silent(), IMAGE_SIDE)

    def ask(paths: Sequence[Path], contents: Sequence[str]) -> None:
        asked = [Photo(str(p), "wren", h) for p, h in zip(paths, contents, strict=True)]
        for start in range(0, len(asked), CAPTIONED):
            asking.ask(asked[start : start + CAPTIONED], "")

    def drain(function: Callable[[Path], object], paths: Sequence[Path], ahead: int) -> None:
        for _ in in_threads(function, paths, ahead):
            pass

    count, many = len(images), len(photos)
    hashes = [sha256(path) for path in (*images.paths, *photos)]
    real = Labelled(tuple(photos), ("",) * many, (0,) * many)
    return {
        "split: check photos": (many, partial(drain, split._unreadable, photos, 32)),
        "caption: photos": (many, partial(ask, photos, hashes[count:])),
        "finetune: photos": (many, partial(drain, open_image, photos, 1)),
        "audit: caption images": (count, partial(ask, images.paths, hashes[:count])),
        "audit: contact sheets": (count, partial(drain, audit._thumbnail, images.paths, 32)),
        "audit, evaluate: images": (count, lambda: list(read_inputs(images.paths, PREPROCESSING))),
        "classify: first decode, images": (
            count,
            lambda: TrainingImages(images, 1, PREPROCESSING)._read(),
        ),
        "classify: first decode, photos": (
            many,
            lambda: TrainingImages(real, 1, PREPROCESSING)._read(),
        ),
    }


def measured(read: Callable[[], object], workers: int) -> float:
    """Seconds with so many workers, the better of two."""
    torch.set_num_threads(workers)
    pool = partial(ThreadPoolExecutor, workers)
    with patch.object(captioner, "ThreadPoolExecutor", pool):
        return min(seconds(read) for _ in range(2))


@click.command(help=__doc__)
@click.option("--images", "count", default=100, show_default=True)
@click.option("--side", default=512, show_default=True)
@click.option("--photo-side", default=3000, show_default=True)
def main(count: int, side: int, photo_side: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "photos").mkdir()
        images = draw_images(Path(folder), count, side)
        photos = write_photos(Path(folder) / "photos", max(2, count // 5), photo_side)
        click.echo(f"{'images/s, by workers':<34}{WORKERS[0]:>8}{WORKERS[1]:>8}  times as fast")
        for name, (number, read) in reads(images, photos).items():
            one, two = (number / measured(read, workers) for workers in WORKERS)
            click.echo(f"{name:<34}{one:8.1f}{two:8.1f}{two / one:15.2f}")


if __name__ == "__main__":
    main()
