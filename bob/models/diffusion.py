"""A text-to-image model of Stable Diffusion's shape: what training and sampling have in common."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging

from bob.errors import BobError
from bob.models.device import fastest_layout

logging.disable_progress_bar()  # a bar for five files is noise beside the stage's own


def load(folder: Path, device: torch.device) -> StableDiffusionPipeline:
    """Load a text-to-image folder in fp32, no weight of it to be trained.

    Raises BobError naming the folder where it does not hold a Stable Diffusion (1.x, 2.x) pipeline.
    """
    kind = None
    with contextlib.suppress(OSError):
        kind = StableDiffusionPipeline.load_config(folder, local_files_only=True).get("_class_name")
    if kind != "StableDiffusionPipeline":
        raise BobError(
            f"{folder} holds {'no text-to-image model' if kind is None else f'a {kind}'}; a folder "
            "in diffusers' format with a StableDiffusionPipeline (Stable Diffusion 1.x or 2.x) is "
            "needed: `bob fetch` brings one"
        )
    try:
        # Quiet: diffusers warns where the autoencoder is another class than the pipeline's own,
        # which AutoencoderTiny, its documented replacement, always is.
        logging.set_verbosity_error()
        pipeline = StableDiffusionPipeline.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    except (OSError, ValueError) as error:
        raise BobError(f"{folder} does not load: {' '.join(str(error).split())[:200]}") from None
    finally:
        logging.set_verbosity_warning()
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        part.requires_grad_(False)
    return pipeline.to(device)


def cast(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Keep the weights of products in `dtype`, in which autocast multiplies anyway, and lay out.

    Norms and embeddings stay in fp32: on the CPU a norm in bf16 refuses fp32 activations. To be
    called after a LoRA is fused, because in bf16 its small changes would be rounded away.
    """
    for part in module.modules():
        if isinstance(part, torch.nn.Linear | torch.nn.Conv2d):
            part.to(dtype)
    device = next(module.parameters()).device
    module.to(memory_format=fastest_layout(device, dtype))


def resolution(pipeline: StableDiffusionPipeline) -> int:
    """The side in pixels of the square images the model was made for."""
    return pipeline.unet.config.sample_size * pipeline.vae_scale_factor


def tokenize(pipeline: StableDiffusionPipeline, texts: Sequence[str]) -> torch.Tensor:
    """Token ids, (n, model_max_length), padded and truncated as the pipeline does."""
    return pipeline.tokenizer(
        list(texts),
        padding="max_length",
        max_length=pipeline.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids.to(pipeline.device)
