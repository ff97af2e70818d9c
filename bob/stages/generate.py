"""Stage generate: the synthetic set, with context marginalization (paper: step 3)."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bob.cache.index import Row
from bob.cache.items import ItemCache
from bob.cache.lists import Item, write_items
from bob.cache.recipe import item_key, maker_of
from bob.cache.wanted import Wanted
from bob.cache.work import Work
from bob.formats.files import replacing
from bob.formats.layout import BANK, GENERATE, GENERATED, GENERATED_ITEMS, LORA
from bob.formats.manifest import Generated, check_files, write_manifest
from bob.formats.names import folder_of
from bob.formats.params import Params
from bob.formats.photos import Task, read_task
from bob.formats.prompts import Entry, drawn_from, prompt, read_bank
from bob.models import sampling


def run(params: Params) -> None:
    """Write `results/generate`: images/<class>/NNNN.png and metadata.jsonl.

    Images that this repository has made before come from the item cache.
    """
    settings = params.generate
    planned = images_of(read_task(), read_bank(BANK), settings)
    with ItemCache("generate") as cache:
        rows = take_items(params, cache, planned)
        with replacing(GENERATE) as folder:
            (folder / "images").mkdir()
            cache.place([row.oid for row in rows], [folder / image.file for image in planned])
            write_manifest(folder / GENERATED.name, planned)
            check_files(folder / GENERATED.name)
    write_items(
        GENERATED_ITEMS,
        (
            Item(row.recipe, row.maker, row.oid, file=str(GENERATE / image.file))
            for row, image in zip(rows, planned, strict=True)
        ),
    )
    print(f"generate: {len(planned)} images, context from {settings.context}: {cache.account}")


def take_items(
    params: Params, cache: ItemCache, planned: Sequence[Generated] | None = None
) -> list[Row]:
    """The planned images, in order; without a plan, those that the workspace asks for."""
    settings = params.generate
    if planned is None:
        planned = images_of(read_task(), read_bank(BANK), settings)
    base_model = Path(params.finetune.base_model)
    maker = image_maker(base_model, settings)

    def inputs(numbers: list[int]) -> tuple[list[str], list[int]]:
        batch = [planned[number] for number in numbers]
        return [image.prompt for image in batch], [image.seed for image in batch]

    wanted = images_wanted(cache, base_model, cache.content_hash(LORA), maker, planned)
    work = Work(maker.make, inputs, sampling.png, cache.reading(base_model, LORA))
    return cache.take(wanted, work, settings.batch_size, "generating")


def image_maker(base_model: Path, settings: Any) -> sampling.ImageMaker:
    """What makes the images by `settings`, the parameters of `generate`; nothing is loaded yet."""
    return sampling.ImageMaker(
        base_model,
        LORA,
        sampler=settings.sampler,
        steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        precision=settings.precision,
        batch_size=settings.batch_size,
    )


def images_wanted(
    cache: ItemCache,
    base_model: Path,
    lora: str,
    maker: sampling.ImageMaker,
    planned: Sequence[Generated],
) -> Wanted:
    """The planned images as the item cache takes them; `lora` is the content hash of the LoRA."""
    common = {
        "item": "image",
        **maker.settings,
        "model": cache.content_hash(base_model),
        "lora": lora,
    }

    def covering(places: Sequence[int]) -> Iterable[int]:
        """The shortest and the longest prompt."""
        by_length = sorted(places, key=lambda place: len(planned[place].prompt))
        return [by_length[0], by_length[-1]]

    # All prompts of a plan have a context or none has, and code can act on one kind alone: a trial
    # of images with a context must not speak for images without.
    with_context = any(image.context for image in planned)
    return Wanted(
        [item_key(**common, prompt=image.prompt, seed=image.seed) for image in planned],
        {**common, "with_context": with_context},
        maker_of(sampling.MADE_BY, sampling.LIBRARIES),
        covering,
        sampling.peak_signal_to_noise,
    )


def images_of(task: Task, bank: Sequence[Entry], settings: Any) -> list[Generated]:
    """The images to be there by `settings`, the parameters of `generate`."""
    return plan(
        task,
        bank,
        source=settings.context,
        images_per_class=settings.images_per_class,
        seed=settings.seed,
    )


def plan(
    task: Task, bank: Sequence[Entry], *, source: str, images_per_class: int, seed: int
) -> list[Generated]:
    """Decide class, context, prompt and seed of every image before the first is made.

    Each image is decided by (seed, class, its number in the class) alone: the plan for n images of
    a class is a prefix of the plan for n + k, whatever the other classes are. How many there are is
    what `images_by_class` says, the bank having an entry for every real photo. The context is drawn
    uniformly from the pool of `drawn_from`, always a whole (background, pose) pair.
    """
    counts = images_by_class(task.classes, (entry.class_name for entry in bank), images_per_class)
    planned = []
    for class_name in task.classes if images_per_class else ():
        pool = drawn_from(source, bank, class_name)
        folder = folder_of(class_name)
        for number in range(counts[class_name]):
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


def images_by_class(
    classes: Sequence[str], real: Iterable[str], images_per_class: int
) -> dict[str, int]:
    """How many images of each class make real plus synthetic as many in every class.

    `images_per_class` + n_max - n_c, where n_c is how often the class stands in `real`, the classes
    of the real training photos: a rare class gets as many more as it lacks. 0 is none at all.
    """
    counts = Counter(real)
    most = max(counts[name] for name in classes)
    return {
        name: images_per_class + most - counts[name] if images_per_class else 0 for name in classes
    }


def _hashed(*what: object) -> int:
    """A number that looks random, from what it is for: no state, so no order matters."""
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:16], "big")
