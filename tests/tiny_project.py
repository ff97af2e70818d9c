"""A project folder with a tiny task of real images, for the tests of the classifier's stages."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from dvc.repo import Repo
from PIL import Image
from torch import nn

from bob.formats import layout
from bob.formats.files import write_json
from bob.formats.manifest import Generated, write_manifest
from bob.formats.params import Params
from bob.formats.photos import Photo, Task, write_photos, write_task
from bob.models.backbones import Backbone
from bob.models.classifiers import weights_file

CLASSES = ("Blue Disc", "Green Bar", "Red Square")
RECIPE: dict[str, Any] = {
    "backbone": "models/tiny",
    "lora_rank": 0,
    "real_weight": 0.5,
    "mix": "cutmix",
    "mix_probability": 0.5,
    "learning_rate": 3e-3,
    "layer_decay": 1.0,
    "weight_decay": 1e-2,
    "warmup_epochs": 1,
    "epochs": 3,
    "batch_size": 4,
    "precision": "fp32",
    "seeds": [0, 1],
}


def draw(class_name: str, seed: int, size: tuple[int, int] = (40, 36)) -> Image.Image:
    """A noisy picture whose class shows in shape and colour."""
    random = np.random.default_rng([seed, CLASSES.index(class_name)])
    pixels = random.integers(60, 120, (size[1], size[0], 3))
    y, x = random.integers(12, size[1] - 12), random.integers(12, size[0] - 12)
    rows, columns = np.mgrid[: size[1], : size[0]]
    if class_name == "Blue Disc":
        pixels[(rows - y) ** 2 + (columns - x) ** 2 < 90] = (20, 40, 240)
    elif class_name == "Green Bar":
        pixels[abs(rows - y) < 4] = (20, 230, 40)
    else:
        pixels[(abs(rows - y) < 9) & (abs(columns - x) < 9)] = (240, 30, 20)
    return Image.fromarray(pixels.astype(np.uint8))


def add_photos(root: Path, split: str, per_class: int, first_seed: int) -> list[Photo]:
    """Draw a split's photos into `data/tiny/<split>/`."""
    photos = []
    for class_name in CLASSES:
        for index in range(per_class):
            path = Path("data/tiny") / split / class_name.replace(" ", "_") / f"{index}.png"
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            draw(class_name, first_seed + index).save(root / path)
            content = hashlib.sha256((root / path).read_bytes()).hexdigest()
            photos.append(Photo(str(path), class_name, content))
    return photos


def add_generated(root: Path, per_class: int, first_seed: int = 900) -> None:
    """Draw a generated set, as the stage `generate` leaves it."""
    images = []
    for class_name in CLASSES:
        for index in range(per_class):
            file = Path("images") / class_name.replace(" ", "_") / f"{index:04}.png"
            target = root / layout.GENERATE / file
            target.parent.mkdir(parents=True, exist_ok=True)
            draw(class_name, first_seed + index).save(target)
            images.append(
                Generated(class_name, None, f"a photo of a {class_name}", index, str(file))
            )
    (root / layout.GENERATE).mkdir(parents=True, exist_ok=True)
    write_manifest(root / layout.GENERATED, images)


def make_project(
    root: Path, train: int = 2, val: int = 2, test: int = 3, generated: int = 2
) -> Path:
    """Fill `root` with everything the stage `classify` reads; counts are per class."""
    if not (root / ".dvc").exists():
        Repo.init(str(root), no_scm=True).close()
    backbone = root / "models/tiny"
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=5)
    timm.models.save_for_hf(
        model, backbone, safe_serialization=True, data_config={"input_size": (3, 32, 32)}
    )
    (root / layout.SPLIT).mkdir(parents=True, exist_ok=True)
    write_task(root / layout.CLASSES, Task("shape", CLASSES))
    for path, split, count, seed in (
        (layout.TRAIN, "train", train, 0),
        (layout.VAL, "val", val, 300),
        (layout.TEST, "test", test, 600),
    ):
        write_photos(root / path, add_photos(root, split, count, seed))
    add_generated(root, generated)
    return root


def save_classifier(folder: Path, backbone: Backbone, classifier: nn.Module) -> Path:
    """Write a classifier of `CLASSES` as the stage `classify` leaves it."""
    folder.mkdir()
    for name, content in backbone.files(classifier, CLASSES).items():
        write_json(folder / name, content)
    weights = weights_file(classifier.state_dict(), backbone.architecture, {})
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def classify_params(**changes: Any) -> Params:
    """The stage's parameters, as `params.for_stage("classify")` gives them."""
    return Params({"classify": {**RECIPE, **changes}}, "classify")


def forget_items() -> None:
    """Empty the item cache of the current folder's project."""
    shutil.rmtree(".dvc/cache", ignore_errors=True)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` by its relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
