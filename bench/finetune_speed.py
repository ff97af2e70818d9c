"""Fine-tuning's images a second, against the training loop that diffusers publishes.

That is `examples/text_to_image/train_text_to_image_lora.py` at its defaults: photos are decoded and
augmented by a DataLoader, and encoded with the autoencoder and the text encoder in every step. Same
model, photos, batch, precision and LoRA targets. The script has no LoRA on the text encoder, ours
has; so both are measured with and without one, and the bound holds for both.

On the miniature and the CPU; `--sd15` builds Stable Diffusion v1.5 at 512 px with random weights,
for a GPU. Ours is charged for encoding the photos as its share of a run of EPOCHS. Exits with
status 1 where it is less than BOUND times as fast.
"""

import argparse
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from bench.speed import build_sd15, reached, report, side, take_turns, write_photos
from bob import denoising, diffusion
from bob.device import autocast, best_device, resolve_precision

BOUND = 1.5
EPOCHS = 60  # of params.yaml; the paper's are 400
RANK = 16


def load(base: Path, text_too: bool) -> tuple[Any, list[torch.nn.Parameter]]:
    """The pipeline with LoRA, on the UNet alone unless `text_too`, and its parameters."""
    pipeline = diffusion.load(base, best_device())
    parameters = diffusion.add_lora(pipeline, RANK, 0)
    if not text_too:
        pipeline.text_encoder.requires_grad_(False)
    return pipeline, [parameter for parameter in parameters if parameter.requires_grad]


def stock(
    base: Path, photos: list[Path], captions: list[str], dtype: torch.dtype, batch: int, text: bool
) -> Callable[[], int]:
    """The published script's loop; a run is one epoch."""
    device = best_device()
    pipeline, parameters = load(base, text)
    unet, vae, text_encoder = pipeline.unet, pipeline.vae, pipeline.text_encoder
    unet.to(memory_format=torch.contiguous_format)
    # --mixed_precision: all frozen weights in it, LoRA in fp32, autocast around the trained models.
    for model in (unet, vae, text_encoder):
        model.to(dtype)
    for parameter in parameters:
        parameter.data = parameter.data.float()
    side_length = diffusion.resolution(pipeline)
    augment = transforms.Compose(
        [
            transforms.Resize(side_length, interpolation=transforms.InterpolationMode.BILINEAR),
            transforms.RandomCrop(side_length),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )
    tokens = diffusion.tokenize(pipeline, captions).cpu()

    def collate(numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        images = [augment(Image.open(photos[number]).convert("RGB")) for number in numbers]
        return torch.stack(images), tokens[numbers]

    loader = DataLoader(
        range(len(photos)),
        shuffle=True,
        collate_fn=collate,
        batch_size=batch,  # type: ignore
    )
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-2)
    schedule = get_scheduler("constant", optimizer)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def epoch() -> int:
        unet.train()
        for pixels, ids in loader:
            encoded = vae.encode(pixels.to(device, dtype))
            latents = (
                encoded.latent_dist.sample() if hasattr(encoded, "latent_dist") else encoded.latents
            )
            latents = latents * vae.config.scaling_factor
            noise = torch.randn_like(latents)
            timesteps = torch.randint(
                noise_scheduler.config.num_train_timesteps, (len(latents),), device=device
            )
            noisy = noise_scheduler.add_noise(latents, noise, timesteps)
            with autocast(device, dtype) if text else nullcontext():
                states = text_encoder(ids.to(device), return_dict=False)[0]
            target = denoising.prediction_target(noise_scheduler, latents, noise, timesteps)
            with autocast(device, dtype):
                prediction = unet(noisy, timesteps, states, return_dict=False)[0]
            loss = torch.nn.functional.mse_loss(prediction.float(), target.float())
            loss.item()  # into the progress bar
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            optimizer.zero_grad()
        return len(photos)

    return epoch


def ours(
    base: Path, photos: list[Path], captions: list[str], dtype: torch.dtype, batch: int, text: bool
) -> Callable[[], int]:
    """bob's loop; a run is one epoch, and its share of encoding the photos."""
    pipeline, parameters = load(base, text)
    tokens = diffusion.tokenize(pipeline, captions)
    diffusion.cast(pipeline.unet, dtype)
    diffusion.cast(pipeline.text_encoder, dtype)
    for parameter in parameters:
        parameter.data = parameter.data.float()
    settings = Namespace(
        seed=0,
        batch_size=batch,
        gradient_accumulation=1,
        gradient_checkpointing=False,
        learning_rate=1e-4,
        warmup_steps=0,
        epochs=1,
    )

    def epoch() -> int:
        encoded = [Image.open(path).convert("RGB") for path in photos[: shared_out(len(photos))]]
        diffusion.encode_images(pipeline, encoded)
        denoising.train(pipeline, parameters, means, stds, tokens, settings, dtype)
        return len(photos)

    means, stds = diffusion.encode_images(pipeline, [Image.open(path) for path in photos])
    return epoch


def shared_out(photos: int) -> int:
    """How many of the photos are encoded an epoch, if all are once in a run."""
    return -(-photos // EPOCHS)


def flops_of_image(base: Path, batch: int, text_too: bool) -> float:
    """FLOPs, forward and backward, of text encoder and UNet for one image of a step."""
    pipeline, _ = load(base, text_too)
    device, unet = pipeline.device, pipeline.unet
    tokens = diffusion.tokenize(pipeline, ["a"] * batch)
    latents = torch.randn(
        batch, unet.config.in_channels, *[unet.config.sample_size] * 2, device=device
    )
    # The fused kernels of a CPU are not counted; those that they stand for are.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        text = pipeline.text_encoder(tokens)[0]
        unet(latents, torch.zeros(batch, device=device), text).sample.sum().backward()
    return counter.get_total_flops() / batch


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sd15", action="store_true", help="Stable Diffusion v1.5, on a GPU")
    parser.add_argument("--base", type=Path, default=Path("models/miniature-base"))
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--photos", type=int, default=80, help="an epoch")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--peak-tflops", type=float, help="of the device, dense, in that precision")
    arguments = parser.parse_args()
    dtype = resolve_precision(arguments.precision, best_device())
    with tempfile.TemporaryDirectory() as scratch:
        base = build_sd15(Path(scratch) / "sd15") if arguments.sd15 else arguments.base
        size = diffusion.resolution(diffusion.load(base, torch.device("cpu")))
        photos = write_photos(Path(scratch), arguments.photos, size)
        captions = [
            f"a aircraft photo of a variant {number} in the sky background with the left pose"
            for number in range(len(photos))
        ]
        good = True
        for text_too in (True, False):
            what = "LoRA on UNet and text encoder" if text_too else "LoRA on the UNet alone"
            task = (base, photos, captions, dtype, arguments.batch, text_too)
            sides = [
                side(f"bob, {what}", lambda: ours(*task)),  # noqa: B023  called at once
                side(f"stock, {what}", lambda: stock(*task)),  # noqa: B023
            ]
            take_turns(sides, arguments.repeats)
            flops = flops_of_image(base, arguments.batch, text_too)
            report(sides, [flops, flops], arguments.peak_tflops)
            good &= reached(what, *sides, BOUND)
    sys.exit(not good)


if __name__ == "__main__":
    main()
