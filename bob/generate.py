"""Stage generate: the synthetic set, with context marginalization (paper: step 3)."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from bob import diffusion
from bob.data import Task, batches, read_task
from bob.device import best_device, resolve_precision
from bob.files import replacing
from bob.layout import BANK, GENERATE, GENERATED, LORA
from bob.manifest import Generated, write_manifest
from bob.params import Params
from bob.prompts import Entry, drawn_from, prompt, read_bank


def run(params: Params) -> None:
    """Write `results/generate`: images/<class>/NNNN.png and the manifest."""
    settings = params.generate
    planned = plan(
        read_task(),
        read_bank(BANK),
        source=settings.context,
        images_per_class=settings.images_per_class,
        seed=settings.seed,
    )
    with replacing(GENERATE) as folder:
        (folder / "images").mkdir()
        if planned:
            _make(planned, folder, params)
        write_manifest(folder / GENERATED.name, planned)
    print(f"generate: {len(planned)} images, context from {settings.context}")


def plan(
    task: Task, bank: Sequence[Entry], *, source: str, images_per_class: int, seed: int
) -> list[Generated]:
    """Decide class, context, prompt and seed of every image before the first is made.

    Each image is decided by (seed, class, its number in the class) alone: the plan for n images of
    a class is a prefix of the plan for n + k, whatever the other classes are. The context is drawn
    uniformly from the pool of `drawn_from`, always a whole (background, pose) pair.
    """
    planned = []
    for class_name in task.classes if images_per_class else ():
        pool = drawn_from(source, bank, class_name)
        folder = class_name.replace(" ", "_")
        for number in range(images_per_class):
            context = pool[_hashed("context", seed, class_name, number) % len(pool)]
            planned.append(
                Generated(
                    class_name,
                    context,
                    prompt(task.descriptor, class_name, context),
                    _hashed("noise", seed, class_name, number) % 2**63,
                    f"images/{folder}/{number:04d}.png",
                )
            )
    return planned


def _hashed(*what: object) -> int:
    """A number that looks random, from what it is for: no state, so no order matters."""
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:16], "big")


def _make(planned: Sequence[Generated], folder: Path, params: Params) -> None:
    settings = params.generate
    device = best_device()
    dtype = resolve_precision(settings.precision, device)
    pipeline = diffusion.load(Path(params.finetune.base_model), device, lora=LORA)
    pipeline.scheduler = diffusion.SAMPLERS[settings.sampler](pipeline.scheduler.config)
    embeddings = diffusion.encode_prompts(pipeline, ["", *(item.prompt for item in planned)])
    diffusion.cast(pipeline.unet, dtype)
    with tqdm(total=len(planned), desc="generating", unit="image", disable=None) as bar:
        for batch in batches(planned, settings.batch_size):
            # Padded to full size: an image's last bits depend on the batch's size, not on what
            # else is in it, and so not on where the plan ends.
            padded = batch + batch[-1:] * (settings.batch_size - len(batch))
            images = diffusion.sample(
                pipeline,
                torch.stack([embeddings[item.prompt] for item in padded]),
                embeddings[""],
                [item.seed for item in padded],
                steps=settings.steps,
                guidance_scale=settings.guidance_scale,
                dtype=dtype,
            )
            for item, image in zip(batch, images, strict=False):
                path = folder / item.file
                path.parent.mkdir(exist_ok=True)
                image.save(path)
            bar.update(len(batch))
