"""Stage draw: the embedded miniature dataset, drawn by `bob.miniature.world`."""

import csv
import itertools
from typing import Any

from bob.errors import BobError
from bob.formats.files import replacing
from bob.formats.layout import MINIATURE
from bob.miniature.world import (
    CONTEXTS,
    DESCRIPTOR,
    TASK,
    TEST_SEED,
    VAL_SEED,
    draw,
    images_per_class,
    ties,
)


def run(params: Any) -> None:
    """Draw the miniature dataset into `data/miniature`.

    Reads `data.seed` and `draw.classes` (how many task classes, family by family),
    `draw.train_per_class` and `draw.per_context` (test images per class in each of the 36
    contexts; validation has half of it, at least one). Writes
    `{train,val,test}/<Class_Name>/*.png`, `dataset.yaml` with the descriptor, and `contexts.csv`
    with the truth about every image.
    Raises BobError where `draw.classes` is more than there are.
    """
    if not 1 <= params.draw.classes <= len(TASK):
        raise BobError(
            f"draw.classes: {params.draw.classes} is out of range; there are {len(TASK)} classes"
        )
    variants = TASK[: params.draw.classes]
    tied = ties(params.data.seed)
    counts = images_per_class(params.draw.train_per_class, params.draw.per_context)
    with replacing(MINIATURE) as folder:
        truth: list[tuple[str, str, str, str]] = []
        for variant in variants:
            training = list(itertools.product(*tied[variant.name]))
            splits = (
                ("train", training, params.data.seed),
                ("val", CONTEXTS, VAL_SEED),
                ("test", CONTEXTS, TEST_SEED),
            )
            for split, contexts, seed in splits:
                images = folder / split / variant.name.replace(" ", "_")
                images.mkdir(parents=True)
                for index in range(counts[split]):
                    background, pose = contexts[index % len(contexts)]
                    path = images / f"{index:04d}.png"
                    draw(variant, background, pose, index, seed).save(path)
                    truth.append((str(path.relative_to(folder)), variant.name, background, pose))
        (folder / "dataset.yaml").write_text(f"descriptor: {DESCRIPTOR}\n", encoding="utf-8")
        with (folder / "contexts.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("path", "class", "background", "pose"))
            writer.writerows(sorted(truth))
