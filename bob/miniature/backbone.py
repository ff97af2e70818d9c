"""The backbone: a small ResNet, for timm, that knows the corpus as ImageNet's know ImageNet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import save_for_hf
from torch import Tensor, nn

from bob.miniature.corpus import Pictures
from bob.miniature.recipes import SEED, Recipe, Scale
from bob.miniature.training import fit
from bob.miniature.world import SIZE

ABOUT = (
    "A ResNet of 0.5 M parameters, for timm, that tells the corpus variants apart: what an "
    "ImageNet-pretrained network is to real photos."
)

BACKBONE = "resnet10t"
BACKBONE_ARGS: dict[str, Any] = {"channels": [24, 48, 88, 112], "stem_width": 16}


SOFTENED = 0.5  # share of the backbone's batches


def fit_network(
    name: str, corpus: Pictures, recipe: Recipe, softened: float, work: Path
) -> nn.Module:
    """Teach a small ResNet the corpus variants."""

    def loss(model: nn.Module, generator: torch.Generator, count: int) -> Tensor:
        rows = corpus.rows(count, generator)
        pixels = augmented(corpus.tensor(rows), softened, generator)
        truth = torch.from_numpy(corpus.variant[rows])
        return F.cross_entropy(model(pixels), truth, label_smoothing=0.1)

    torch.manual_seed(SEED)
    model = timm.create_model(BACKBONE, num_classes=len(corpus.variants), **BACKBONE_ARGS)
    return fit(name, model, loss, recipe, work)


def augmented(pixels: Tensor, softened: float, generator: torch.Generator) -> Tensor:
    """Pictures (n, 3, 64, 64), shifted by up to 4 pixels.

    With probability `softened` they are also resized to as little as 60 % and back, so that a
    network looks at parts and not at grain.
    """
    padded = F.pad(pixels, (4, 4, 4, 4), mode="replicate")
    x, y = torch.randint(9, (2,), generator=generator).tolist()
    shifted = padded[:, :, y : y + SIZE, x : x + SIZE]
    side = int(torch.randint(round(0.6 * SIZE), SIZE + 1, (), generator=generator))
    if torch.rand((), generator=generator) >= softened:
        return shifted
    smaller = F.interpolate(shifted, (side, side), mode="bilinear", antialias=True)
    return F.interpolate(smaller, (SIZE, SIZE), mode="bilinear")


def train(corpus: Pictures, scale: Scale, folder: Path, work: Path) -> dict[str, Recipe]:
    """Train the backbone, write its folder, and say how."""
    model = fit_network("backbone", corpus, scale.backbone, SOFTENED, work)
    save_for_hf(
        model.half(),
        str(folder),
        model_args=BACKBONE_ARGS,
        model_config={
            "pretrained_cfg": {
                "input_size": [3, SIZE, SIZE],
                "pool_size": [2, 2],
                "mean": [0.5] * 3,
                "std": [0.5] * 3,
                "interpolation": "bicubic",
                "crop_pct": 1.0,
            },
            "label_names": [variant.name for variant in corpus.variants],
        },
        safe_serialization=True,
    )
    return {"backbone": scale.backbone}
