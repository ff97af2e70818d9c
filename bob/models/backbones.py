"""Backbones: the pretrained networks that classifiers start from.

A backbone is a folder as timm writes it, or as transformers writes a CLIP (bob/models/clip.py).
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import get_model_args
from torch import Tensor, nn

from bob.errors import BobError
from bob.formats.files import read_json
from bob.formats.photos import Task
from bob.models.loading import LOADING_ERRORS, check_finite, reason_of
from bob.models.preprocessing import Preprocessing


class Backbone(Protocol):
    """A pretrained network in a folder, as the stages use it, whatever kind it is."""

    modules: tuple[str, ...]
    """Of bob, that decide its classifiers besides those that train any backbone's."""
    libraries: tuple[str, ...]
    """The same of libraries."""

    @property
    def architecture(self) -> str:
        """A name for the kind of network."""

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

    def files(self, classifier: nn.Module, classes: Sequence[str]) -> dict[str, Any]:
        """The JSON files that make a folder of a classifier's `model.safetensors`, by name.

        Its library and `load_network` open such a folder, without the backbone's. `classes` are
        the names in the order of the logits.
        """

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
        from bob.models.clip import ClipBackbone  # late: peft and transformers take seconds

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

    @property
    def architecture(self) -> str:
        """As timm names it."""
        return read_json(self._folder / "config.json")["architecture"]

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """As timm resolves it from the folder's config."""
        network = self.features()
        try:
            return Preprocessing.of(network)
        except LOADING_ERRORS as error:
            raise _unloadable(self._folder, error) from None

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

    def files(self, classifier: nn.Module, classes: Sequence[str]) -> dict[str, Any]:
        """timm's `config.json`, which transformers reads as well."""
        forgotten = (
            *("architecture", "file", "source", "hf_hub_id", "url", "state_dict"),  # where it was
            *("label_names", "label_descriptions", "label_offset"),  # of a head that is gone
            *("num_classes", "custom_load"),
        )
        config: dict[str, Any] = classifier.pretrained_cfg  # type: ignore[assignment]
        arguments = get_model_args(classifier)
        del arguments["num_classes"]  # transformers gives it beside these, and must not twice
        return {
            "config.json": {
                "architecture": config["architecture"],
                "num_classes": len(classes),
                "label_names": list(classes),
                "model_args": arguments,
                "pretrained_cfg": {
                    key: value
                    for key, value in config.items()
                    if value is not None and key not in forgotten
                },
            }
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
        check_finite(model)
    except LOADING_ERRORS as error:
        raise _unloadable(folder, error) from None
    return model


def _unloadable(folder: Path, error: Exception) -> BobError:
    return BobError(
        f"{folder} cannot be loaded as a timm model ({reason_of(error)}); "
        "its config.json and model.safetensors must belong to one network of this timm"
    )


def load_network(folder: Path) -> nn.Module:
    """The classifier in a folder as `Backbone.files` says; raises one of LOADING_ERRORS."""
    if read_json(folder / "config.json").get("model_type") == "clip_vision_model":
        from bob.models.clip import load_classifier  # late: transformers takes seconds

        return load_classifier(folder)
    return timm.create_model(f"local-dir:{folder}", pretrained=True)


@torch.inference_mode()
def predict(model: nn.Module, inputs: Iterable[Tensor], device: torch.device) -> Tensor:
    """Logits of a model in evaluation mode, full precision: float32 [N, classes], on the CPU."""
    model.eval().to(device).to(memory_format=torch.channels_last)  # the faster convolutions
    return torch.cat([model(batch.to(device)).cpu() for batch in inputs])
