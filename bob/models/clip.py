"""CLIP as a backbone: trained against the classes' texts, then folded into an image classifier.

CLIP (arXiv 2103.00020) scores an image for a text by the cosine of their features, times a learned
scale. While its towers are trained, the texts' features change with every step; afterwards they are
the rows of a matrix, and nothing of the text tower is left to be kept or exported.
"""

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, LoraModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from bob.errors import BobError
from bob.formats.photos import Task
from bob.models.loading import LOADING_ERRORS, load_checked, reason_of
from bob.models.preprocessing import Preprocessing

# The attention of both towers, as in the LoRA on the text-to-image model.
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


class ClipBackbone:
    """A folder as transformers writes a CLIP: model, tokenizer and image processor.

    Both towers and the scale are trained, or a LoRA on the attention of both towers.
    """

    architecture = "clip"
    modules: tuple[str, ...] = ("models.clip",)
    libraries: tuple[str, ...] = ("peft", "tokenizers", "transformers")

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """What `preprocessor_config.json` says.

        Raises BobError where it does anything but resize the shorter side, crop the centre and
        normalise.
        """
        processor = self._processor
        side, crop = processor.size.shortest_edge, processor.crop_size
        steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
        if not (side and crop and all(getattr(processor, step) for step in steps)):
            raise self._unloadable(
                "its preprocessor_config.json does not resize the shorter side, crop the centre "
                "and normalise, as CLIP's does"
            )
        try:
            return Preprocessing(
                size=(crop.height, crop.width),
                mean=tuple(processor.image_mean),
                std=tuple(processor.image_std),
                interpolation=Image.Resampling(processor.resample).name.lower(),
                crop_pct=crop.height / side,
                crop_mode="center",
            )
        except LOADING_ERRORS as error:
            raise self._unloadable(reason_of(error)) from None

    @cached_property
    def _processor(self) -> CLIPImageProcessor:
        try:
            return CLIPImageProcessor.from_pretrained(self._folder, local_files_only=True)
        except LOADING_ERRORS as error:
            raise self._unloadable(reason_of(error)) from None

    def features(self) -> nn.Module:
        """The image tower: inputs to projected image features, which texts are compared with."""
        clip = self._load()
        return ImageTower(clip.vision_model, clip.visual_projection)

    def trainable(self, task: Task, lora_rank: int) -> nn.Module:
        """CLIP and the classes' prompts; at first its logits are those of zero-shot CLIP.

        Raises BobError naming the folder where something is missing or does not fit.
        """
        clip = self._load()
        tokens = self.tokenize(prompts(task), clip.config.text_config)
        return ImageTextScorer(add_lora(clip, lora_rank) if lora_rank else clip, tokens)

    def classifier(self, trained: nn.Module) -> nn.Module:
        """The image tower with the classes' text features as the last layer."""
        assert isinstance(trained, ImageTextScorer)
        return trained.folded()

    def files(self, classifier: nn.Module, classes: Sequence[str]) -> dict[str, Any]:
        """`config.json` of a CLIPVisionModelWithProjection, and the image processor's."""
        assert isinstance(classifier, ClipClassifier)
        config = classifier.vision_model.config.to_diff_dict()
        del config["transformers_version"]  # of what wrote it
        return {
            "config.json": {
                **config,
                "architectures": ["CLIPVisionModelWithProjection"],
                # The folder's own counts for nothing: transformers goes by the whole CLIP's.
                "projection_dim": classifier.classes.in_features,
                "id2label": {str(label): name for label, name in enumerate(classes)},
                "label2id": {name: label for label, name in enumerate(classes)},
            },
            "preprocessor_config.json": self._processor.to_dict(),
        }

    def decided_by(self, task: Task) -> dict[str, object]:
        """The prompts, since the text tower reads them."""
        return {"prompts": prompts(task)}

    def _load(self) -> CLIPModel:
        """The model in fp32, on the CPU."""
        try:
            clip: CLIPModel = load_checked(CLIPModel, self._folder, dtype=torch.float32)
        except LOADING_ERRORS as error:
            raise self._unloadable(reason_of(error)) from None
        size = clip.config.vision_config.image_size
        if self.preprocessing.size != (size, size):
            raise self._unloadable(
                f"its preprocessor_config.json crops to {self.preprocessing.size}, "
                f"and its config.json wants images of {size} pixels"
            )
        return clip

    def tokenize(self, texts: list[str], config: Any) -> Tensor:
        """Token ids, [texts, length of the longest]; what is too long for the model is cut."""
        if not (self._folder / "tokenizer.json").is_file():
            # transformers would make a tokenizer that knows no word.
            for name in ("vocab.json", "merges.txt"):
                if not (self._folder / name).is_file():
                    raise self._unloadable(f"it has neither tokenizer.json nor {name}")
        try:
            tokenizer = CLIPTokenizer.from_pretrained(self._folder, local_files_only=True)
            ids = tokenizer(
                texts,
                padding=True,
                truncation=True,
                max_length=config.max_position_embeddings,
                padding_side="right",
                return_tensors="pt",
            ).input_ids
        except LOADING_ERRORS as error:
            raise self._unloadable(reason_of(error)) from None
        if int(ids.max()) >= config.vocab_size:
            raise self._unloadable("its tokenizer has more tokens than its config.json")
        return ids

    def _unloadable(self, reason: str) -> BobError:
        return BobError(
            f"{self._folder} cannot be loaded as a CLIP model ({reason}); model, tokenizer and "
            "preprocessor_config.json must be of one CLIP, as `bob fetch` brings them"
        )


def prompts(task: Task) -> list[str]:
    """The text of each class: CLIP's own template for fine-grained tasks (arXiv 2103.00020, 3.1.4).

    `a photo of a [classname], a type of [descriptor].`
    """
    return [f"a photo of a {name}, a type of {task.descriptor}." for name in task.classes]


def add_lora(clip: CLIPModel, rank: int) -> LoraModel:
    """Freeze `clip` and put LoRA of `rank` on the attention of both towers.

    alpha = rank, as in the LoRA on the text-to-image model. Its one half is drawn from torch's
    global random generator, the other is zero, so that at first it changes nothing.
    """
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS)
    return LoraModel(clip, config, "default")


class ImageTextScorer(nn.Module):
    """CLIP, with LoRA or without, that scores images against a text for each class.

    `tokens` are the texts' ids, int64 [classes, length].
    """

    tokens: Tensor

    def __init__(self, clip: CLIPModel | LoraModel, tokens: Tensor) -> None:
        super().__init__()
        self.clip = clip
        self.register_buffer("tokens", tokens, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes] of inputs [N, 3, H, W]: exp(logit_scale) cos(image, text)."""
        features = self.clip.get_image_features(pixel_values=images).pooler_output
        matrix = class_matrix(self.clip, self.tokens)
        # Not in bf16: its cosines would be a thousandth apart or more, before they are scaled.
        with _full_precision(images.device):
            return F.normalize(features.float(), dim=-1) @ matrix.T

    @torch.no_grad()
    def folded(self) -> "ClipClassifier":
        """The classifier with the same logits, on the same device; this network stays as it is."""
        clip = copy.deepcopy(self.clip).eval()
        if isinstance(clip, LoraModel):
            clip = clip.merge_and_unload()
        matrix = class_matrix(clip, self.tokens)
        classes = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
        classes.weight = nn.Parameter(matrix)
        return ClipClassifier(clip.vision_model, clip.visual_projection, classes)


def class_matrix(clip: CLIPModel | LoraModel, tokens: Tensor) -> Tensor:
    """Normalised features of the texts times exp(logit_scale): float32 [classes, D]."""
    # Without an attention mask: texts are padded at the end, where causal attention never looks.
    features = clip.get_text_features(input_ids=tokens).pooler_output
    with _full_precision(tokens.device):
        return clip.logit_scale.exp() * F.normalize(features.float(), dim=-1)


def _full_precision(device: torch.device) -> AbstractContextManager[object]:
    # The meta device, on which costs are counted, knows no autocast.
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class ImageTower(nn.Module):
    """CLIP's image tower: inputs [N, 3, H, W] to projected features [N, D], not normalised.

    Its weights are named as those of transformers' CLIPVisionModelWithProjection.
    """

    def __init__(self, vision_model: CLIPVisionModel, visual_projection: nn.Linear) -> None:
        super().__init__()
        self.vision_model, self.visual_projection = vision_model, visual_projection

    def forward(self, images: Tensor) -> Tensor:
        """Features of the images."""
        return self.visual_projection(self.vision_model(pixel_values=images).pooler_output)


class ClipClassifier(ImageTower):
    """An image tower whose normalised features meet a row for each class."""

    def __init__(
        self, vision_model: CLIPVisionModel, visual_projection: nn.Linear, classes: nn.Linear
    ) -> None:
        super().__init__(vision_model, visual_projection)
        self.classes = classes

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes] of inputs [N, 3, H, W]."""
        return self.classes(F.normalize(super().forward(images), dim=-1))


def build_classifier(config: CLIPVisionConfig) -> ClipClassifier:
    """A classifier with random weights, of as many classes as the config has labels."""
    return ClipClassifier(
        CLIPVisionModel(config),
        nn.Linear(config.hidden_size, config.projection_dim, bias=False),
        nn.Linear(config.projection_dim, config.num_labels, bias=False),
    )


def load_classifier(folder: Path) -> ClipClassifier:
    """The classifier in a folder as `ClipBackbone.files` says; raises one of LOADING_ERRORS."""
    classifier = build_classifier(CLIPVisionConfig.from_pretrained(folder, local_files_only=True))
    classifier.load_state_dict(load_file(folder / "model.safetensors"))
    return classifier
