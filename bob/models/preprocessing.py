"""How an image becomes a network's input."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from bob.formats.photos import open_image
from bob.models.threads import in_threads


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a network's input, in the terms of timm's data config."""

    size: tuple[int, int]
    """Height and width of the input, in pixels."""
    mean: tuple[float, ...]
    """Per channel (red, green, blue), of values from 0 to 1."""
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    """The input's share of the resized image's side."""
    crop_mode: str

    def __post_init__(self) -> None:
        """Raise ValueError for what would make of any image a NaN, or nothing."""
        numbers = (*self.size, *self.mean, *self.std, self.crop_pct)
        if not (
            all(isinstance(one, int | float) and math.isfinite(one) for one in numbers)
            and len(self.mean) == len(self.std) == 3
            and min(*self.size, *self.std, self.crop_pct) > 0
        ):
            raise ValueError(
                f"its preprocessing has size {self.size}, mean {self.mean}, std {self.std} and "
                f"crop_pct {self.crop_pct}, of which one cannot be"
            )

    @classmethod
    def of(cls, model: nn.Module) -> "Preprocessing":
        """What a timm model was trained with."""
        config = resolve_model_data_config(model)
        return cls(
            size=tuple(config["input_size"][1:]),
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            interpolation=config["interpolation"],
            crop_pct=config["crop_pct"],
            crop_mode=config["crop_mode"],
        )

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Preprocessing":
        """The inverse of `dataclasses.asdict`, from JSON, where tuples have become lists."""
        tuples: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in value.items()
        }
        return cls(**tuples)


def read_pixels(path: str | Path, preprocessing: Preprocessing) -> Tensor:
    """Decode, resize and crop one image as timm does in evaluation: uint8 [3, height, width].

    Raises BobError naming a file that is missing or no image.
    """
    return _transform(preprocessing)(open_image(path))


@cache
def _transform(preprocessing: Preprocessing) -> Callable[[Image.Image], Tensor]:
    return create_transform(
        input_size=(3, *preprocessing.size),
        is_training=False,
        use_prefetcher=True,  # timm's word for: give uint8, normalisation comes later
        interpolation=preprocessing.interpolation,
        crop_pct=preprocessing.crop_pct,
        crop_mode=preprocessing.crop_mode,
    )


def normalise(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Pixels as a network wants them: uint8 [N, 3, H, W] to float32 of the same shape."""
    mean, std = _mean_and_std(preprocessing, pixels.device)
    return (pixels.float() / 255 - mean) / std


@cache  # or each batch would wait for the GPU's queue to have them copied
def _mean_and_std(preprocessing: Preprocessing, device: torch.device) -> tuple[Tensor, Tensor]:
    mean = torch.tensor(preprocessing.mean, device=device).view(1, -1, 1, 1)
    std = torch.tensor(preprocessing.std, device=device).view(1, -1, 1, 1)
    return mean, std


def read_inputs(
    paths: Sequence[str | Path], preprocessing: Preprocessing, batch_size: int = 64
) -> Iterator[Tensor]:
    """Network inputs of the images, in order and in batches: float32 [<= batch_size, 3, H, W]."""
    decoded = in_threads(lambda path: read_pixels(path, preprocessing), paths)
    while pixels := list(islice(decoded, batch_size)):
        yield normalise(torch.stack(pixels), preprocessing)
