"""What a classifier's input costs: decoding, cropping, and its share of a training step.

    python -m bench.classifier_input [--images 200] [--side 512] [--steps 20] [--network NAME]

Images of `--side` pixels for a network of 224; a step has 20 real and 20 synthetic ones. The step
with a network is forward, backward and update of `--network`, on images that lie ready.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import timm
import torch
from PIL import Image

from bench.speed import seconds
from bob.models.device import autocast
from bob.models.preprocessing import Preprocessing, read_inputs
from bob.models.training import Labelled, TrainingImages

BATCH = 40
PREPROCESSING = Preprocessing((224, 224), (0.5,) * 3, (0.5,) * 3, "bicubic", 0.875, "center")


def draw_images(folder: Path, count: int, side: int) -> Labelled:
    random = np.random.default_rng(0)
    paths = []
    for number in range(count):
        noise = random.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)
        paths.append(folder / f"{number}.png")
        image.save(paths[-1])
    return Labelled(tuple(paths), ("",) * count, (0,) * count)


def step_of(network: str, device: torch.device) -> Callable[[], object]:
    """A training step of a network without input."""
    model = timm.create_model(network, num_classes=10).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters())
    images = torch.randn(BATCH, 3, 224, 224, device=device)
    labels = torch.zeros(BATCH, dtype=torch.long, device=device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def step() -> None:
        optimizer.zero_grad()
        with autocast(device, dtype):
            logits = model(images.to(memory_format=torch.channels_last))
        torch.nn.functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    return step


@click.command(help=__doc__)
@click.option("--images", "count", default=200, show_default=True)
@click.option("--side", default=512, show_default=True)
@click.option("--steps", default=20, show_default=True)
@click.option("--network", default="resnet50", show_default=True)
def main(count: int, side: int, steps: int, network: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        images = draw_images(Path(folder), count, side)
        click.echo(f"{name}, {threads} threads, images of {side} px")
        for used in sorted({1, threads}):
            torch.set_num_threads(used)
            took = seconds(lambda: list(read_inputs(images.paths, PREPROCESSING)))
            click.echo(f"evaluation's input, {used} threads: {count / took:.0f} images/s")
        for at_once in (False, True):
            source = TrainingImages(images, 10, PREPROCESSING, device)
            source._at_once = at_once
            random = torch.Generator().manual_seed(0)

            def crop(source: TrainingImages = source, random: torch.Generator = random) -> object:
                return source.crops(torch.arange(BATCH) % count, random)

            crop()
            each = min(seconds(crop) for _ in range(steps))
            how = "at once" if at_once else "one by one"
            click.echo(f"crops of a step, {how}: {1000 * each:.1f} ms")
            if at_once == (device.type == "cuda"):
                used_each = each
        step = step_of(network, device)
        step()
        alone = min(seconds(step) for _ in range(3 if device.type == "cpu" else steps))
        share = used_each / (alone + used_each)
        click.echo(
            f"a step of {network} alone: {1000 * alone:.0f} ms; input is {share:.1%} of both"
        )


if __name__ == "__main__":
    main()
