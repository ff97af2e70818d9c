"""A text-to-image model of Stable Diffusion's shape: what training and sampling have in common."""

import contextlib
import importlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging
from torch._dynamo.exc import TorchDynamoException

from bob.errors import BobError, first_line
from bob.models.device import fastest_layout
from bob.models.loading import LOADING_ERRORS, load_checked, quiet

logging.disable_progress_bar()  # a bar for five files is noise beside the stage's own

# What the autoencoder is given at once: 64 images of 64 px, or one of 512 px, which fills a GPU
# with work already, where a batch's activations in fp32 would fill its memory.
AUTOENCODED_PIXELS = 512**2


def load(folder: Path, device: torch.device) -> StableDiffusionPipeline:
    """Load a text-to-image folder in fp32, no weight of it to be trained.

    Raises BobError naming the folder where it does not hold a Stable Diffusion (1.x, 2.x) pipeline.
    """
    index: dict[str, Any] = {}
    with contextlib.suppress(OSError):
        index = StableDiffusionPipeline.load_config(folder, local_files_only=True)
    kind = index.get("_class_name")
    if kind != "StableDiffusionPipeline":
        raise BobError(
            f"{folder} holds {'no text-to-image model' if kind is None else f'a {kind}'}; a folder "
            "in diffusers' format with a StableDiffusionPipeline (Stable Diffusion 1.x or 2.x) is "
            "needed: `bob fetch` brings one"
        )
    try:
        # Quiet: diffusers warns where the autoencoder is another class than the pipeline's own,
        # which AutoencoderTiny, its documented replacement, always is.
        with quiet():
            pipeline = StableDiffusionPipeline.from_pretrained(
                folder,
                **{name: _part(folder, name, index) for name in ("unet", "text_encoder", "vae")},
                local_files_only=True,
                trust_remote_code=False,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
    except LOADING_ERRORS as error:
        raise BobError(f"{folder} does not load: {' '.join(str(error).split())[:200]}") from None
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        part.requires_grad_(False)
    return pipeline.to(device)


def _part(folder: Path, name: str, index: Mapping[str, Any]) -> torch.nn.Module:
    """A network of the pipeline, in fp32.

    By itself, because the whole pipeline's loader gives no report of the weights.
    """
    library, kind = index[name]
    if library not in ("diffusers", "transformers"):
        raise ValueError(f"its {name} is of {library}")
    try:
        network: torch.nn.Module = load_checked(
            getattr(importlib.import_module(library), kind),
            folder,
            subfolder=name,
            dtype=torch.float32,
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return network


def cast(module: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Keep the weights of products in `dtype`, in which autocast multiplies anyway, on `device`.

    They are cast before they are moved, so that a GPU never holds them in fp32. Norms and
    embeddings stay in fp32: on the CPU a norm in bf16 refuses fp32 activations. To be called after
    a LoRA is fused, because in bf16 its small changes would be rounded away.
    """
    for part in module.modules():
        if isinstance(part, torch.nn.Linear | torch.nn.Conv2d):
            part.to(dtype)
    module.to(device).to(memory_format=fastest_layout(device, dtype))


def compile_unet(pipeline: StableDiffusionPipeline) -> None:
    """Have torch.compile translate the UNet when it is first called.

    Without races between kernels, which would differ from process to process in the last bits.
    """
    # A cached function that asks for torch's version: diffusers', and harmless when traced.
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
    # In place, so that the weights keep their names.
    pipeline.unet.compile(options={"deterministic": True})


@contextlib.contextmanager
def compiled_by(parameter: str) -> Iterator[None]:
    """Raises BobError naming the parameter where what is compiled in it cannot be."""
    try:
        yield
    except TorchDynamoException as error:
        raise BobError(
            f"{parameter}: {first_line(error)}; torch.compile needs a C++ compiler and Python's "
            f"headers; without them, set {parameter} to false"
        ) from None


def resolution(pipeline: StableDiffusionPipeline) -> int:
    """The side in pixels of the square images the model was made for."""
    return pipeline.unet.config.sample_size * pipeline.vae_scale_factor


def autoencoded_at_once(pipeline: StableDiffusionPipeline) -> int:
    """How many images the autoencoder may be given at once."""
    return max(1, AUTOENCODED_PIXELS // resolution(pipeline) ** 2)


def cut_short(pipeline: StableDiffusionPipeline, texts: Sequence[str]) -> int:
    """How many of the texts have more tokens than the model reads."""
    whole = pipeline.tokenizer(list(texts), verbose=False).input_ids
    return sum(len(tokens) > pipeline.tokenizer.model_max_length for tokens in whole)


def tokenize(pipeline: StableDiffusionPipeline, texts: Sequence[str]) -> torch.Tensor:
    """Token ids, (n, model_max_length), padded and truncated as the pipeline does."""
    return pipeline.tokenizer(
        list(texts),
        padding="max_length",
        max_length=pipeline.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids.to(pipeline.device)
