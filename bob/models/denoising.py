"""Training on the noise-prediction loss: images to latents; latents and token ids to weights."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from diffusers.optimization import get_cosine_schedule_with_warmup
from PIL import Image
from tqdm import tqdm

from bob.errors import BobError
from bob.models import diffusion
from bob.models.device import autocast, send

if TYPE_CHECKING:
    from bob.cache.checkpoints import Checkpoint

# The published recipe's; the learning rate, epochs and batch size are parameters.
BETAS, WEIGHT_DECAY, MAX_GRAD_NORM = (0.9, 0.999), 1e-2, 1.0


@torch.no_grad()
def encode_images(
    pipeline: StableDiffusionPipeline, images: Sequence[Image.Image]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the images' scaled latents, each (n, channels, h, w) fp32.

    Images are resized and centre-cropped to the model's resolution. An autoencoder without a
    posterior (AutoencoderTiny) has standard deviation zero.
    """
    side = diffusion.resolution(pipeline)
    pixels = pipeline.image_processor.preprocess(list(images), side, side, resize_mode="crop")
    encoded = pipeline.vae.encode(pixels.to(pipeline.vae.device))
    scale = pipeline.vae.config.scaling_factor
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mean * scale, encoded.latent_dist.std * scale
    return encoded.latents * scale, torch.zeros_like(encoded.latents)


def train(
    pipeline: Any,
    parameters: Sequence[torch.nn.Parameter],
    means: torch.Tensor,
    stds: torch.Tensor,
    tokens: torch.Tensor,
    settings: Any,
    dtype: torch.dtype,
    checkpoint: "Checkpoint | None" = None,
    *,
    compiled: bool = False,
) -> list[float]:
    """Minimise the noise-prediction loss in `parameters`; returns the mean loss of every epoch.

    Shapes: `means` and `stds` (n, channels, h, w), `tokens` (n, length). Every random number comes
    from one generator on the CPU, so a seed means the same training on every device. Goes on from
    the `checkpoint`, if it holds one, to the same weights as without the interruption. Raises
    BobError where the loss is no longer a number.
    """
    device = pipeline.device
    random = torch.Generator("cpu").manual_seed(settings.seed)
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    steps_per_epoch = steps_an_epoch(len(means), settings)
    # Fused: one pass over the hundreds of small LoRA matrices instead of ten kernels for each.
    optimizer = torch.optim.AdamW(
        parameters, settings.learning_rate, BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )
    schedule = get_cosine_schedule_with_warmup(
        optimizer, settings.warmup_steps, max(1, settings.epochs * steps_per_epoch)
    )
    # fp16 has too little range for small gradients; the other precisions need no scaling.
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    stateful = {"optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    pool = torch.empty(0, dtype=torch.long)
    losses: list[float] = []

    if checkpoint and (state := checkpoint.load()):
        for parameter, value in zip(parameters, state["parameters"], strict=True):
            parameter.data.copy_(value)
        for name, part in stateful.items():
            part.load_state_dict(state[name])
        random.set_state(state["random"])
        pool, losses = state["pool"], state["losses"]

    _prepare_to_train(pipeline, settings, dtype, compiled)
    for epoch in tqdm(
        range(len(losses), settings.epochs),
        "fine-tuning",
        initial=len(losses),
        total=settings.epochs,
        unit="epoch",
        disable=None,
    ):
        losses_of_epoch = []
        for _ in range(steps_per_epoch):
            index, pool = _next_batch(pool, len(means), settings.batch_size, random)
            shape = len(index), *means.shape[1:]
            noise = torch.randn(shape, generator=random)
            posterior = torch.randn(shape, generator=random)
            timestep = torch.randint(
                noise_scheduler.config.num_train_timesteps, (len(index),), generator=random
            )
            drawn = [send(tensor, device) for tensor in (index, noise, posterior, timestep)]
            for index, noise, posterior, timestep in zip(
                *(tensor.chunk(settings.gradient_accumulation) for tensor in drawn), strict=True
            ):
                latents = means[index] + stds[index] * posterior
                loss = noise_prediction_loss(
                    pipeline, noise_scheduler, latents, tokens[index], noise, timestep, dtype
                )
                scaler.scale(loss / settings.gradient_accumulation).backward()
                losses_of_epoch.append(loss.detach())
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        # Read once an epoch: to read a loss is to wait for the GPU.
        known = torch.stack(losses_of_epoch).tolist()
        losses.append(sum(known) / len(known))
        if not math.isfinite(losses[-1]):
            raise BobError(
                "fine-tuning diverged: the loss is no longer a number; lower finetune.learning_rate"
            )
        if checkpoint and checkpoint.is_due() and epoch + 1 < settings.epochs:
            checkpoint.save(
                {
                    "parameters": [parameter.data for parameter in parameters],
                    **{name: part.state_dict() for name, part in stateful.items()},
                    "random": random.get_state(),
                    "pool": pool,
                    "losses": losses,
                }
            )
    return losses


def steps_an_epoch(images: int, settings: Any) -> int:
    """Optimizer steps in one pass over the images: the last batch is filled up."""
    return math.ceil(images / settings.batch_size)


def _prepare_to_train(pipeline: Any, settings: Any, dtype: torch.dtype, compiled: bool) -> None:
    if pipeline.device.type == "cpu" and dtype == torch.bfloat16:
        # The fused attention's backward alone takes a third of a step.
        pipeline.unet.set_attn_processor(AttnProcessor())
        pipeline.text_encoder.set_attn_implementation("eager")
    pipeline.unet.train()
    pipeline.text_encoder.train()
    if settings.gradient_checkpointing:
        checkpoint_gradients(pipeline)
    if compiled:
        diffusion.compile_unet(pipeline)


def noise_prediction_loss(
    pipeline: Any,
    noise_scheduler: DDPMScheduler,
    latents: torch.Tensor,
    tokens: torch.Tensor,
    noise: torch.Tensor,
    timestep: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Mean squared error of what the UNet predicts of the noised latents; a scalar, fp32.

    Shapes: `latents` and `noise` (n, channels, h, w), `tokens` (n, length), `timestep` (n).
    """
    noisy = noise_scheduler.add_noise(latents, noise, timestep)
    with autocast(latents.device, dtype):
        # Lowered once, or every layer's keys and values would do it again.
        text = pipeline.text_encoder(tokens)[0].to(dtype)
        with diffusion.compiled_by("finetune.compile"):
            prediction = pipeline.unet(noisy, timestep, text).sample
    target = prediction_target(noise_scheduler, latents, noise, timestep)
    return torch.nn.functional.mse_loss(prediction.float(), target)


def checkpoint_gradients(pipeline: Any) -> None:
    """Have activations computed a second time for the gradients instead of kept."""
    pipeline.unet.enable_gradient_checkpointing()
    pipeline.text_encoder.activation_checkpointing_enable()


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


def _next_batch(
    pool: torch.Tensor, count: int, size: int, random: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A full batch of indices below `count`, and what is left in the pool of those yet to come.

    The pool is filled with all `count` in a new order each time.
    """
    while len(pool) < size:
        pool = torch.cat([pool, torch.randperm(count, generator=random)])
    return pool[:size], pool[size:]
