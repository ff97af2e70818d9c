"""Does a generated image of the miniature show the class it was asked for?

Run from the project root after `dvc repro` with `data.name: miniature`. The truth about the eight
task classes can be drawn without end, so a judge is trained on true pictures (the miniature's
backbone, fine-tuned on every class in every context) and looks at `results/generate`. Printed are
the judge's accuracy on true pictures it has not seen, and for the generated images: the share of
the right class, of the right family, and of the right class when only its family's two are asked.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from bob.formats.layout import GENERATE
from bob.formats.manifest import read_manifest
from bob.formats.photos import open_image
from bob.miniature import world
from bob.miniature.backbone import SOFTENED, augmented
from bob.miniature.corpus import as_input, draw_pictures
from bob.models.backbones import load_timm

NAMES = [variant.name for variant in world.TASK]
FAMILIES = [variant.family for variant in world.TASK]
# Streams of pictures that neither the dataset nor the corpus has.
JUDGE_SEED, CHECK_SEED = 1_000_011, 1_000_012
BATCH = 64
BACKBONE = Path("models/miniature-backbone")


def pictures(indices: range, seed: int) -> tuple[Tensor, Tensor]:
    """Every class in every context for each index: float32 [N, 3, 64, 64] in [-1, 1], labels."""
    drawn = draw_pictures(world.TASK, indices, seed)
    return drawn.tensor(slice(None)), torch.from_numpy(drawn.variant)


def read_pictures(paths: Iterable[Path]) -> Tensor:
    """Images of the miniature's size as the judges take them: float32 [N, 3, 64, 64] in [-1, 1]."""
    return as_input(np.stack([np.asarray(open_image(path)) for path in paths]))


def train_judge(
    images: Tensor, labels: Tensor, steps: int, classes: int = len(world.TASK)
) -> nn.Module:
    """The backbone, fine-tuned; half of the batches are softened, as generated images are soft."""
    torch.manual_seed(0)
    judge = load_timm(BACKBONE, classes).train()
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3, weight_decay=5e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    random = torch.Generator().manual_seed(0)
    for _ in tqdm(range(steps), "training the judge"):
        rows = torch.randint(len(images), (BATCH,), generator=random)
        batch = augmented(images[rows], SOFTENED, random)
        loss = F.cross_entropy(judge(batch), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


@torch.inference_mode()
def shares(judge: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of images of the right class, family, and class among the two of its family."""
    logits = torch.cat([judge(batch) for batch in images.split(256)])
    family = torch.tensor([FAMILIES.index(name) for name in FAMILIES])
    named = logits.argmax(1)
    rivals = logits.masked_fill(family[None, :] != family[labels][:, None], -torch.inf)
    return {
        "class": (named == labels).float().mean().item(),
        "family": (family[named] == family[labels]).float().mean().item(),
        "class within family": (rivals.argmax(1) == labels).float().mean().item(),
    }


def main() -> None:
    """Print the shares over all generated images, and by class."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=600, help="of the judge's training")
    parser.add_argument("--pictures", type=int, default=8, help="a class and context, for it")
    arguments = parser.parse_args()
    judge = train_judge(*pictures(range(arguments.pictures), JUDGE_SEED), arguments.steps)
    generated = read_manifest()
    images = read_pictures(GENERATE / image.file for image in generated)
    labels = torch.tensor([NAMES.index(image.class_name) for image in generated])
    rows = {"true pictures": shares(judge, *pictures(range(2), CHECK_SEED))}
    rows["generated"] = shares(judge, images, labels)
    for label, name in enumerate(NAMES):
        own = labels == label
        if own.any():
            rows[f"  {name}"] = shares(judge, images[own], labels[own])
    for name, values in rows.items():
        print(f"{name:<16}", "  ".join(f"{what} {share:6.1%}" for what, share in values.items()))


if __name__ == "__main__":
    main()
