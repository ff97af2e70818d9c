"""Training one classifier: photos, generated images and a seed in, a weights file out.

Here is all that decides a classifier's weights. The recipe is the paper's (published scripts of
arXiv 2510.24078).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tv
from tqdm import tqdm

from bob.cache.recipe import item_key
from bob.errors import BobError
from bob.formats.photos import Task, open_image
from bob.models.backbones import Backbone, predict
from bob.models.classifiers import weights_file
from bob.models.crops import FILTERS, cropped, crops_at_once, draw_crop
from bob.models.device import autocast, computing_device, send
from bob.models.precision import dtype_name, hardware, resolve_precision
from bob.models.preprocessing import Preprocessing, normalise, read_pixels
from bob.models.threads import in_threads

# Named in a classifier's key in the item cache: the modules that train it, and what they stand on;
# those of the backbone's kind come on top.
MADE_BY = (
    "models.backbones",
    "models.classifiers",
    "models.crops",
    "models.device",
    "models.loading",
    "models.precision",
    "models.preprocessing",
    "models.threads",
    "models.training",
    "formats.photos",
)
LIBRARIES = ("pillow", "timm", "torch", "torchvision")

FINAL_LEARNING_RATE = 1e-8
VALIDATIONS = 10
KEPT_BYTES = 4 * 2**30  # of decoded images, for each source
CPU = torch.device("cpu")

Result = dict[str, float | int | None]
"""Of one training on validation: the epoch kept, its top1 and its loss."""
Curves = list[dict[str, float]]
"""A row for every epoch: step (the epoch's number, from 0), train_loss and, where it was validated,
val_top1 (percent) and val_loss."""


@dataclass(frozen=True)
class Recipe:
    """The training settings; `params.yaml` says what they mean."""

    lora_rank: int
    real_weight: float
    mix: str
    mix_probability: float
    learning_rate: float
    layer_decay: float
    weight_decay: float
    warmup_epochs: int
    epochs: int
    batch_size: int
    precision: str


@dataclass(frozen=True)
class Labelled:
    """Images of one source with their labels, not yet decoded."""

    paths: tuple[Path, ...]
    sha256: tuple[str, ...]
    """Of the files' bytes."""
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def content(self) -> str:
        """Hash of all images and labels, in order; where the files lie does not count."""
        return item_key(images=self.sha256, labels=self.labels)


class Trainer:
    """Trains classifiers on the same real photos, with synthetic images or without.

    Weights and images are read when the first one is trained. `synthetic` and `validation`
    may be empty; without synthetic images, training with them is training without.
    """

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        recipe: Recipe,
        *,
        real: Labelled,
        synthetic: Labelled,
        validation: Labelled,
    ) -> None:
        self._backbone, self._task, self._recipe = backbone, task, recipe
        self._real, self._synthetic, self._validation = real, synthetic, validation
        self._dtype = training_dtype(recipe.precision)
        self.made_by = (*MADE_BY, *backbone.modules)
        self.libraries = (*LIBRARIES, *backbone.libraries)

    def settings(self, with_synthetic: bool) -> dict[str, object]:
        """What decides a classifier besides backbone, seed and code."""
        settings: dict[str, object] = {
            **asdict(self._recipe),
            **self._backbone.decided_by(self._task),
            "precision": dtype_name(self._dtype),
            "classes": len(self._task.classes),
            "real": self._real.content,
            "validation": self._validation.content,
        }
        if with_synthetic and self._synthetic:
            return settings | {"synthetic": self._synthetic.content}
        del settings["real_weight"]  # weighs one source against the other
        return settings

    @cached_property
    def config(self) -> dict[str, Any]:
        """The JSON files that lie beside every classifier's weights, as `Backbone.files` gives it.

        Raises BobError where the backbone is unfit.
        """
        classifier = self._backbone.classifier(self._trainable())
        return self._backbone.files(classifier, self._task.classes)

    def _trainable(self) -> nn.Module:
        return self._backbone.trainable(self._task, self._recipe.lora_rank)

    @cached_property
    def _real_images(self) -> "TrainingImages":
        return self._images(self._real)

    @cached_property
    def _synthetic_images(self) -> "TrainingImages":
        return self._images(self._synthetic)

    def _images(self, images: Labelled) -> "TrainingImages":
        return TrainingImages(
            images, len(self._task.classes), self._backbone.preprocessing, computing_device()
        )

    @cached_property
    def _validation_images(self) -> "Validation | None":
        if not self._validation:
            return None
        return Validation.read(self._validation, self._backbone.preprocessing)

    def make(self, with_synthetic: bool, seed: int, title: str) -> list[bytes]:
        """Train one classifier and return its file, alone; `title` is for the progress bar."""
        real, validation = self._real_images, self._validation_images
        synthetic = self._synthetic_images if with_synthetic and self._synthetic else None
        # For a head or a LoRA, and dropout; after what only the first classifier has to read.
        torch.manual_seed(seed)
        weights, result, curves = train(
            self._trainable(),
            self._backbone.classifier,
            real,
            synthetic,
            validation,
            self._recipe,
            seed,
            computing_device(),
            self._dtype,
            title,
        )
        history = {"result": result, "curves": curves}
        return [weights_file(weights, self._backbone.architecture, history)]

    def files(self, with_synthetic: bool) -> dict[Path, str]:
        """Path and SHA-256 of the images that training reads."""
        used = (self._real, self._validation, *([self._synthetic] if with_synthetic else []))
        return {
            path: sha256
            for images in used
            for path, sha256 in zip(images.paths, images.sha256, strict=True)
        }


def training_dtype(precision: str) -> torch.dtype:
    """The dtype of matrix products in training for a `precision` parameter, where it is done."""
    # On a CPU that has bf16, convolutions were no faster in it, and small ones ten times slower.
    if precision == "auto" and hardware().device == "cpu":
        return torch.float32
    return resolve_precision(precision)


# --- images -------------------------------------------------------------------------------------


class TrainingImages:
    """Labelled images of one source, real or synthetic, served as randomly cropped batches.

    Decoding and shrinking an image costs more than cropping it, and a few-shot set is seen dozens
    of times; so shrunk images stay in memory, as bytes, as many as fit, and the rest is decoded
    again each time. They stay on `device`; on a GPU a batch is cropped there at once.
    """

    def __init__(
        self,
        images: Labelled,
        classes: int,
        preprocessing: Preprocessing,
        device: torch.device = CPU,
    ) -> None:
        self.paths = images.paths
        self.targets = F.one_hot(torch.tensor(images.labels), classes).float().to(device)
        self.preprocessing = preprocessing
        self._device = device
        # The cores crop one by one faster than they multiply; a GPU would wait for the cores.
        self._at_once = device.type == "cuda" and preprocessing.interpolation in FILTERS
        self._kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def crops(self, indices: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Randomly cropped and flipped images, float32 [N, 3, H, W], and targets [N, classes].

        The draws from `random` are as many for every image, whatever its size.
        """
        if not self._kept:
            self._read()
        draws = torch.rand(len(indices), 5, generator=random).tolist()
        images = [self._pixels(index) for index in indices.tolist()]
        crops = [
            draw_crop(draw, *image.shape[1:]) for draw, image in zip(draws, images, strict=True)
        ]
        how = (self.preprocessing.size, self.preprocessing.interpolation)
        if self._at_once:
            pixels = crops_at_once(images, crops, *how)
        else:
            pairs = zip(images, crops, strict=True)
            pixels = torch.stack([cropped(image, crop, *how) for image, crop in pairs])
        return normalise(pixels, self.preprocessing), self.targets[send(indices, self._device)]

    def _read(self) -> None:
        """Decode as many images as may be kept, in threads."""
        room = room_for_images(self._device)
        with closing(in_threads(self._decode, range(len(self)))) as decoded:
            for index, pixels in enumerate(decoded):
                room -= pixels.nbytes
                if room < 0 and self._kept:
                    return
                self._kept[index] = pixels

    def _pixels(self, index: int) -> Tensor:
        return self._kept[index] if index in self._kept else self._decode(index)

    def _decode(self, index: int) -> Tensor:
        image = open_image(self.paths[index])
        # As large as evaluation sees it before its crop; more would be shrunk away again.
        shorter = math.ceil(max(self.preprocessing.size) / self.preprocessing.crop_pct)
        if min(image.size) > shorter:
            image = tv.resize(image, [shorter])
        pixels = tv.pil_to_tensor(image)
        return pixels.to(self._device) if self._at_once else pixels


def room_for_images(device: torch.device) -> int:
    """Bytes of decoded images that may be kept, for each of the two sources."""
    if device.type != "cuda":
        return KEPT_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return min(KEPT_BYTES, free // 8)  # the network and its activations come later


@dataclass(frozen=True)
class Validation:
    """The validation photos as the network sees them, in batches."""

    pixels: list[Tensor]
    """uint8, each [<= 64, 3, H, W]"""
    labels: Tensor
    preprocessing: Preprocessing

    @classmethod
    def read(cls, photos: Labelled, preprocessing: Preprocessing) -> "Validation":
        """Decode the photos; they are looked at many times."""
        decoded = in_threads(lambda path: read_pixels(path, preprocessing), photos.paths)
        pixels = torch.stack(list(decoded))
        return cls(list(pixels.split(64)), torch.tensor(photos.labels), preprocessing)

    def measure(self, model: nn.Module, device: torch.device) -> tuple[float, float]:
        """Top-1 accuracy in percent, and mean cross-entropy."""
        # As bytes to the device: a quarter of what floats would be.
        inputs = (normalise(batch.to(device), self.preprocessing) for batch in self.pixels)
        logits = predict(model, inputs, device)
        top1 = 100 * (logits.argmax(1) == self.labels).double().mean().item()
        return top1, F.cross_entropy(logits, self.labels).item()


# --- training -----------------------------------------------------------------------------------


def train(
    model: nn.Module,
    classifier: Callable[[nn.Module], nn.Module],
    real: TrainingImages,
    synthetic: TrainingImages | None,
    validation: Validation | None,
    recipe: Recipe,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    title: str = "",
) -> tuple[dict[str, Tensor], Result, Curves]:
    """Train `model`; returns the kept epoch's weights (CPU), its validation result and the curves.

    Weights and result are those of `classifier(model)`, the classifier that it has become. The
    epoch kept is the one with the best top-1 on validation, between equals the one with the lower
    validation loss, then the earlier; without validation photos it is the last. Long runs are
    validated `VALIDATIONS` times at even distances, not after every epoch.
    """
    model.to(device).to(memory_format=torch.channels_last)
    torch.backends.cudnn.deterministic = True
    optimizer = torch.optim.AdamW(
        parameter_groups(model, recipe.layer_decay, recipe.weight_decay),
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        # One kernel for all weights, which in fp16 does not wait to hear whether the gradients are
        # finite. Not on a CPU, where the last bits would be others.
        fused=device.type == "cuda" or None,
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    batches = Batches(real, synthetic, recipe, seed)

    steps_per_epoch = math.ceil(len(real) / recipe.batch_size)
    steps, warmup = recipe.epochs * steps_per_epoch, recipe.warmup_epochs * steps_per_epoch
    validate_every = math.ceil(recipe.epochs / VALIDATIONS)
    step, best = 0, (-1.0, 0.0)
    weights: dict[str, Tensor] = {}
    result: Result = {}
    curves: Curves = []

    for epoch in tqdm(range(recipe.epochs), desc=title, unit="epoch", disable=None):
        to_train_mode(model)
        losses = []
        for images, targets, real_count in batches.epoch():
            images = send(images, device).to(memory_format=torch.channels_last)
            with autocast(device, dtype):
                logits = model(images)
            loss = weighted_loss(logits.float(), targets.to(device), real_count, recipe.real_weight)

            rate = learning_rate(step, steps, warmup, recipe.learning_rate)
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
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
            candidate = classifier(model)
            row["val_top1"], row["val_loss"] = validation.measure(candidate, device)
            score = (row["val_top1"], -row["val_loss"])
            if not weights or score > best:
                best, weights = score, _copy_of_weights(candidate)
                result = {"epoch": epoch, "top1": row["val_top1"], "loss": row["val_loss"]}
        curves.append(row)
    if not validation:
        weights = _copy_of_weights(classifier(model))
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


class Batches:
    """The batches of each epoch: as many images of either source, cropped and mixed."""

    def __init__(
        self, real: TrainingImages, synthetic: TrainingImages | None, recipe: Recipe, seed: int
    ) -> None:
        self._real, self._synthetic, self._recipe = real, synthetic, recipe
        # Two streams of chance: the synthetic set must not move what happens to the real photos.
        self._real_random = torch.Generator().manual_seed(seed)
        self._synthetic_random = torch.Generator().manual_seed(seed + 2**31)
        self._synthetic_order = (
            endless_order(len(synthetic), self._synthetic_random) if synthetic else iter(())
        )

    def epoch(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        """All real photos once, in a new order, each batch with the next synthetic images.

        Yields normalised images [N, 3, H, W], soft targets [N, classes] and how many of the first
        rows are of real photos.
        """
        size, recipe = self._recipe.batch_size, self._recipe
        order = torch.randperm(len(self._real), generator=self._real_random)
        for chosen in order.split(size):
            images, targets = mixed(
                *self._real.crops(chosen, self._real_random), recipe, self._real_random
            )
            if self._synthetic:
                drawn = torch.tensor([next(self._synthetic_order) for _ in range(size)])
                more_images, more_targets = mixed(
                    *self._synthetic.crops(drawn, self._synthetic_random),
                    recipe,
                    self._synthetic_random,
                )
                images = torch.cat([images, more_images])
                targets = torch.cat([targets, more_targets])
            yield images, targets, len(chosen)


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
    partner = send(torch.randperm(len(images), generator=random), images.device)
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


def parameter_groups(
    model: nn.Module, layer_decay: float, weight_decay: float
) -> list[dict[str, Any]]:
    """What of `model` is trained, as AdamW takes it: in one group, or in groups by depth.

    With a `layer_decay` below 1 the learning rate of a layer is multiplied by it once for every
    layer between it and the head (BEiT, arXiv 2106.08254), as timm counts layers: the group's
    `lr_scale`. Then timm's convention also decides what has no weight decay: biases, norms and what
    else the network names (position embeddings). At 1 all weights decay.

    Raises BobError for a network whose layers timm cannot count.
    """
    if layer_decay == 1:
        return [{"params": [weight for weight in model.parameters() if weight.requires_grad]}]
    if not hasattr(model, "group_matcher"):
        raise BobError(
            f"classify.layer_decay is {layer_decay}, which is for timm's networks that say which "
            f"layer a weight is of, and {type(model).__name__} does not; set it to 1"
        )
    exempt: set[str] = getattr(model, "no_weight_decay", set)()
    return param_groups_layer_decay(
        model, weight_decay, no_weight_decay_list=exempt, layer_decay=layer_decay
    )


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up to `peak` in `warmup` steps, then cosine to FINAL_LEARNING_RATE."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return FINAL_LEARNING_RATE + (peak - FINAL_LEARNING_RATE) * cosine


def _copy_of_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
