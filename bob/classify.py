"""Stage `classify`: train classifiers on the real photos, and on real plus synthetic images.

For every seed two variants are trained by the paper's recipe (published scripts of arXiv
2510.24078): `real_only` and `real_and_synthetic`. One epoch is one pass over the real photos. Both
variants of a seed see the same real photos in the same order with the same augmentation, so their
difference is what the synthetic images do; `real_only` depends on them in no way.

The epoch kept is the one with the best top-1 on validation, between equals the one with the lower
validation loss, then the earlier; without validation photos it is the last. Long runs are validated
`VALIDATIONS` times at even distances, not after every epoch. Test photos are never looked at.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from dvclive import Live
from timm.data.transforms import str_to_interp_mode
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tv
from tqdm import tqdm

from bob import layout
from bob.classifiers import (
    REAL_AND_SYNTHETIC,
    REAL_ONLY,
    VARIANTS,
    Preprocessing,
    Trained,
    describe_network,
    load_backbone,
    normalise,
    predict,
    read_pixels,
    write_trained,
    write_weights,
)
from bob.data import Photo, Task, open_image, read_photos, read_task
from bob.device import autocast, best_device, resolve_precision
from bob.errors import BobError
from bob.files import replacing
from bob.manifest import read_manifest
from bob.params import Params

FINAL_LEARNING_RATE = 1e-8
VALIDATIONS = 10
KEPT_BYTES = 4 * 2**30  # of decoded images, for each source
CROP_AREA = (0.5, 1.0)  # share of the image; smaller crops would lose the part that tells classes
CROP_ASPECT = (3 / 4, 4 / 3)


Result = dict[str, float | int | None]
"""Of one run on validation: the epoch kept, its top1 and its loss."""
Run = tuple[dict[str, Tensor], Result, list[dict[str, float]]]
"""Of one training: weights, result and learning curves."""


@dataclass(frozen=True)
class Recipe:
    """The training settings; `params.yaml` says what they mean."""

    real_weight: float
    mix: str
    mix_probability: float
    learning_rate: float
    weight_decay: float
    warmup_epochs: int
    epochs: int
    batch_size: int
    precision: str


def run(params: Params) -> None:
    """Train both variants with every seed and keep their weights, validation results and curves."""
    settings = params.classify
    recipe = Recipe(**{field.name: getattr(settings, field.name) for field in fields(Recipe)})
    task = read_task()
    train_photos, val_photos = read_photos(layout.TRAIN), read_photos(layout.VAL)
    if not train_photos:
        raise BobError(f"{layout.TRAIN} lists no photo; `dvc repro split` draws the shots")

    backbone = load_backbone(settings.backbone, len(task.classes))
    preprocessing = Preprocessing.of(backbone)
    real = _labelled(train_photos, task, preprocessing)
    synthetic = read_synthetic(task, preprocessing)
    validation = Validation.read(val_photos, task, preprocessing) if val_photos else None
    if not validation:
        click.echo("no validation photos: the last epoch of every run is kept")
    if not synthetic:
        click.echo(f"no synthetic images: {REAL_AND_SYNTHETIC} is {REAL_ONLY}")

    def train_once(variant: str, images: TrainingImages | None, seed: int) -> Run:
        torch.manual_seed(seed)  # the head's weights, dropout
        model = load_backbone(settings.backbone, len(task.classes))
        title = f"{variant}, seed {seed}"
        return train(model, real, images, validation, recipe, seed, best_device(), title)

    results: dict[str, dict[str, Result]] = {variant: {} for variant in VARIANTS}
    with replacing(layout.CLASSIFY) as folder:
        curves = Curves(folder / "curves")
        for seed in settings.seeds:
            run = train_once(REAL_ONLY, None, seed)
            both = train_once(REAL_AND_SYNTHETIC, synthetic, seed) if synthetic else run
            for variant, (weights, result, rows) in ((REAL_ONLY, run), (REAL_AND_SYNTHETIC, both)):
                curves.add(variant, seed, rows)
                write_weights(folder, variant, seed, weights, describe_network(backbone))
                results[variant][str(seed)] = result
        curves.end()
        trained = Trained(
            descriptor=task.descriptor,
            classes=task.classes,
            network=describe_network(backbone),
            preprocessing=preprocessing,
            seeds=tuple(settings.seeds),
            validation=results,
        )
        write_trained(folder, trained)
    click.echo(_summary(trained))


def _summary(trained: Trained) -> str:
    runs = f"{len(trained.seeds)} seed{'s' if len(trained.seeds) > 1 else ''}"
    parts = []
    for variant in VARIANTS:
        top1 = [result["top1"] for result in trained.validation[variant].values()]
        known = [value for value in top1 if value is not None]
        parts.append(f"{variant} {statistics.mean(known):.1f} %" if known else f"{variant} trained")
    return f"classify: top-1 on validation, {runs}: {', '.join(parts)}"


# --- data ---------------------------------------------------------------------------------------


class TrainingImages:
    """Labelled images of one source, real or synthetic, served as randomly cropped batches.

    Decoding and shrinking an image costs more than cropping it, and a few-shot set is seen dozens
    of times; so shrunk images stay in memory, as bytes, up to KEPT_BYTES, and the rest is decoded
    again each time.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Sequence[int],
        classes: int,
        preprocessing: Preprocessing,
    ) -> None:
        self.paths = paths
        self.targets = F.one_hot(torch.tensor(labels), classes).float()
        self.preprocessing = preprocessing
        self._kept: dict[int, Tensor] = {}
        self._room = KEPT_BYTES

    def __len__(self) -> int:
        return len(self.paths)

    def crops(self, indices: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Randomly cropped and flipped images, float32 [N, 3, H, W], and targets [N, classes].

        The draws from `random` are as many for every image, whatever its size.
        """
        draws = torch.rand(len(indices), 5, generator=random)
        images = [
            self._crop(self._pixels(int(index)), *draw.tolist())
            for index, draw in zip(indices, draws, strict=True)
        ]
        return normalise(torch.stack(images), self.preprocessing), self.targets[indices]

    def _crop(
        self, pixels: Tensor, area: float, aspect: float, top: float, left: float, flip: float
    ) -> Tensor:
        """The crop of Inception (arXiv 1409.4842) from five uniform draws, uint8 [3, H, W]."""
        height, width = pixels.shape[1:]
        surface = height * width * (CROP_AREA[0] + area * (CROP_AREA[1] - CROP_AREA[0]))
        low, high = map(math.log, CROP_ASPECT)
        ratio = math.exp(low + aspect * (high - low))
        h = min(height, round(math.sqrt(surface / ratio)))
        w = min(width, round(math.sqrt(surface * ratio)))
        crop = tv.resized_crop(
            pixels,
            round(top * (height - h)),
            round(left * (width - w)),
            h,
            w,
            list(self.preprocessing.size),
            str_to_interp_mode(self.preprocessing.interpolation),
        )
        return crop.flip(-1) if flip < 0.5 else crop

    def _pixels(self, index: int) -> Tensor:
        if index in self._kept:
            return self._kept[index]
        image = open_image(self.paths[index])
        # As large as evaluation sees it before its crop; more would be shrunk away again.
        shorter = math.ceil(max(self.preprocessing.size) / self.preprocessing.crop_pct)
        if min(image.size) > shorter:
            image = tv.resize(image, [shorter])
        pixels = tv.pil_to_tensor(image)
        if pixels.nbytes <= self._room:
            self._room -= pixels.nbytes
            self._kept[index] = pixels
        return pixels


@dataclass(frozen=True)
class Validation:
    """The validation photos as the network sees them, in batches."""

    pixels: list[Tensor]
    """uint8, each [<= 64, 3, H, W]"""
    labels: Tensor
    preprocessing: Preprocessing

    @classmethod
    def read(
        cls, photos: Sequence[Photo], task: Task, preprocessing: Preprocessing
    ) -> "Validation":
        """Decode the photos; they are looked at many times."""
        pixels = torch.stack([read_pixels(photo.path, preprocessing) for photo in photos])
        labels = torch.tensor([task.classes.index(photo.class_name) for photo in photos])
        return cls(list(pixels.split(64)), labels, preprocessing)

    def measure(self, model: nn.Module, device: torch.device) -> tuple[float, float]:
        """Top-1 accuracy in percent, and mean cross-entropy."""
        inputs = (normalise(batch, self.preprocessing) for batch in self.pixels)
        logits = predict(model, inputs, device)
        top1 = 100 * (logits.argmax(1) == self.labels).double().mean().item()
        return top1, F.cross_entropy(logits, self.labels).item()


def _labelled(photos: Sequence[Photo], task: Task, preprocessing: Preprocessing) -> TrainingImages:
    labels = [task.classes.index(photo.class_name) for photo in photos]
    paths = [Path(photo.path) for photo in photos]
    return TrainingImages(paths, labels, len(task.classes), preprocessing)


def read_synthetic(task: Task, preprocessing: Preprocessing) -> TrainingImages | None:
    """The generated set; None where its manifest is empty.

    Raises BobError naming a class that is none of the task's.
    """
    images = read_manifest()
    unknown = {image.class_name for image in images}.difference(task.classes)
    if unknown:
        raise BobError(
            f"{layout.GENERATED} has images of {min(unknown)!r}, which {layout.CLASSES} does not "
            "list; `dvc repro generate` makes the set anew"
        )
    paths = [layout.GENERATE / image.file for image in images]
    labels = [task.classes.index(image.class_name) for image in images]
    return TrainingImages(paths, labels, len(task.classes), preprocessing) if images else None


# --- training -----------------------------------------------------------------------------------


def train(
    model: nn.Module,
    real: TrainingImages,
    synthetic: TrainingImages | None,
    validation: Validation | None,
    recipe: Recipe,
    seed: int,
    device: torch.device,
    title: str = "",
) -> Run:
    """Train `model`; returns the kept epoch's weights (CPU), its validation result and the curves.

    The curves have a row for every epoch: step (the epoch's number, from 0), train_loss and, where
    it was validated, val_top1 (percent) and val_loss. The result has the keys epoch, top1 and loss.
    """
    # On a CPU that has bf16, convolutions were no faster in it, and small ones ten times slower.
    on_cpu = recipe.precision == "auto" and device.type == "cpu"
    dtype = torch.float32 if on_cpu else resolve_precision(recipe.precision, device)
    model.to(device).to(memory_format=torch.channels_last)
    torch.backends.cudnn.deterministic = True
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    # Two streams of chance: the synthetic set must not move what happens to the real photos.
    real_random = torch.Generator().manual_seed(seed)
    synthetic_random = torch.Generator().manual_seed(seed + 2**31)
    synthetic_order = endless_order(len(synthetic), synthetic_random) if synthetic else iter(())

    steps_per_epoch = math.ceil(len(real) / recipe.batch_size)
    steps, warmup = recipe.epochs * steps_per_epoch, recipe.warmup_epochs * steps_per_epoch
    validate_every = math.ceil(recipe.epochs / VALIDATIONS)
    step, best = 0, (-1.0, 0.0)
    weights: dict[str, Tensor] = {}
    result: Result = {}
    curves: list[dict[str, float]] = []

    for epoch in tqdm(range(recipe.epochs), desc=title, unit="epoch", disable=None):
        to_train_mode(model)
        losses = []
        for chosen in torch.randperm(len(real), generator=real_random).split(recipe.batch_size):
            images, targets = mixed(*real.crops(chosen, real_random), recipe, real_random)
            if synthetic:
                drawn = torch.tensor([next(synthetic_order) for _ in range(recipe.batch_size)])
                more_images, more_targets = mixed(
                    *synthetic.crops(drawn, synthetic_random), recipe, synthetic_random
                )
                images, targets = (
                    torch.cat([images, more_images]),
                    torch.cat([targets, more_targets]),
                )
            images = images.to(device, memory_format=torch.channels_last)
            with autocast(device, dtype):
                logits = model(images)
            loss = weighted_loss(
                logits.float(), targets.to(device), len(chosen), recipe.real_weight
            )

            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, warmup, recipe.learning_rate)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.detach())
            step += 1

        row = {"step": epoch, "train_loss": torch.stack(losses).mean().item()}
        if not all(map(math.isfinite, row.values())):
            raise BobError(
                f"{title}: the loss is no number in epoch {epoch}; lower classify.learning_rate"
            )
        last = epoch + 1 == recipe.epochs
        if validation and (last or (epoch + 1) % validate_every == 0):
            row["val_top1"], row["val_loss"] = validation.measure(model, device)
            score = (row["val_top1"], -row["val_loss"])
            if not weights or score > best:
                best, weights = score, _copy_of_weights(model)
                result = {"epoch": epoch, "top1": row["val_top1"], "loss": row["val_loss"]}
        curves.append(row)
    if not validation:
        weights = _copy_of_weights(model)
        result = {"epoch": recipe.epochs - 1, "top1": None, "loss": None}
    return weights, result, curves


def to_train_mode(model: nn.Module) -> None:
    """Training mode, but batch normalisation keeps the backbone's statistics.

    A few dozen images are too few to estimate them, and statistics over a batch of both sources
    would let synthetic images decide how real ones are normalised at test.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def endless_order(count: int, random: torch.Generator) -> Iterator[int]:
    """Indices below `count`, shuffled pass after pass."""
    while True:
        yield from torch.randperm(count, generator=random).tolist()


def mixed(
    images: Tensor, targets: Tensor, recipe: Recipe, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """CutMix (arXiv 1905.04899) or MixUp (1710.09412) of a batch, with probability mix_probability.

    `images` is float [N, 3, H, W], `targets` [N, classes] with rows that sum to one; the result
    has the same shapes, and its rows sum to one. The share is Beta(1, 1), one for the batch.
    """
    whether, share, top, left = torch.rand(4, generator=random).tolist()
    partner = torch.randperm(len(images), generator=random)
    if recipe.mix == "none" or whether >= recipe.mix_probability:
        return images, targets
    if recipe.mix == "mixup":
        images = share * images + (1 - share) * images[partner]
    else:
        height, width = images.shape[2:]
        side = math.sqrt(1 - share)
        h, w = round(height * side), round(width * side)
        y, x = round(top * (height - h)), round(left * (width - w))
        images = images.clone()
        images[:, :, y : y + h, x : x + w] = images[partner, :, y : y + h, x : x + w]
        share = 1 - h * w / (height * width)
    return images, share * targets + (1 - share) * targets[partner]


def weighted_loss(logits: Tensor, targets: Tensor, real: int, real_weight: float) -> Tensor:
    """The paper's loss: lambda * CE(real) + (1 - lambda) * CE(synthetic), each a mean.

    `logits` and soft `targets` are [N, classes]; the first `real` rows are of real photos. Without
    synthetic rows it is CE(real), whatever lambda.
    """
    real_loss = F.cross_entropy(logits[:real], targets[:real])
    if len(logits) == real:
        return real_loss
    synthetic_loss = F.cross_entropy(logits[real:], targets[real:])
    return real_weight * real_loss + (1 - real_weight) * synthetic_loss


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up to `peak` in `warmup` steps, then cosine to FINAL_LEARNING_RATE."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return FINAL_LEARNING_RATE + (peak - FINAL_LEARNING_RATE) * cosine


def _copy_of_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


# --- learning curves ----------------------------------------------------------------------------


class Curves:
    """Learning curves as dvclive writes them: `plots/metrics/<variant>/seed-<n>/<metric>.tsv`.

    `<variant>/<metric>.tsv` beside the seeds' folders is the mean over the seeds, which is what
    one wants to look at first.
    """

    def __init__(self, folder: Path) -> None:
        # The pipeline owns dvc.yaml and the experiment; dvclive is here for its file format.
        self._live = Live(str(folder), save_dvc_exp=False, dvcyaml=False)
        self._runs: dict[str, list[list[dict[str, float]]]] = {}

    def add(self, variant: str, seed: int, rows: list[dict[str, float]]) -> None:
        """Write the curves of one run: rows with the key step and any metrics."""
        self._runs.setdefault(variant, []).append(rows)
        self._write(f"{variant}/seed-{seed}", rows)

    def end(self) -> None:
        """Write the means over the seeds."""
        for variant, runs in self._runs.items():
            rows = [
                {key: statistics.fmean(row[key] for row in same_epoch) for key in same_epoch[0]}
                for same_epoch in zip(*runs, strict=True)
            ]
            self._write(variant, [{**row, "step": int(row["step"])} for row in rows])
        self._live.end()

    def _write(self, prefix: str, rows: list[dict[str, float]]) -> None:
        for row in rows:
            self._live.step = row["step"]
            for name in sorted(row.keys() - {"step"}):  # a set has another order each time
                self._live.log_metric(f"{prefix}/{name}", row[name])
