"""Stage finetune: LoRA on the text-to-image model, with context preservation (paper: step 2)."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.optimization import get_cosine_schedule_with_warmup
from dvclive import Live
from tqdm import tqdm

from bob import diffusion
from bob.data import Photo, Task, batches, open_image, read_photos, read_task
from bob.device import autocast, best_device, dtype_name, resolve_precision
from bob.errors import BobError
from bob.files import replacing
from bob.layout import BANK, FINETUNE, LORA, TRAIN
from bob.params import Params
from bob.prompts import Entry, prompt, read_bank

# The published recipe's; the learning rate, epochs and batch size are parameters.
BETAS, WEIGHT_DECAY, MAX_GRAD_NORM = (0.9, 0.999), 1e-2, 1.0
ENCODE_BATCH = 8


def run(params: Params) -> None:
    """Write `results/finetune`: lora/ in diffusers' layout, and curves/ with the loss."""
    settings = params.finetune
    task, photos = read_task(), read_photos(TRAIN)
    captions = training_captions(task, photos, read_bank(BANK), settings.context)

    device = best_device()
    dtype = resolve_precision(settings.precision, device)
    pipeline = diffusion.load(Path(settings.base_model), device)
    means, stds = encode_photos(pipeline, photos)
    tokens = diffusion.tokenize(pipeline, captions)
    # Frozen weights need no more precision than they are multiplied in; LoRA's stay in fp32.
    diffusion.cast(pipeline.unet, dtype)
    diffusion.cast(pipeline.text_encoder, dtype)
    parameters = diffusion.add_lora(pipeline, settings.rank, settings.seed)

    with replacing(FINETUNE) as folder:
        loss = train(pipeline, parameters, means, stds, tokens, settings, dtype, folder / "curves")
        diffusion.save_lora(pipeline, folder / LORA.name)
    count = sum(parameter.numel() for parameter in parameters)
    print(
        f"finetune: {count:,} LoRA parameters, {settings.epochs} epochs in {dtype_name(dtype)}, "
        f"loss of the last {loss:.4f}"
    )


def training_captions(
    task: Task, photos: Sequence[Photo], bank: Sequence[Entry], context: str
) -> list[str]:
    """The caption of every photo; with `context` "caption" its own context is in it, else in none.

    Paper, context preservation: what is said of the background and pose need not be learned as
    part of the class. Raises BobError where the bank is not that of these photos.
    """
    contexts = {entry.image: entry.context for entry in bank}
    if missing := [photo.path for photo in photos if photo.sha256 not in contexts]:
        raise BobError(f"{BANK} has no entry for {missing[0]}; run `dvc repro caption`")
    return [
        prompt(
            task.descriptor,
            photo.class_name,
            contexts[photo.sha256] if context == "caption" else None,
        )
        for photo in photos
    ]


def encode_photos(pipeline: Any, photos: Sequence[Photo]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of every photo's latents, each (n, channels, h, w).

    No flips: a pose says left and right.
    """
    encoded = [
        diffusion.encode_images(pipeline, [open_image(photo.path) for photo in batch])
        for batch in tqdm(list(batches(photos, ENCODE_BATCH)), "encoding photos", disable=None)
    ]
    means, stds = zip(*encoded, strict=True)
    return torch.cat(means), torch.cat(stds)


def train(
    pipeline: Any,
    parameters: list[torch.nn.Parameter],
    means: torch.Tensor,
    stds: torch.Tensor,
    tokens: torch.Tensor,
    settings: Any,
    dtype: torch.dtype,
    curves: Path,
) -> float:
    """Minimise the noise-prediction loss in `parameters`; returns the mean loss of the last epoch.

    Shapes: `means` and `stds` (n, channels, h, w), `tokens` (n, length). Every random number comes
    from one generator on the CPU, so a seed means the same training on every device.
    """
    device = pipeline.device
    random = torch.Generator("cpu").manual_seed(settings.seed)
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    steps_per_epoch = math.ceil(len(means) / settings.batch_size)
    optimizer = torch.optim.AdamW(
        parameters, settings.learning_rate, BETAS, weight_decay=WEIGHT_DECAY
    )
    schedule = get_cosine_schedule_with_warmup(
        optimizer, settings.warmup_steps, max(1, settings.epochs * steps_per_epoch)
    )
    # fp16 has too little range for small gradients; the other precisions need no scaling.
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    draw = _draws(len(means), settings.batch_size, random)
    loss_of_epoch = math.nan

    pipeline.unet.train()
    pipeline.text_encoder.train()
    with Live(str(curves), report=None, save_dvc_exp=False, dvcyaml=None) as live:
        for _ in tqdm(range(settings.epochs), "fine-tuning", unit="epoch", disable=None):
            losses = []
            for _ in range(steps_per_epoch):
                index = next(draw)
                noise = torch.randn(means[index].shape, generator=random)
                posterior = torch.randn(means[index].shape, generator=random)
                timestep = torch.randint(
                    noise_scheduler.config.num_train_timesteps, (len(index),), generator=random
                )
                noise, timestep = noise.to(device), timestep.to(device)
                latents = means[index] + stds[index] * posterior.to(device)
                noisy = noise_scheduler.add_noise(latents, noise, timestep)
                with autocast(device, dtype):
                    text = pipeline.text_encoder(tokens[index])[0]
                    prediction = pipeline.unet(noisy, timestep, text).sample
                target = prediction_target(noise_scheduler, latents, noise, timestep)
                loss = torch.nn.functional.mse_loss(prediction.float(), target)
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
                scaler.step(optimizer)
                scaler.update()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
                losses.append(loss.item())
            loss_of_epoch = sum(losses) / len(losses)
            if not math.isfinite(loss_of_epoch):
                raise BobError(
                    "fine-tuning diverged: the loss is no longer a number; lower "
                    "finetune.learning_rate"
                )
            live.log_metric("loss", loss_of_epoch)
            live.next_step()
    return loss_of_epoch


def prediction_target(
    scheduler: DDPMScheduler, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor
) -> torch.Tensor:
    """What the UNet is to predict, by the base model's own scheduler config.

    epsilon: the noise (DDPM, eq. 14); v_prediction: sqrt(abar) noise - sqrt(1 - abar) x0 (Salimans
    and Ho 2022, appendix D).
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, timestep)
    raise BobError(f"the base model predicts {kind!r}; epsilon and v_prediction can be fine-tuned")


def _draws(count: int, size: int, random: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless full batches of indices, going through all `count` in a new order each time."""
    pool = torch.empty(0, dtype=torch.long)
    while True:
        while len(pool) < size:
            pool = torch.cat([pool, torch.randperm(count, generator=random)])
        yield pool[:size]
        pool = pool[size:]
