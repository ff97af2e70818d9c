"""Stage generate: the synthetic set, with context marginalization (paper: step 3)."""

import hashlib
import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bob.cache.index import Row
from bob.cache.items import ItemCache
from bob.cache.lists import Item, write_items
from bob.cache.recipe import item_key, maker_of
from bob.cache.wanted import Wanted
from bob.cache.work import Work
from bob.errors import tell
from bob.formats.files import replacing
from bob.formats.layout import BANK, GENERATE, GENERATED, GENERATED_ITEMS, LORA, REVIEW
from bob.formats.manifest import Generated, check_files, passed_over_of, write_manifest
from bob.formats.names import folder_of
from bob.formats.params import Params
from bob.formats.photos import Task, read_task
from bob.formats.prompts import Context, Entry, drawn_from, prompt, read_bank
from bob.formats.review import rejected
from bob.models import sampling
from bob.models.precision import device_name


def run(params: Params) -> None:
    """Write `results/generate`: images/<class>/NNNN.png and metadata.jsonl.

    Images that this repository has made before come from the item cache.
    """
    with ItemCache("generate") as cache:
        planned = planned_images(params, cache)
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
    passed_over = passed_over_of(planned)
    on = f" on {device_name()}" if cache.made else ""
    choice = f"; {passed_over.total()} rejected by {REVIEW}" if passed_over else ""
    print(
        f"generate: {len(planned)} images, context from {params.generate.context}: "
        f"{cache.account}{on}{choice}"
    )
    _warn_of_many(passed_over, Counter(image.class_name for image in planned))


def planned_images(params: Params, cache: ItemCache) -> list[Generated]:
    """The images that the workspace asks for."""
    common = _decided_by(params, cache)
    return images_of(read_task(), read_bank(BANK), params.generate, common, rejected())


def _decided_by(params: Params, cache: ItemCache) -> dict[str, object]:
    base_model = Path(params.finetune.base_model)
    maker = image_maker(base_model, params.generate)
    return decided_by(cache, base_model, cache.content_hash(LORA), maker)


def take_items(
    params: Params, cache: ItemCache, planned: Sequence[Generated] | None = None
) -> list[Row]:
    """The planned images, in order; without a plan, those that the workspace asks for."""
    settings = params.generate
    if planned is None:
        planned = planned_images(params, cache)
    base_model = Path(params.finetune.base_model)
    maker = image_maker(base_model, settings)

    def inputs(numbers: list[int]) -> tuple[list[str], list[int]]:
        batch = [planned[number] for number in numbers]
        return [image.prompt for image in batch], [image.seed for image in batch]

    wanted = images_wanted(_decided_by(params, cache), planned)
    work = Work(maker.make, inputs, sampling.png, cache.reading(base_model, LORA))
    return cache.take(wanted, work, settings.batch_size, "generating")


def image_maker(base_model: Path, settings: Any) -> sampling.ImageMaker:
    """What makes the images by `settings`, the parameters of `generate`; nothing is loaded yet."""
    return sampling.ImageMaker(base_model, LORA, **maker_options(settings))


def maker_options(settings: Any) -> dict[str, Any]:
    """The options of an ImageMaker that `settings` say, the parameters of `generate`."""
    return {
        "sampler": settings.sampler,
        "steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
        "precision": settings.precision,
        "batch_size": settings.batch_size,
        "compile": settings.compile,
    }


def decided_by(
    cache: ItemCache, base_model: Path, lora: str, maker: sampling.ImageMaker
) -> dict[str, object]:
    """What decides an image beside its prompt and seed; `lora` is the content hash of the LoRA."""
    return {
        "item": "image",
        **maker.settings,
        "model": cache.content_hash(base_model),
        "lora": lora,
    }


def images_wanted(common: Mapping[str, object], planned: Sequence[Generated]) -> Wanted:
    """The planned images as the item cache takes them; `common` is what `decided_by` returns."""

    def covering(places: Sequence[int]) -> Iterable[int]:
        """The shortest and the longest prompt."""
        by_length = sorted(places, key=lambda place: len(planned[place].prompt))
        return [by_length[0], by_length[-1]]

    # All prompts of a plan have a context or none has, and code can act on one kind alone: a trial
    # of images with a context must not speak for images without.
    with_context = any(image.context for image in planned)
    return Wanted(
        [image.recipe for image in planned],
        {**common, "with_context": with_context},
        maker_of(sampling.MADE_BY, sampling.LIBRARIES),
        covering,
        sampling.peak_signal_to_noise,
    )


def images_of(
    task: Task,
    bank: Sequence[Entry],
    settings: Any,
    common: Mapping[str, object],
    rejected: Collection[str] = (),
) -> list[Generated]:
    """The images to be there by `settings`, the parameters of `generate`; see `plan`."""
    return plan(
        task,
        bank,
        source=settings.context,
        images_per_class=settings.images_per_class,
        seed=settings.seed,
        common=common,
        rejected=rejected,
    )


def plan(
    task: Task,
    bank: Sequence[Entry],
    *,
    source: str,
    images_per_class: int,
    seed: int,
    common: Mapping[str, object],
    rejected: Collection[str] = (),
) -> list[Generated]:
    """Decide class, context, prompt and seed of every image before the first is made.

    Each image is decided by (seed, class, its number in the class) alone: the plan for n images of
    a class is a prefix of the plan for n + k, whatever the other classes are. How many there are is
    what `images_by_class` says, the bank having an entry for every real photo. The context is drawn
    uniformly from the pool of `drawn_from`, always a whole (background, pose) pair.

    `common` is what else decides an image (`decided_by`), for its recipe. The numbers whose recipes
    are `rejected` are passed over, so a rejected image is replaced by the next of its class. As a
    rejected recipe is that of one number, as many numbers at most are looked at as are wanted and
    rejected.
    """
    counts = images_by_class(task.classes, (entry.class_name for entry in bank), images_per_class)
    planned: list[Generated] = []
    for class_name in task.classes if images_per_class else ():
        pool = drawn_from(source, bank, class_name)
        images = _images(task.descriptor, class_name, pool, seed, common)
        left = (image for image in images if image.recipe not in rejected)
        planned += itertools.islice(left, counts[class_name])
    return planned


def _images(
    descriptor: str,
    class_name: str,
    pool: Sequence[Context | None],
    seed: int,
    common: Mapping[str, object],
) -> Iterator[Generated]:
    """The images of a class, one number after the other, without end."""
    folder = folder_of(class_name)
    for number in itertools.count():
        context = pool[_hashed("context", seed, class_name, number) % len(pool)]
        text = prompt(descriptor, class_name, context)
        noise = _hashed("noise", seed, class_name, number) % 2**63
        yield Generated(
            class_name,
            context,
            text,
            noise,
            f"images/{folder}/{number:04d}.png",
            item_key(**common, prompt=text, seed=noise),
        )


def _warn_of_many(passed_over: Mapping[str, int], left: Mapping[str, int]) -> None:
    many = [name for name, count in passed_over.items() if count > left[name]]
    if many:
        named = ", ".join(f"{name} ({passed_over[name]} and {left[name]})" for name in many[:3])
        tell(
            f"generate: warning: more images are rejected than are left of {named}"
            f"{' ...' if len(many) > 3 else ''}; a set chosen like this is no longer what the "
            "method makes: other captions or another finetune or generate.guidance_scale may help"
        )


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
