"""Making images: prompts and seeds in, PNG files out. Here is all that decides an image's bytes."""

import io
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from PIL import Image

from bob.errors import BobError
from bob.models import diffusion
from bob.models.device import autocast, computing_device
from bob.models.loading import LOADING_ERRORS, check_finite, quiet, reason_of
from bob.models.lora import check_lora
from bob.models.precision import dtype_name, resolve_precision

# Named in an image's key in the item cache: the modules that make it, and what they stand on.
MADE_BY = (
    "models.device",
    "models.diffusion",
    "models.loading",
    "models.lora",
    "models.precision",
    "models.sampling",
)
LIBRARIES = ("diffusers", "peft", "torch", "transformers")

SAMPLERS: Mapping[str, Any] = {
    "dpmsolver++": lambda config: DPMSolverMultistepScheduler.from_config(
        config, algorithm_type="dpmsolver++", solver_order=2
    ),
    "ddim": DDIMScheduler.from_config,
    "pndm": lambda config: PNDMScheduler.from_config(config, skip_prk_steps=True),
    "euler": EulerDiscreteScheduler.from_config,
}


class ImageMaker:
    """A text-to-image model with a LoRA, loaded when the first image is made."""

    def __init__(
        self,
        base_model: Path,
        lora: Path,
        *,
        sampler: str,
        steps: int,
        guidance_scale: float,
        precision: str,
        batch_size: int,
        compile: bool = False,
    ) -> None:
        self._base_model, self._lora = base_model, lora
        self._dtype = resolve_precision(precision)
        self._sampler, self._steps, self._guidance_scale = sampler, steps, float(guidance_scale)
        self._batch_size, self._compile = batch_size, compile
        self._embeddings: dict[str, torch.Tensor] = {}

    @property
    def settings(self) -> dict[str, object]:
        """What decides an image besides model, LoRA, prompt, seed and code.

        Not its size, which is the model's.
        """
        return {
            "sampler": self._sampler,
            "steps": self._steps,
            "guidance_scale": self._guidance_scale,
            "precision": dtype_name(self._dtype),
            "batch_size": self._batch_size,
            # Named where it is so: images from before there was the choice keep their names.
            **({"compile": True} if self._compile else {}),
        }

    @cached_property
    def _pipeline(self) -> StableDiffusionPipeline:
        device = computing_device()
        pipeline = load(self._base_model, self._lora)
        pipeline.scheduler = SAMPLERS[self._sampler](pipeline.scheduler.config)
        diffusion.cast(pipeline.unet, self._dtype, device)
        diffusion.cast(pipeline.vae, torch.float32, device)
        if self._compile:
            diffusion.compile_unet(pipeline)
        return pipeline.to(device)

    def make(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """One image for each of at most `batch_size` prompts, from its seed."""
        # Padded to full size: an image's last bits depend on the batch's size, not on what else is
        # in it, and so not on what else is still to be made.
        missing = self._batch_size - len(prompts)
        prompts = [*prompts, *[prompts[-1]] * missing]
        new = [text for text in ("", *prompts) if text not in self._embeddings]
        self._embeddings |= encode_prompts(self._pipeline, new)
        with diffusion.compiled_by("generate.compile"):
            images = sample(
                self._pipeline,
                torch.stack([self._embeddings[text] for text in prompts]),
                self._embeddings[""],
                [*seeds, *[seeds[-1]] * missing],
                steps=self._steps,
                guidance_scale=self._guidance_scale,
                dtype=self._dtype,
            )
        return images[: len(images) - missing]


def load(base_model: Path, lora: Path) -> StableDiffusionPipeline:
    """Load a text-to-image folder in fp32, with a LoRA folder fused into its weights, on the CPU.

    There the sums of weights have the same last bits wherever the images are made.

    Raises BobError as `diffusion.load` does, for a LoRA of another model, and for one that is not
    finite: its images would be black.
    """
    pipeline = diffusion.load(base_model, torch.device("cpu"))
    try:
        check_lora(pipeline, lora)
        pipeline.load_lora_weights(str(lora))
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    except LOADING_ERRORS as error:
        raise BobError(
            f"{lora} is no LoRA of {base_model} ({reason_of(error)}); `dvc repro finetune` makes it"
        ) from None
    try:
        check_finite(pipeline.unet)
        check_finite(pipeline.text_encoder)
    except ValueError as error:
        raise BobError(f"{lora}: with it, {error}; lower finetune.learning_rate") from None
    return pipeline


@torch.no_grad()
def encode_prompts(
    pipeline: StableDiffusionPipeline, prompts: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Embedding, (tokens, width), of every distinct prompt.

    One prompt at a time: the last bits of an embedding must not depend on the others asked for.
    """
    with quiet():  # of what is too long, which fine-tuning tells
        return {
            text: pipeline.encode_prompt(text, pipeline.device, 1, False)[0][0]
            for text in dict.fromkeys(prompts)
        }


@torch.no_grad()
def sample(
    pipeline: StableDiffusionPipeline,
    embeddings: torch.Tensor,
    negative: torch.Tensor,
    seeds: Sequence[int],
    *,
    steps: int,
    guidance_scale: float,
    dtype: torch.dtype,
) -> list[Image.Image]:
    """Sample one image per prompt embedding.

    `embeddings` is (n, tokens, width), `negative` (tokens, width) the embedding of the empty
    prompt, `seeds` the n seeds of the initial noise, drawn on the CPU so that they mean the same
    noise on every device. Denoising runs in `dtype`; decoding stays in fp32, because eight bits of
    mantissa are fewer than an image's eight bits want.
    """
    with autocast(pipeline.device, dtype):
        latents = pipeline(
            prompt_embeds=embeddings,
            negative_prompt_embeds=negative.expand_as(embeddings),
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            output_type="latent",
        ).images
    latents = latents.float() / pipeline.vae.config.scaling_factor
    return [
        image
        for part in latents.split(decoded_at_once(pipeline, len(latents)))
        for image in pipeline.image_processor.postprocess(pipeline.vae.decode(part).sample)
    ]


def decoded_at_once(pipeline: StableDiffusionPipeline, count: int) -> int:
    """How many of a batch of `count` images the autoencoder decodes at once."""
    # Equal parts: an image's last bits depend on how many are decoded with it.
    most = diffusion.autoencoded_at_once(pipeline)
    return max(part for part in range(1, most + 1) if count % part == 0)


def png(image: Image.Image) -> bytes:
    """The image as a PNG file; at 512 px that takes a tenth of a second."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


def peak_signal_to_noise(one: bytes, other: bytes) -> str:
    """How far apart two PNG files are, in decibels; above 40 the eye sees no difference."""
    first, second = (
        np.asarray(Image.open(io.BytesIO(png), formats=["PNG"]), dtype=float)
        for png in (one, other)
    )
    if first.shape != second.shape:
        return f"{first.shape[1]}x{first.shape[0]} and {second.shape[1]}x{second.shape[0]} pixels"
    squared = float(((first - second) ** 2).mean())
    return f"PSNR {10 * math.log10(255**2 / squared):.1f} dB" if squared else "the same pixels"
