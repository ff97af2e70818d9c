"""Trained classifiers on disk: what rebuilds the network, and the weights beside it.

A trained classifier needs its backbone's folder no more, nor a text side: it takes pixels to
logits.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from bob.errors import BobError
from bob.formats.files import read_json, write_json
from bob.formats.layout import CLASSIFY
from bob.models.backbones import build_network
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
    network: dict[str, Any]
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


def weights_path(folder: Path, variant: str, seed: int) -> Path:
    """Where the weights of one classifier lie."""
    return folder / variant / f"seed-{seed}.safetensors"


def weights_file(
    weights: dict[str, Tensor], description: dict[str, Any], history: dict[str, Any]
) -> bytes:
    """One classifier's file: its weights and, as JSON, how its training went."""
    # One metadata key at most: safetensors writes several in an order that changes by process.
    about = {"architecture": description["architecture"], "history": history}
    metadata = {"bob": json.dumps(about, sort_keys=True)}
    return save({name: tensor.contiguous() for name, tensor in weights.items()}, metadata)


def read_history(path: Path) -> dict[str, Any]:
    """How the training of the classifier in `path` went, as given to `weights_file`."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["bob"])["history"]


def load_classifier(
    trained: Trained, variant: str, seed: int, folder: Path = CLASSIFY
) -> nn.Module:
    """One trained classifier in evaluation mode, on the CPU.

    Raises BobError naming a weights file that is missing or does not fit.
    """
    path = weights_path(folder, variant, seed)
    model = build_network(trained.network)
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BobError(
            f"{path} cannot be loaded ({reason}); `dvc repro classify` makes it anew"
        ) from None
    return model.eval()
