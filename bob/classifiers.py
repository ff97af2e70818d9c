"""Classifiers: the pretrained network they start from, the preprocessing it wants, files on disk.

A backbone is a folder as timm writes it, or as transformers writes a CLIP (bob/clip.py). A trained
classifier needs that folder no more, nor a text side: it takes pixels to logits, `Trained` has all
that rebuilds the network, and its weights lie beside.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from timm.data import create_transform, resolve_model_data_config
from timm.models import get_model_args
from torch import Tensor, nn

from bob.data import Task, batches, open_image
from bob.errors import BobError
from bob.files import read_json, write_json
from bob.layout import CLASSIFY

REAL_ONLY = "real_only"
REAL_AND_SYNTHETIC = "real_and_synthetic"
VARIANTS = (REAL_ONLY, REAL_AND_SYNTHETIC)


# --- images -------------------------------------------------------------------------------------


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
    transform = create_transform(
        input_size=(3, *preprocessing.size),
        is_training=False,
        use_prefetcher=True,  # timm's word for: give uint8, normalisation comes later
        interpolation=preprocessing.interpolation,
        crop_pct=preprocessing.crop_pct,
        crop_mode=preprocessing.crop_mode,
    )
    return transform(open_image(path))


def normalise(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Pixels as a network wants them: uint8 [N, 3, H, W] to float32 of the same shape."""
    mean = torch.tensor(preprocessing.mean, device=pixels.device).view(1, -1, 1, 1)
    std = torch.tensor(preprocessing.std, device=pixels.device).view(1, -1, 1, 1)
    return (pixels.float() / 255 - mean) / std


def read_inputs(
    paths: Sequence[str | Path], preprocessing: Preprocessing, batch_size: int = 64
) -> Iterator[Tensor]:
    """Network inputs of the images, in order and in batches: float32 [<= batch_size, 3, H, W]."""
    for batch in batches(paths, batch_size):
        pixels = [read_pixels(path, preprocessing) for path in batch]
        yield normalise(torch.stack(pixels), preprocessing)


# --- backbones ----------------------------------------------------------------------------------

# What timm, transformers and safetensors raise at files that do not belong together.
LOADING_ERRORS = (
    *(KeyError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError),
    *(OSError, SafetensorError),
)


class Backbone(Protocol):
    """A pretrained network in a folder, as the stages use it, whatever kind it is."""

    modules: tuple[str, ...]
    """Of bob, that decide its classifiers besides those that train any backbone's."""
    libraries: tuple[str, ...]
    """The same of libraries."""

    @property
    def preprocessing(self) -> Preprocessing:
        """What the network was trained with."""

    def features(self) -> nn.Module:
        """The network without a head: inputs [N, 3, H, W] to pooled features [N, D]."""

    def trainable(self, task: Task, lora_rank: int) -> nn.Module:
        """The network to be trained for `task`: inputs [N, 3, H, W] to logits [N, classes].

        Its new weights come from torch's global random generator. With a `lora_rank` above 0 they
        are a LoRA, and the others are frozen; raises BobError where the network takes none.
        """

    def classifier(self, trained: nn.Module) -> nn.Module:
        """The classifier that a trainable network has become, with the same logits."""

    def describe(self, classifier: nn.Module) -> dict[str, Any]:
        """What `build_network` needs to make a classifier again without the folder, as JSON."""

    def decided_by(self, task: Task) -> dict[str, object]:
        """What of `task` decides a classifier's weights besides labels, as JSON."""


def open_backbone(folder: str | Path) -> Backbone:
    """The backbone in `folder`: a timm network, or a CLIP in transformers' format.

    Raises BobError naming the folder where it is neither; weights are not read yet.
    """
    folder = Path(folder)
    missing = [n for n in ("config.json", "model.safetensors") if not (folder / n).is_file()]
    if missing:
        raise BobError(
            f"{folder} is neither a timm nor a CLIP model folder: {' and '.join(missing)} missing; "
            "`bob fetch ID@COMMIT` brings one from the Hub, timm.models.save_for_hf and "
            "CLIPModel.save_pretrained write one"
        )
    if holds_clip(folder):
        from bob.clip import ClipBackbone  # late: peft and transformers take seconds

        return ClipBackbone(folder)
    if "architecture" not in read_json(folder / "config.json"):
        raise BobError(
            f"{folder} is neither a timm nor a CLIP model folder: its config.json has no "
            "architecture, as timm's has, nor the model_type clip; fetch another model"
        )
    return TimmBackbone(folder)


def holds_clip(folder: Path) -> bool:
    """Whether a model folder is a CLIP's; raises BobError where its config cannot be read."""
    return read_json(folder / "config.json").get("model_type") == "clip"


class TimmBackbone:
    """A folder as timm writes it; all weights of the network and a new head are trained."""

    modules: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """As timm resolves it from the folder's config."""
        return Preprocessing.of(self.features())

    def features(self) -> nn.Module:
        """The network with what timm pools before the head; raises as `load_timm` does."""
        return load_timm(self._folder, 0)

    def trainable(self, task: Task, lora_rank: int) -> nn.Module:
        """The network with a new head; raises as `load_timm` does, and for any `lora_rank`."""
        if lora_rank:
            raise BobError(
                f"classify.lora_rank is {lora_rank}, which is for CLIP, and {self._folder} is a "
                "timm model; set it to 0, or classify.backbone to a CLIP folder"
            )
        return load_timm(self._folder, len(task.classes))

    def classifier(self, trained: nn.Module) -> nn.Module:
        """The trained network itself."""
        return trained

    def describe(self, classifier: nn.Module) -> dict[str, Any]:
        """Architecture, arguments and data config, in timm's terms."""
        forgotten = (
            *("architecture", "file", "source", "hf_hub_id", "url", "state_dict"),  # where it was
            *("label_names", "label_descriptions"),  # of a head that is gone
        )
        config: dict[str, Any] = classifier.pretrained_cfg  # type: ignore[assignment]
        return {
            "architecture": config["architecture"],
            "model_args": get_model_args(classifier),
            "pretrained_cfg": {
                key: value
                for key, value in config.items()
                if value is not None and key not in forgotten
            },
        }

    def decided_by(self, task: Task) -> dict[str, object]:
        """Nothing: a class is its number."""
        return {}


def load_timm(folder: Path, num_classes: int) -> nn.Module:
    """The pretrained timm network in `folder` with a new head for `num_classes`.

    The head's weights come from torch's global random generator. With `num_classes=0` there is no
    head and the network gives its pooled features, [N, D].

    Raises BobError naming the folder where its weights do not fit.
    """
    try:
        # With the folder's own number of classes, because timm checks the weights against the
        # network only then; a folder with another network's weights would otherwise load silently.
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
        model.reset_classifier(num_classes)
        if resolve_model_data_config(model)["input_size"][0] != 3:
            raise ValueError("its input is not an RGB image")
    except LOADING_ERRORS as error:
        raise BobError(
            f"{folder} cannot be loaded as a timm model ({reason_of(error)}); "
            "its config.json and model.safetensors must belong to one network of this timm"
        ) from None
    return model


def reason_of(error: Exception) -> str:
    """The start of an error's message in one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(map(str.strip, lines[:2]))


# --- networks -----------------------------------------------------------------------------------


def build_network(description: dict[str, Any]) -> nn.Module:
    """A classifier with random weights from what a backbone's `describe` gave."""
    if description["architecture"] == "clip":  # timm has none of this name
        from bob.clip import build_classifier  # late: transformers takes seconds

        return build_classifier(description)
    return timm.create_model(
        description["architecture"],
        pretrained=False,
        pretrained_cfg=dict(description["pretrained_cfg"]),
        **description["model_args"],
    )


@torch.inference_mode()
def predict(model: nn.Module, inputs: Iterable[Tensor], device: torch.device) -> Tensor:
    """Logits of a model in evaluation mode, full precision: float32 [N, classes], on the CPU."""
    model.eval().to(device).to(memory_format=torch.channels_last)  # the faster convolutions
    return torch.cat([model(batch.to(device)).cpu() for batch in inputs])


# --- files --------------------------------------------------------------------------------------


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
