"""Trained classifiers on disk: each a folder that its own library opens, timm or transformers.

It takes pixels to logits without its backbone's folder, and without a text side. What the
classifiers of a run share stands in `classifier.json`.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from bob.errors import BobError
from bob.formats.files import read_json, write_json
from bob.formats.layout import CLASSIFY
from bob.models.backbones import load_network
from bob.models.loading import LOADING_ERRORS, reason_of
from bob.models.preprocessing import Preprocessing

REAL_ONLY = "real_only"
REAL_AND_SYNTHETIC = "real_and_synthetic"
VARIANTS = (REAL_ONLY, REAL_AND_SYNTHETIC)


@dataclass(frozen=True)
class Trained:
    """Everything about the classifiers of one run of `classify` but their weights."""

    descriptor: str
    classes: tuple[str, ...]
    """In the order of the logits."""
    preprocessing: Preprocessing
    seeds: tuple[int, ...]
    validation: dict[str, dict[str, dict[str, float | int | None]]]
    """By variant, then by seed (as text, JSON's keys): the epoch kept, its top1 in percent and its
    loss; the latter two are None where there is no validation photo."""

    def best_seed(self, variant: str) -> int:
        """The seed best on validation: by top-1, then by loss, then the first one listed."""

        def goodness(seed: int) -> tuple[float, float]:
            result = self.validation[variant][str(seed)]
            top1, loss = result["top1"], result["loss"]
            return (0.0, 0.0) if top1 is None or loss is None else (top1, -loss)

        return max(self.seeds, key=goodness)


def write_trained(folder: Path, trained: Trained) -> None:
    """Write `classifier.json`."""
    best = {variant: trained.best_seed(variant) for variant in trained.validation}
    write_json(folder / "classifier.json", {**asdict(trained), "best_seed": best})


def read_trained(folder: Path = CLASSIFY) -> Trained:
    """Read `classifier.json`; raises BobError naming the file where it is missing or malformed."""
    path = folder / "classifier.json"
    value = read_json(path)
    try:
        value.pop("best_seed")
        trained = Trained(**value)
        return replace(
            trained,
            classes=tuple(trained.classes),
            seeds=tuple(trained.seeds),
            preprocessing=Preprocessing.from_json(value["preprocessing"]),
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise BobError(
            f"{path}: not what `bob classify` writes ({error}); `dvc repro classify` makes it anew"
        ) from None


def classifier_folder(folder: Path, variant: str, seed: int) -> Path:
    """Where one classifier lies among those of a run."""
    return folder / variant / f"seed-{seed}"


def weights_path(folder: Path, variant: str, seed: int) -> Path:
    """Where the weights of one classifier lie."""
    return classifier_folder(folder, variant, seed) / "model.safetensors"


def weights_file(weights: dict[str, Tensor], architecture: str, history: dict[str, Any]) -> bytes:
    """One classifier's `model.safetensors`: its weights and, as JSON, how its training went."""
    # One metadata key at most: safetensors writes several in an order that changes by process.
    about = {"architecture": architecture, "history": history}
    metadata = {"bob": json.dumps(about, sort_keys=True)}
    return save({name: tensor.contiguous() for name, tensor in weights.items()}, metadata)


def read_history(path: Path) -> dict[str, Any]:
    """How the training of the classifier in `path` went, as given to `weights_file`."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["bob"])["history"]


def load_classifier(variant: str, seed: int, folder: Path = CLASSIFY) -> nn.Module:
    """One trained classifier in evaluation mode, on the CPU.

    Raises BobError naming its folder where a file is missing or does not fit.
    """
    path = classifier_folder(folder, variant, seed)
    try:
        return load_network(path).eval()
    except LOADING_ERRORS as error:
        raise BobError(
            f"{path} cannot be loaded ({reason_of(error)}); `dvc repro classify` makes it anew"
        ) from None
