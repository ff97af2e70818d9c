"""What each stage would have to do and what of it is there already: one function a stage."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from tqdm import tqdm

from bob.cache.items import ItemCache, tree_hash
from bob.cache.wanted import Wanted
from bob.commands.configuration import model_folder
from bob.commands.plan import networks
from bob.dvc.forecast import UP_TO_DATE, Forecast
from bob.formats import layout
from bob.formats.files import sha256
from bob.formats.manifest import Generated, read_manifest
from bob.formats.params import Params
from bob.formats.photos import Photo, Task, read_photos, read_task, size_of
from bob.formats.prompts import ATTRIBUTES, QUESTION, Entry, read_bank
from bob.formats.review import rejected
from bob.miniature import world
from bob.models import denoising, diffusion, finetuning, sampling
from bob.models.backbones import holds_clip, open_backbone
from bob.models.classifiers import REAL_AND_SYNTHETIC, REAL_ONLY, VARIANTS
from bob.models.endpoint import is_endpoint
from bob.models.gpus import Gpu
from bob.models.lora import add_lora
from bob.models.precision import resolve_precision
from bob.models.training import VALIDATIONS, Labelled, Trainer
from bob.stages import benchmark as measuring
from bob.stages import classify as classifying
from bob.stages import finetune as fine_tuning
from bob.stages import generate as generating
from bob.stages.caption import accepted_answers, answers_wanted, captioner_of
from bob.stages.split import Dataset, read_dataset, split_of

PNG_BYTES = 1.5
"""For a pixel; the miniature's images have 1.55. Measured on the generated images where there are
some."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ONNX_SHARE = {"fp32": 1.0, "fp16": 0.5, "int8": 0.25}
"""Of the network's bytes in fp32."""
ADAM = 2
"""Copies of what is trained that AdamW keeps: the moments."""


@dataclass(frozen=True)
class Work:
    """What a stage would do."""

    what: str
    items: str = ""
    """What of it the item cache has."""
    flops: Mapping[str, float] = field(default_factory=dict)
    """By the precision of their products."""
    memory: int = 0
    """Bytes on the GPU at the peak; 0 where it needs none."""
    disk: float = 0
    """Bytes that the outputs add on the disk, in the workspace and in DVC's cache."""
    relief: tuple[str, ...] = ()
    """What would help where the memory does not suffice, one of these."""
    parts: int = 1
    """Batches of items, each of which can be made on another GPU."""
    kind: str = ""
    """Of its products, as `Gpu.seconds` knows it; empty where it is none that is measured."""

    def seconds(self, gpu: Gpu, gpus: int = 1) -> float:
        """How long the products take on so many; reading, drawing and writing are not counted."""
        whole = sum(
            gpu.seconds(flops, precision, self.kind) for precision, flops in self.flops.items()
        )
        shared = min(self.parts, gpus)  # the last round is not full
        return whole * math.ceil(self.parts / shared) / self.parts


@dataclass(frozen=True)
class Photos:
    """The photos of the splits."""

    task: Task
    train: list[Photo]
    val: list[Photo]
    test: list[Photo]
    known: bool
    """Whether these are the photos, or just as many."""


@dataclass(frozen=True)
class Project:
    """What a plan goes by."""

    params: Params
    forecast: Forecast
    cache: ItemCache
    gpu: Gpu

    @cached_property
    def photos(self) -> Photos:
        """The photos as the stage split leaves or will leave them."""
        paths = (layout.CLASSES, layout.TRAIN, layout.VAL, layout.TEST)
        coming = [path for path in map(self.forecast.file, paths) if path is not None]
        if len(coming) == len(paths):
            train, val, test = map(read_photos, coming[1:])
            return Photos(read_task(coming[0]), train, val, test, True)
        data = self.params.data
        folder = Path("data") / data.name
        known = folder != layout.MINIATURE or self.forecast.states["draw"] == UP_TO_DATE
        dataset = read_dataset(folder, _hashes) if known else _undrawn(self.params)
        train, val, test = split_of(dataset, data)
        task = Task(dataset.descriptor, tuple(sorted(dataset.train)))
        return Photos(task, train, val, test, known)

    @cached_property
    def copies(self) -> int:
        """Of an output on the disk: in the workspace and, where DVC cannot link it, its cache."""
        return 1 if self.cache.stores_once() else 2

    @cached_property
    def images(self) -> int:
        """How many images there are to be, in the generated set."""
        photos = self.photos
        counts = generating.images_by_class(
            photos.task.classes,
            (photo.class_name for photo in photos.train),
            self.params.generate.images_per_class,
        )
        return sum(counts.values())


def _hashes(files: list[Path]) -> dict[Path, str]:
    """Of the photos; that they can be decoded is for the stage to see."""
    with ThreadPoolExecutor() as threads:
        hashes = tqdm(threads.map(sha256, files), "reading photos", len(files), disable=None)
        return dict(zip(files, hashes, strict=True))


def _undrawn(params: Params) -> Dataset:
    """As many photos as the stage draw will draw."""
    counts = world.images_per_class(params.draw.train_per_class, params.draw.per_context)

    def part(name: str) -> dict[str, list[Photo]]:
        return {
            variant.name: [
                Photo("", variant.name, f"{name} {variant.name} {index}")
                for index in range(counts[name])
            ]
            for variant in world.TASK[: params.draw.classes]
        }

    return Dataset(world.DESCRIPTOR, part("train"), part("val"), part("test"))


# --- the stages ----------------------------------------------------------------------------------


def _draw(project: Project) -> Work:
    settings = project.params.draw
    per_class = world.images_per_class(settings.train_per_class, settings.per_context)
    count = settings.classes * sum(per_class.values())
    return Work(f"{count:,} drawings", disk=project.copies * count * world.SIZE**2 * PNG_BYTES)


def _split(project: Project) -> Work:
    photos = project.photos
    parts = {"train": photos.train, "val": photos.val, "test": photos.test}
    paths = [Path(photo.path) for part in parts.values() for photo in part]
    return Work(
        f"{len(photos.task.classes):,} classes, "
        + ", ".join(f"{len(part):,} {name}" for name, part in parts.items()),
        disk=project.cache.new_bytes(filter(Path.is_file, paths)),
    )


def _caption(project: Project) -> Work:
    if project.params.caption.bank != "captioner":
        return Work(f"contexts from {project.params.caption.bank}")
    photos = project.photos
    return _asking(project, photos.train, _typical_size(photos.train), photos.known)


def _typical_size(photos: Sequence[Photo]) -> tuple[int, int]:
    """Width and height of the photo that is median by area; the drawings' where there is none."""
    sizes = []
    for photo in photos:
        if Path(photo.path).is_file():
            sizes.append(size_of(photo.path))
    if not sizes:
        return world.SIZE, world.SIZE
    return sorted(sizes, key=math.prod)[len(sizes) // 2]


def _asking(
    project: Project,
    photos: Sequence[Photo],
    size: tuple[int, int],
    known: bool,
    questions: str = "photos",
) -> Work:
    """Both questions of each photo, and those that are asked again for what is in the cache.

    Answers that are not there yet are taken to be usable: how many have to be asked for again is
    not known.
    """
    settings, task = project.params.caption, project.photos.task
    folder = model_folder(project.params, "caption", "model")
    wanted_of = answers_wanted(project.cache, folder, captioner_of(settings))
    asked, new, batches = 0, 0, 0

    def ask(photos: Sequence[Photo], question: str) -> list[str]:
        nonlocal asked, new, batches
        wanted = wanted_of(photos, question)
        keys = wanted.recipes
        oids = project.cache.known(wanted) if known else {}
        missing = set(keys) - oids.keys()
        asked += len(keys)
        new += len(missing)
        batches += math.ceil(len(missing) / settings.batch_size)
        return [
            # One that a remote has is not fetched to plan: it is taken to be usable.
            project.cache.read(oids[key]).decode()
            if key in oids and project.cache.exists(oids[key])
            else "-"
            for key in keys
        ]

    for attribute in ATTRIBUTES:
        accepted_answers(ask, photos, attribute, task)
    what = f"{asked:,} answers about {len(photos):,} {questions}"
    if not new or is_endpoint(folder):
        return Work(what, _reused(asked, new, known))
    precision = project.gpu.precision(settings.precision)
    network = networks.Captioner(folder)
    shrink = min(1, settings.image_side / max(size))
    size = round(size[0] * shrink), round(size[1] * shrink)
    question = QUESTION.format(attribute=ATTRIBUTES[0], descriptor=task.descriptor)
    read, say = network.ask(question, size)
    each = read.flops + (networks.ANSWER_TOKENS - 1) * say.flops
    rows = settings.batch_size  # a batch is always full
    return Work(
        what,
        _reused(asked, new, known),
        {precision: batches * rows * each},
        # The whole network is in that precision, activations too.
        (network.weights + rows * read.peak) * DTYPES[precision].itemsize // 4,
        relief=(
            *_lower_precision("caption", precision),
            *(["lower caption.batch_size"] if rows > 1 else []),
        ),
        parts=batches,
    )


def _lower_precision(stage: str, precision: str) -> list[str]:
    return [f"set {stage}.precision to fp16"] if precision == "fp32" else []


def _reused(total: int, new: int, known: bool) -> str:
    there = [f"{total - new:,} reused"] if known or total > new else []
    return ", ".join([*there, f"{'' if known else 'at most '}{new:,} new"])


def _finetune(project: Project) -> Work:
    """Nothing where the LoRA was trained before; it was not where that cannot be known yet."""
    bank = project.forecast.file(layout.BANK)
    if bank is not None and project.photos.known and cached_lora(project, read_bank(bank)):
        return Work("LoRA", "1 reused")
    return fine_tuning_work(project)


def cached_lora(project: Project, bank: Sequence[Entry]) -> str | None:
    """The object of the LoRA of these captions; None where it is to be trained."""
    settings, photos = project.params.finetune, project.photos
    captions = fine_tuning.training_captions(photos.task, photos.train, bank, settings.context)
    dtype = resolve_precision(settings.precision)
    wanted = fine_tuning.lora_wanted(project.cache, photos.train, captions, settings, dtype)
    known = project.cache.known(wanted)
    return known[wanted.recipes[0]] if len(known) == len(wanted.recipes) else None


def fine_tuning_work(project: Project) -> Work:
    """To train the LoRA."""
    settings, photos = project.params.finetune, project.photos.train
    precision = project.gpu.precision(settings.precision)
    pipeline = networks.text_to_image(model_folder(project.params, "finetune", "base_model"))
    trained = pipeline.unet, pipeline.text_encoder
    batch = min(len(photos), finetuning.ENCODE_BATCH, diffusion.autoencoded_at_once(pipeline))
    encode = networks.encode_images(pipeline, batch)
    encoding = networks.weight_bytes(pipeline.vae) + encode.peak
    with networks.META:
        lora = 4 * sum(parameter.numel() for parameter in add_lora(pipeline, settings.rank, 0))
    steps = settings.epochs * denoising.steps_an_epoch(len(photos), settings)
    parts_of_batch, checkpointed = settings.gradient_accumulation, settings.gradient_checkpointing
    if checkpointed:
        denoising.checkpoint_gradients(pipeline)
    whole = settings.batch_size
    step = networks.fine_tuning_step(pipeline, whole // parts_of_batch)
    _cast(precision, *trained)
    training = networks.weight_bytes(*trained) + ADAM * lora + step.peak
    return Work(
        f"{steps:,} steps of {whole}, {len(photos):,} photos"
        + (", compiled" if fine_tuning.is_compiled(settings, len(photos)) else ""),
        flops=_added(
            ("fp32", encode.flops / batch * len(photos)),
            (precision, steps * parts_of_batch * step.flops),
        ),
        memory=max(encoding, training if steps else 0),
        disk=project.copies * lora,
        relief=(
            *_lower_precision("finetune", precision),
            *(["raise finetune.gradient_accumulation"] if parts_of_batch < whole else []),
            *([] if checkpointed else ["set finetune.gradient_checkpointing to true"]),
        ),
        kind="finetune",
    )


def _cast(precision: str, *parts: torch.nn.Module) -> None:
    for part in parts:
        diffusion.cast(part, DTYPES[precision], networks.META)


def _added(*flops: tuple[str, float]) -> dict[str, float]:
    total: dict[str, float] = {}
    for precision, count in flops:
        total[precision] = total.get(precision, 0) + count
    return total


def _generate(project: Project) -> Work:
    bank, lora = project.forecast.file(layout.BANK), project.forecast.files(layout.LORA)
    if not project.photos.known or bank is None or lora is None:
        return generating_work(project, None)
    planned, wanted = planned_images(project, read_bank(bank), tree_hash(lora), rejected())
    cached = project.cache.known(wanted)
    return generating_work(
        project, [image.prompt for image in planned if image.recipe not in cached]
    )


def planned_images(
    project: Project, bank: Sequence[Entry], lora: str, rejected: Collection[str]
) -> tuple[list[Generated], Wanted]:
    """The images to be there with these captions, LoRA (its content hash) and rejections."""
    settings = project.params.generate
    folder = model_folder(project.params, "finetune", "base_model")
    maker = generating.image_maker(folder, settings)
    common = generating.decided_by(project.cache, folder, lora, maker)
    planned = generating.images_of(project.photos.task, bank, settings, common, rejected)
    return planned, generating.images_wanted(common, planned)


def generating_work(project: Project, prompts: Sequence[str] | None) -> Work:
    """To make the images of these prompts, or else, where these are not known, all."""
    settings, count = project.params.generate, project.images
    folder = model_folder(project.params, "finetune", "base_model")
    known = prompts is not None
    new = count if prompts is None else len(prompts)
    what = f"{count:,} images of {settings.steps} steps"
    if not new:
        return Work(what, _reused(count, 0, known))
    precision = project.gpu.precision(settings.precision)
    batch, batches = settings.batch_size, math.ceil(new / settings.batch_size)
    pipeline = networks.text_to_image(folder)
    rows = batch * (2 if settings.guidance_scale > 1 else 1)
    text = networks.encode_text(pipeline)
    denoise = networks.denoise(pipeline, rows)
    at_once = sampling.decoded_at_once(pipeline, batch)
    decode = networks.decode_images(pipeline, at_once)
    side = diffusion.resolution(pipeline)
    _cast(precision, pipeline.unet)
    weights = networks.weight_bytes(pipeline.unet, pipeline.text_encoder, pipeline.vae)
    evaluations = networks.evaluations(folder, settings.sampler, settings.steps)
    texts = 1 + (new if prompts is None else len(set(prompts)))
    return Work(
        what,
        _reused(count, new, known),
        _added(
            (precision, batches * evaluations * denoise.flops),
            ("fp32", batches * batch / at_once * decode.flops + texts * text.flops),
        ),
        weights + max(denoise.peak, decode.peak),
        project.copies * new * side**2 * _png_bytes(),
        (
            *_lower_precision("generate", precision),
            *(["lower generate.batch_size"] if batch > 1 else []),
        ),
        batches,
        "generate",
    )


def _png_bytes() -> float:
    """Bytes for a pixel of the generated images that are there."""
    images = list((layout.GENERATE / "images").rglob("*.png"))
    if not images:
        return PNG_BYTES
    pixels = math.prod(size_of(images[0]))
    return statistics.fmean(path.stat().st_size for path in images) / pixels


def _classify(project: Project) -> Work:
    forecast, task = project.forecast, project.photos.task
    synthetic = None if project.images else Labelled((), (), ())
    if project.images and project.photos.known and forecast.file(layout.GENERATED) is not None:
        synthetic = classifying.read_synthetic(task, lambda path: forecast.file(path) or path)
    return training_work(project, *missing_classifiers(project, synthetic))


def training_work(project: Project, new: Sequence[tuple[str, int]], known: bool) -> Work:
    """To train these classifiers, (variant, seed)."""
    settings, photos = project.params.classify, project.photos
    folder = model_folder(project.params, "classify", "backbone")
    count = len(settings.seeds) * len(VARIANTS)
    what = f"{count} classifiers, {settings.epochs} epochs each"
    if not new:
        return Work(what, _reused(count, 0, known))
    precision = project.gpu.precision(settings.precision)
    network = networks.Classifier(folder, photos.task, settings.lora_rank)
    batch, real = settings.batch_size, len(photos.train)
    steps = settings.epochs * math.ceil(real / batch)
    # Synthetic images come in whole batches, real photos each once an epoch.
    rows = {
        variant: settings.epochs * real
        + (steps * batch if variant == REAL_AND_SYNTHETIC and project.images else 0)
        for variant in VARIANTS
    }
    largest = min(batch, real) + (batch if project.images else 0)
    step = network.training_step(largest)
    # A CLIP reads the classes' texts once a step, however many images are in it.
    one, two = (network.training_step(images).flops for images in (1, 2))
    texts = max(0, 2 * one - two)
    held, changing = network.weights_in_training
    look = network.look(1)
    validations = math.ceil(settings.epochs / math.ceil(settings.epochs / VALIDATIONS))
    looks = len(new) * validations * len(photos.val)
    return Work(
        what,
        _reused(count, len(new), known),
        _added(
            (
                precision,
                (step.flops - texts) / largest * sum(rows[variant] for variant, _ in new)
                + texts * steps * len(new),
            ),
            ("fp32", look.flops * looks),
        ),
        held + ADAM * changing + step.peak,
        project.copies * len(new) * network.weights,
        ("lower classify.batch_size",) if batch > 1 else (),
        max(Counter(variant for variant, _ in new).values()),  # one variant after the other
        _kind_of(folder),
    )


def _kind_of(backbone: Path) -> str:
    return "classify_clip" if holds_clip(backbone) else "classify"


def missing_classifiers(
    project: Project, synthetic: Labelled | None
) -> tuple[list[tuple[str, int]], bool]:
    """(Variant, seed) of those that are to be trained, and whether that is certain for all.

    `real_only` depends on no generated image, so it is known before these are: before `synthetic`,
    the generated set, is more than None.
    """
    photos, task, seeds = project.photos, project.photos.task, project.params.classify.seeds
    planned = [(variant, seed) for seed in seeds for variant in VARIANTS]
    if not photos.known:
        return planned, False
    certain = synthetic is not None
    folder = model_folder(project.params, "classify", "backbone")
    if not any(folder.glob("*.safetensors")):
        return planned, True  # nothing was trained with weights that are not here
    trainer = Trainer(
        open_backbone(folder),
        task,
        classifying.recipe_of(project.params.classify),
        real=classifying.labelled(photos.train, task),
        synthetic=synthetic or Labelled((), (), ()),
        validation=classifying.labelled(photos.val, task),
    )
    made = set()
    for variant in VARIANTS if certain else (REAL_ONLY,):
        wanted = classifying.classifiers_wanted(project.cache, folder, trainer, variant, seeds)
        cached = project.cache.known(wanted)
        made |= {
            (variant, seed)
            for recipe, seed in zip(wanted.recipes, seeds, strict=True)
            if recipe in cached
        }
    return [one for one in planned if one not in made], certain


def _audit(project: Project) -> Work:
    settings, photos = project.params.audit, project.photos
    asked = min(settings.captioned_per_class, project.params.generate.images_per_class)
    work = Work("nothing asked")
    pipeline = networks.text_to_image(model_folder(project.params, "finetune", "base_model"))
    if asked:
        side = diffusion.resolution(pipeline)
        images, known = _first_images(project, asked)
        work = _asking(project, images, (side, side), known, "images")
    pictures = project.images + len(photos.train) + len(photos.val) if project.images else 0
    network = networks.Classifier(model_folder(project.params, "audit", "feature_model"), None)
    look = network.look(64)
    return Work(
        f"{work.what}, features of {pictures:,}",
        work.items,
        _added(*work.flops.items(), ("fp32", pictures / 64 * look.flops)),
        # One after the other: the captioner, the base model's text features, the feature model.
        max(
            work.memory,
            networks.weight_bytes(pipeline.unet, pipeline.text_encoder, pipeline.vae),
            network.weights + look.peak,
        ),
        relief=work.relief,
        parts=work.parts,
    )


def _first_images(project: Project, per_class: int) -> tuple[list[Photo], bool]:
    """The generated images that the captioner is asked about, and whether these are they."""
    from bob.stages.audit import first_of_each_class  # late: it brings scikit-learn

    manifest = project.forecast.file(layout.GENERATED)
    if manifest is None:
        count = per_class * len(project.photos.task.classes)
        return [Photo("", "", str(number)) for number in range(count)], False
    paths = [
        (image.class_name, project.forecast.file(layout.GENERATE / image.file))
        for image in first_of_each_class(read_manifest(manifest), per_class)
    ]
    return [Photo(str(path), name, sha256(path)) for name, path in paths if path], True


def _evaluate(project: Project) -> Work:
    models = len(project.params.classify.seeds) * len(VARIANTS)
    test = len(project.photos.test)
    return _looking(project, f"{models} classifiers on {test:,} photos", models * test, 64, models)


def _export(project: Project) -> Work:
    network = _classifier(project)
    precisions = project.params.export.precisions
    return Work(
        f"ONNX, {', '.join(precisions)}",
        disk=project.copies
        * network.weights
        * sum(ONNX_SHARE[precision] for precision in precisions),
    )


def _benchmark(project: Project) -> Work:
    settings, test = project.params.benchmark, len(project.photos.test)
    sizes = settings.batch_sizes
    timed = sum(sizes) * (settings.repeats + measuring.ROUNDS)
    # torch, and ONNX Runtime in each precision, which is taken for fp32.
    copies = 1 + len(project.params.export.precisions)
    return _looking(
        project,
        f"{test:,} photos, {len(sizes)} batch sizes",
        copies * (test + timed),
        max(64, *sizes),
        copies,
    )


def _card(project: Project) -> Work:
    return Work("one page")


def _report(project: Project) -> Work:
    photos = project.photos
    pictures = project.images + sum(map(len, (photos.train, photos.val, photos.test)))
    return _looking(project, f"a page of {pictures:,} images", pictures, 64, 1)


def _classifier(project: Project) -> networks.Classifier:
    return networks.Classifier(
        model_folder(project.params, "classify", "backbone"),
        project.photos.task,
        project.params.classify.lora_rank,
    )


def _looking(project: Project, what: str, looks: int, batch: int, copies: int) -> Work:
    """Passes forward in fp32, with so many classifiers on the GPU at once."""
    network = _classifier(project)
    look = network.look(batch)
    return Work(
        what,
        flops={"fp32": looks / batch * look.flops},
        memory=copies * network.weights + look.peak,
        kind=_kind_of(model_folder(project.params, "classify", "backbone")),
    )


STAGES: Mapping[str, Callable[[Project], Work]] = {
    "draw": _draw,
    "split": _split,
    "caption": _caption,
    "finetune": _finetune,
    "generate": _generate,
    "audit": _audit,
    "classify": _classify,
    "evaluate": _evaluate,
    "export": _export,
    "benchmark": _benchmark,
    "card": _card,
    "report": _report,
}
"""In the order of the table."""
