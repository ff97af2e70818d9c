"""The networks of the stages on the meta device: built from a folder's config files, no weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import timm
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
)

from bob.commands.plan.shapes import META, Cost, measure
from bob.errors import BobError
from bob.formats.photos import Task
from bob.models import diffusion, sampling, training
from bob.models.backbones import holds_clip
from bob.models.preprocessing import Preprocessing

T = TypeVar("T")

ANSWER_TOKENS = 8
"""Typical length of an answer in as few words as possible, its end included."""


def _build(folder: Path, kind: str, make: Callable[[], T]) -> T:
    """A network on the meta device; raises BobError where the folder's configs are of no `kind`."""
    try:
        with META:
            return make()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BobError(f"{folder}: no {kind} by its config files ({reason})") from None


def weight_bytes(*networks: nn.Module) -> int:
    """Of parameters and buffers as they are."""
    return sum(
        tensor.nbytes
        for network in networks
        for tensor in (*network.parameters(), *network.buffers())
    )


# --- text to image -------------------------------------------------------------------------------


def text_to_image(folder: Path) -> StableDiffusionPipeline:
    """The pipeline in `folder` as `diffusion.load` gives it; no tokenizer, no scheduler."""

    def make() -> StableDiffusionPipeline:
        index = StableDiffusionPipeline.load_config(folder, local_files_only=True)
        if (kind := index.get("_class_name")) != "StableDiffusionPipeline":
            raise ValueError(f"they are of a {kind}")
        autoencoder = getattr(diffusers, index["vae"][1])
        pipeline = StableDiffusionPipeline(
            vae=autoencoder.from_config(autoencoder.load_config(folder / "vae")),
            text_encoder=CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder")),
            tokenizer=None,
            unet=UNet2DConditionModel.from_config(
                UNet2DConditionModel.load_config(folder / "unet")
            ),
            scheduler=None,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        for part in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
            part.eval().requires_grad_(False)
        return pipeline

    return _build(folder, "Stable Diffusion (1.x or 2.x)", make)


def evaluations(folder: Path, sampler: str, steps: int) -> int:
    """How many times a sampler asks the UNet for one image; PNDM once more than it has steps."""
    scheduler = sampling.SAMPLERS[sampler](DDIMScheduler.load_config(folder / "scheduler"))
    scheduler.set_timesteps(steps)
    return len(scheduler.timesteps)


def _tokens(pipeline: StableDiffusionPipeline, texts: int) -> torch.Tensor:
    # A prompt is padded to the encoder's length.
    length = pipeline.text_encoder.config.max_position_embeddings
    return torch.empty(texts, length, dtype=torch.long, device=META)


def _latents(pipeline: StableDiffusionPipeline, images: int) -> torch.Tensor:
    config = pipeline.unet.config
    side = config.sample_size
    return torch.empty(images, config.in_channels, side, side, device=META)


@torch.no_grad()
def encode_text(pipeline: StableDiffusionPipeline) -> Cost:
    """Of one prompt."""
    return measure(lambda: pipeline.text_encoder(_tokens(pipeline, 1)))


@torch.no_grad()
def encode_images(pipeline: StableDiffusionPipeline, images: int) -> Cost:
    """Of the autoencoder's way in."""
    side = diffusion.resolution(pipeline)
    return measure(lambda: pipeline.vae.encode(torch.empty(images, 3, side, side, device=META)))


@torch.no_grad()
def decode_images(pipeline: StableDiffusionPipeline, images: int) -> Cost:
    """Of the autoencoder's way out."""
    return measure(lambda: pipeline.vae.decode(_latents(pipeline, images)))


@torch.no_grad()
def denoise(pipeline: StableDiffusionPipeline, rows: int) -> Cost:
    """Of one evaluation of the UNet; guidance makes two rows of an image."""
    text = torch.empty(
        rows, _tokens(pipeline, 1).shape[1], pipeline.unet.config.cross_attention_dim, device=META
    )
    return measure(lambda: pipeline.unet(_latents(pipeline, rows), torch.tensor(0), text))


def fine_tuning_step(pipeline: StableDiffusionPipeline, images: int) -> Cost:
    """Of one step forth and back, as `denoising.train` makes it; LoRA must have been added."""
    pipeline.unet.train()
    pipeline.text_encoder.train()

    def step() -> None:
        latents = _latents(pipeline, images)
        timesteps = torch.empty(images, dtype=torch.long, device=META)
        text = pipeline.text_encoder(_tokens(pipeline, images))[0]
        prediction = pipeline.unet(latents, timesteps, text).sample
        torch.nn.functional.mse_loss(prediction, latents).backward()

    return measure(step)


# --- captioner -----------------------------------------------------------------------------------


class Captioner:
    """An image-text-to-text model with its processor, which needs the tokenizer's files too."""

    def __init__(self, folder: Path) -> None:
        local = {"local_files_only": True, "trust_remote_code": False}

        def make() -> tuple[Any, nn.Module]:
            with torch.device("cpu"):
                processor = AutoProcessor.from_pretrained(folder, **local)
            config = AutoConfig.from_pretrained(folder, **local)
            network = AutoModelForImageTextToText.from_config(
                config, dtype=torch.float32, trust_remote_code=False
            )
            return processor, network.eval()

        self._processor, self._network = _build(folder, "image-text-to-text model", make)

    @property
    def weights(self) -> int:
        """Bytes, in fp32."""
        return weight_bytes(self._network)

    @torch.no_grad()
    def ask(self, question: str, size: tuple[int, int]) -> tuple[Cost, Cost]:
        """Of reading one photo of `size` (width, height) with the question, and of saying a token.

        `Captioner.answer` does the first once, and the second for every token of the
        answer but the first. Of one photo, because attention in windows is many small calls; a
        batch costs its size times as much.
        """
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = self._processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        photo = self._processor(text=[text], images=[[Image.new("RGB", size)]], return_tensors="pt")
        # A whole question needs no mask, and a mask's values would be asked for.
        inputs = {
            name: value.to(META) if value.is_floating_point() else value
            for name, value in photo.items()
            if name != "attention_mask"
        }
        cache: Any = None

        def read() -> None:
            nonlocal cache
            cache = self._network(**inputs, use_cache=True, logits_to_keep=1).past_key_values

        def say() -> None:
            token = torch.empty(1, 1, dtype=torch.long, device=META)
            self._network(input_ids=token, past_key_values=cache, use_cache=True)

        return measure(read), measure(say)


# --- classifiers ---------------------------------------------------------------------------------


class Classifier:
    """A network from a backbone's folder: as it is trained, and as the classifier that it becomes.

    Without a `task` it has no head and is for features.
    """

    def __init__(self, folder: Path, task: Task | None, lora_rank: int = 0) -> None:
        build = _clip if holds_clip(folder) else _timm
        self._trained, self._kept, self._size = build(folder, task, lora_rank)

    @property
    def weights(self) -> int:
        """Bytes of the classifier, in fp32."""
        return weight_bytes(self._kept)

    @property
    def weights_in_training(self) -> tuple[int, int]:
        """Bytes in fp32 of all that training needs, and of those weights that change in it."""
        changing = [weight for weight in self._trained.parameters() if weight.requires_grad]
        return weight_bytes(self._trained), sum(weight.nbytes for weight in changing)

    def _images(self, count: int) -> torch.Tensor:
        return torch.empty(count, 3, *self._size, device=META)

    @torch.no_grad()
    def look(self, images: int) -> Cost:
        """Of one pass forward."""
        self._kept.eval()
        return measure(lambda: self._kept(self._images(images)))

    def training_step(self, images: int) -> Cost:
        """Of one step forth and back, as `bob.models.training.train` makes it."""
        training.to_train_mode(self._trained)
        return measure(lambda: self._trained(self._images(images)).sum().backward())


Built = tuple[nn.Module, nn.Module, tuple[int, int]]
"""The network as it is trained and as it is kept, and the height and width of its input."""


def _timm(folder: Path, task: Task | None, lora_rank: int) -> Built:
    def make() -> nn.Module:
        network = timm.create_model(f"local-dir:{folder}", pretrained=False)
        network.reset_classifier(len(task.classes) if task else 0)
        return network

    network = _build(folder, "timm model", make)
    return network, network, Preprocessing.of(network).size


def _clip(folder: Path, task: Task | None, lora_rank: int) -> Built:
    def make() -> tuple[nn.Module, nn.Module]:
        config = CLIPConfig.from_pretrained(folder, local_files_only=True)
        network = CLIPModel(config)
        tower = network.vision_model, network.visual_projection
        if task is None:
            features = clip.ImageTower(*tower)
            return features, features
        with torch.device("cpu"):
            tokens = clip.ClipBackbone(folder).tokenize(clip.prompts(task), config.text_config)
        classes = nn.Linear(config.projection_dim, len(task.classes), bias=False)
        trained = CLIPModel(config)
        scorer = clip.ImageTextScorer(
            clip.add_lora(trained, lora_rank) if lora_rank else trained, tokens.to(META)
        )
        return scorer, clip.ClipClassifier(*tower, classes)

    from bob.models import clip  # late, as where it is used

    trained, kept = _build(folder, "CLIP", make)
    return trained, kept, clip.ClipBackbone(folder).preprocessing.size
