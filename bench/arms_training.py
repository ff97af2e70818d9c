"""What `bench.arms` trains classifiers with: bob's trainer, and what only an arm asks of it.

Where an arm asks for nothing of its own, a classifier has the recipe that the stage `classify`
gives it, so that the item cache has it once for both.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2 import TrivialAugmentWide
from torchvision.transforms.v2.functional import resize

from bob.cache.recipe import bare, item_key
from bob.formats.photos import Task
from bob.models.backbones import Backbone
from bob.models.device import computing_device
from bob.models.training import Labelled, Recipe, Trainer, TrainingImages


class ArmTrainer(Trainer):
    """A trainer with augmentation, label smoothing, or soft labels of the synthetic images."""

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        recipe: Recipe,
        *,
        augment: str,
        smoothing: float,
        soft: Tensor | None,
        **images: Labelled,
    ) -> None:
        super().__init__(backbone, task, recipe, **images)
        self._augment, self._smoothing, self._soft = augment, smoothing, soft

    def settings(self, with_synthetic: bool) -> dict[str, object]:
        """What decides a classifier; bob's own where there is nothing else to it."""
        own: dict[str, object] = {}
        if self._augment != "none":
            own["augment"] = self._augment
        if self._smoothing:
            own["smoothing"] = self._smoothing
        if with_synthetic and self._soft is not None:
            own["soft"] = item_key(soft=self._soft.tolist())
        if own:  # the code that bob's makers do not know of
            own["arms"] = item_key(code=bare(Path(__file__).read_text("utf-8")))
        return super().settings(with_synthetic) | own

    def _images(self, images: Labelled) -> TrainingImages:
        served = ArmImages(
            images,
            len(self._task.classes),
            self._backbone.preprocessing,
            computing_device(),
        )
        soft = self._soft if images is self._synthetic else None
        served.change(augment=self._augment, smoothing=self._smoothing, soft=soft)
        return served


class ArmImages(TrainingImages):
    """Training images that may be augmented, and have soft targets."""

    def change(self, *, augment: str, smoothing: float, soft: Tensor | None) -> None:
        """To be called once.

        `augment`, before the crop, is one of AUGMENTATIONS. `smoothing` s
        makes targets (1 - s) * target + s / classes. `soft` are targets [N, classes], whose rows
        sum to one, in place of labels.
        """
        if soft is not None:
            self.targets = soft.to(self.targets)
        self.targets = (1 - smoothing) * self.targets + smoothing / self.targets.shape[1]
        # It draws from torch's global generator, which the trainer seeds: so the batches of both
        # sources are those without it.
        self._augment = AUGMENTATIONS[augment]

    def _pixels(self, index: int) -> Tensor:
        return self._augment(super()._pixels(index))


def degraded(pixels: Tensor) -> Tensor:
    """An image, uint8 (3, h, w), less sharp and with grain, as much as chance has it.

    So that how sharp an image is, and what grain it has, tells neither its source nor its class.
    """
    height, width = pixels.shape[-2:]
    share = float(torch.empty(()).uniform_(SHARPNESS, 1))
    size = [max(1, round(share * height)), max(1, round(share * width))]
    soft = resize(resize(pixels, size, antialias=True), [height, width], antialias=True)
    grain = float(torch.empty(()).uniform_(0, GRAIN)) * torch.randn(
        1, height, width, device=pixels.device
    )
    return (soft + grain).round().clamp(0, 255).to(torch.uint8)


SHARPNESS = 0.5
"""The least share of an image's pixels along a side that are left."""
GRAIN = 6.0
"""The greatest standard deviation, in grey levels, alike in all channels."""
AUGMENTATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "none": lambda pixels: pixels,
    "trivial": TrivialAugmentWide(),  # arXiv 2103.10158
    "degrade": degraded,
}


def together(*sets: Labelled) -> Labelled:
    """The images of several sets, one after the other."""
    return Labelled(
        sum((one.paths for one in sets), ()),
        sum((one.sha256 for one in sets), ()),
        sum((one.labels for one in sets), ()),
    )


def chosen(images: Labelled, places: list[int]) -> Labelled:
    """Those images of a set, in this order."""
    return Labelled(
        tuple(images.paths[place] for place in places),
        tuple(images.sha256[place] for place in places),
        tuple(images.labels[place] for place in places),
    )


def relabelled(images: Labelled, labels: list[int]) -> Labelled:
    """The images with other labels."""
    return Labelled(images.paths, images.sha256, tuple(labels))


def rounded(probabilities: Tensor) -> Tensor:
    """Soft labels to three places, whose rows sum to one: rounding must not make another item."""
    coarse = (probabilities.double() * 1000).round()
    return (coarse / coarse.sum(1, keepdim=True)).to(torch.float32)
