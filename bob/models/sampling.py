"""Making images: prompts and seeds in, PNG files out. Here is all that decides an image's bytes."""

import io
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from bob.models import diffusion
from bob.models.device import best_device, dtype_name, resolve_precision

# Named in an image's key in the item cache: the modules that make it, and what they stand on.
MADE_BY = ("models.device", "models.diffusion", "models.sampling")
LIBRARIES = ("diffusers", "peft", "torch", "transformers")


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
    ) -> None:
        self._base_model, self._lora = base_model, lora
        self._device = best_device()
        self._dtype = resolve_precision(precision, self._device)
        self._sampler, self._steps, self._guidance_scale = sampler, steps, float(guidance_scale)
        self._batch_size = batch_size
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
        }

    @cached_property
    def _pipeline(self) -> StableDiffusionPipeline:
        pipeline = diffusion.load(self._base_model, self._device, lora=self._lora)
        pipeline.scheduler = diffusion.SAMPLERS[self._sampler](pipeline.scheduler.config)
        diffusion.cast(pipeline.unet, self._dtype)
        return pipeline

    def make(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """One image for each of at most `batch_size` prompts, from its seed."""
        # Padded to full size: an image's last bits depend on the batch's size, not on what else is
        # in it, and so not on what else is still to be made.
        missing = self._batch_size - len(prompts)
        prompts = [*prompts, *[prompts[-1]] * missing]
        new = [text for text in ("", *prompts) if text not in self._embeddings]
        self._embeddings |= diffusion.encode_prompts(self._pipeline, new)
        images = diffusion.sample(
            self._pipeline,
            torch.stack([self._embeddings[text] for text in prompts]),
            self._embeddings[""],
            [*seeds, *[seeds[-1]] * missing],
            steps=self._steps,
            guidance_scale=self._guidance_scale,
            dtype=self._dtype,
        )
        return images[: len(images) - missing]


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
