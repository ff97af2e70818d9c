"""Training a LoRA on captioned photos, from the photos to the LoRA's file."""

import json
import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bob.cache.checkpoints import Checkpoint
from bob.errors import tell
from bob.formats.photos import Photo, batches, open_image
from bob.models import denoising, diffusion
from bob.models.device import computing_device
from bob.models.lora import LORA_FILE, add_lora, save_lora
from bob.models.threads import in_threads

# The maker of a LoRA: the modules that train, and what they stand on.
MADE_BY = (
    "formats.photos",
    "models.denoising",
    "models.device",
    "models.diffusion",
    "models.finetuning",
    "models.loading",
    "models.lora",
    "models.threads",
)
LIBRARIES = ("diffusers", "peft", "pillow", "torch", "transformers")
ENCODE_BATCH = 8  # photos


def train(
    base_model: Path,
    dtype: torch.dtype,
    photos: Sequence[Photo],
    captions: Sequence[str],
    settings: Any,
    checkpoint: Checkpoint,
    *,
    compiled: bool = False,
) -> tuple[bytes, bytes]:
    """Fine-tune on the captioned photos; the LoRA's file, and the mean losses of epochs as JSON.

    Goes on from the checkpoint where there is one.
    """
    device = computing_device()
    pipeline = diffusion.load(base_model, torch.device("cpu"))
    # Alone on the device, and gone before the networks that are trained come to it.
    pipeline.vae.to(device)
    means, stds = encode_photos(pipeline, photos)
    pipeline.vae = None
    # Frozen weights need no more precision than they are multiplied in; LoRA's stay in fp32.
    diffusion.cast(pipeline.unet, dtype, device)
    diffusion.cast(pipeline.text_encoder, dtype, device)
    tokens = diffusion.tokenize(pipeline, captions)
    if cut := diffusion.cut_short(pipeline, captions):
        tell(
            f"finetune: warning: {cut} of {len(captions)} captions have more than the "
            f"{tokens.shape[1]} tokens that {base_model} reads; their ends are not read"
        )
    parameters = add_lora(pipeline, settings.rank, settings.seed)
    losses = denoising.train(
        pipeline,
        parameters,
        means,
        stds,
        tokens,
        settings,
        dtype,
        checkpoint,
        compiled=compiled,
    )
    with tempfile.TemporaryDirectory() as folder:
        save_lora(pipeline, Path(folder))
        return (Path(folder) / LORA_FILE).read_bytes(), json.dumps(losses).encode()


def encode_photos(pipeline: Any, photos: Sequence[Photo]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of every photo's latents, each (n, channels, h, w).

    No flips: a pose says left and right.
    """
    at_once = min(ENCODE_BATCH, diffusion.autoencoded_at_once(pipeline))
    # Few ahead: a photo may have 100 MB.
    images = in_threads(open_image, [photo.path for photo in photos], ahead=1)
    encoded = [
        denoising.encode_images(pipeline, list(islice(images, len(batch))))
        for batch in tqdm(list(batches(photos, at_once)), "encoding photos", disable=None)
    ]
    means, stds = zip(*encoded, strict=True)
    return torch.cat(means), torch.cat(stds)
