"""Random crops of training images: one by one as torchvision resizes, or a batch in two products.

On a GPU, cropping images one by one on the CPU would take longer than the network's step. There,
resizing is linear and separable, so a batch of crops is two batched matrix products, whose matrices
hold the weights of the same antialiased filter.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from bob.models.device import send

CROP_AREA = (0.5, 1.0)  # share of the image; smaller crops would lose the part that tells classes
CROP_ASPECT = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Crop:
    """A part of an image, in pixels, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


def draw_crop(draws: Sequence[float], height: int, width: int) -> Crop:
    """The crop of Inception (arXiv 1409.4842) from five uniform draws.

    They are for area, aspect, top, left and flip, as many whatever the image's size.
    """
    area, aspect, top, left, flip = draws
    surface = height * width * (CROP_AREA[0] + area * (CROP_AREA[1] - CROP_AREA[0]))
    low, high = map(math.log, CROP_ASPECT)
    ratio = math.exp(low + aspect * (high - low))
    h = min(height, round(math.sqrt(surface / ratio)))
    w = min(width, round(math.sqrt(surface * ratio)))
    return Crop(round(top * (height - h)), round(left * (width - w)), h, w, flip < 0.5)


def cropped(pixels: Tensor, crop: Crop, size: tuple[int, int], interpolation: str) -> Tensor:
    """One crop, resized to `size` (height, width): uint8 [3, H, W] to uint8 [3, *size]."""
    resized = tv.resized_crop(
        pixels,
        crop.top,
        crop.left,
        crop.height,
        crop.width,
        list(size),
        str_to_interp_mode(interpolation),
    )
    return resized.flip(-1) if crop.flip else resized


def crops_at_once(
    images: Sequence[Tensor], crops: Sequence[Crop], size: tuple[int, int], interpolation: str
) -> Tensor:
    """As `cropped`, of a batch: uint8 [3, H, W] each, on one device, to float32 [N, 3, *size].

    Values are from 0 to 255 and not rounded, so that they differ from those of `cropped` by half a
    grey level, where rounding between its two passes adds up by one and a half. `interpolation` is
    one of FILTERS.
    """
    device = images[0].device
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    batch = torch.zeros(len(images), 3, height, width, dtype=torch.uint8, device=device)
    for place, image in zip(batch, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image

    def along(starts: list[int], lengths: list[int], inputs: int, outputs: int) -> Tensor:
        spans = torch.tensor([starts, lengths], dtype=torch.float32)
        start, length = send(spans, device)
        return resizing(start, length, inputs, outputs, interpolation)

    rows = along([c.top for c in crops], [c.height for c in crops], height, size[0])
    columns = along([c.left for c in crops], [c.width for c in crops], width, size[1])
    flips = send(torch.tensor([crop.flip for crop in crops]), device)
    columns = torch.where(flips.view(-1, 1, 1), columns.flip(1), columns)
    # Bicubic weights overshoot; Pillow and torch clip after each of the two passes.
    wide = torch.einsum("nchw,nxw->nchx", batch.float(), columns).clamp_(0, 255)
    return torch.einsum("nyh,nchx->ncyx", rows, wide).clamp_(0, 255)


def resizing(
    starts: Tensor, lengths: Tensor, inputs: int, outputs: int, interpolation: str
) -> Tensor:
    """How much each input pixel counts in each output pixel: float32 [N, outputs, inputs].

    The outputs lie evenly in [start, start + length), one of `starts` and `lengths`, both [N], for
    each image. Antialiased as Pillow and torch do: where it shrinks, the filter is as much wider.
    """
    support, kernel = FILTERS[interpolation]
    device = starts.device
    start, length = starts.view(-1, 1, 1), lengths.view(-1, 1, 1)
    scale = length / outputs
    stretch = scale.clamp(min=1)
    centre = start + scale * (torch.arange(outputs, device=device).view(1, -1, 1) + 0.5)
    pixel = torch.arange(inputs, device=device).view(1, 1, -1) + 0.5
    distance = (pixel - centre) / stretch
    inside = (pixel > start) & (pixel < start + length) & (distance.abs() < support)
    weights = torch.where(inside, kernel(distance.abs()), 0.0)
    return weights / weights.sum(-1, keepdim=True)


def _triangle(x: Tensor) -> Tensor:
    return 1 - x


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution with a = -1/2, the one that Pillow and antialiasing torch have."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, far)


FILTERS: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "bilinear": (1.0, _triangle),
    "bicubic": (2.0, _cubic),
}
"""By interpolation: half the width of the filter, in pixels, and its values by distance."""
