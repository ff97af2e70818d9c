"""Of `bench.gpu`: fine-tuning, its resumption, generation, and generation compiled."""

import copy
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load as load_tensors
from torch.utils.flop_counter import FlopCounterMode

from bench import finetune_speed, generate_speed
from bench.gpu_setting import Figures, Setting, forget_peak, peak_memory, planned_memory
from bench.speed import seconds, write_photos
from bob.cache.checkpoints import Checkpoint
from bob.formats.files import sha256
from bob.formats.photos import Photo
from bob.models import diffusion, finetuning
from bob.models.device import autocast
from bob.models.sampling import ImageMaker, peak_signal_to_noise, png

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BATCH = 8
SETTINGS = {
    **{"rank": 16, "learning_rate": 1e-3, "warmup_steps": 0, "batch_size": BATCH, "seed": 0},
    **{"gradient_accumulation": 1, "gradient_checkpointing": False},
}
PHOTOS, EPOCHS = 32, 6
NEAR = 0.1  # losses in 16 bits to those in fp32, relative; GradScaler skips its first steps
SAME = 1e-3  # losses after a break to those without one, relative; a GPU's sums vary in order
STEPS, GUIDANCE = 20, 2.0
BATCHES = (1, 8, 32)


class Watch:
    """In a checkpoint's place: notes when each epoch ends, whose losses have been read by then."""

    def __init__(self) -> None:
        self.ended: list[float] = []

    def load(self) -> None:
        """Nothing was begun before."""

    def is_due(self) -> bool:
        self.ended.append(time.perf_counter())
        return False


def _train(setting: Setting, precision: str, epochs: int, checkpoint: Any) -> tuple[bytes, Any]:
    """Fine-tune as the stage does: the LoRA's file, and the losses of the epochs."""
    base, folder = setting.base(), setting.scratch / "photos"
    if not folder.is_dir():
        folder.mkdir()
        write_photos(folder, _photos(setting), 16 if setting.tiny else 512)
    photos = [Photo(str(path), "wren", sha256(path)) for path in sorted(folder.iterdir())]
    captions = ["a bird photo of a wren in the green leaves background"] * len(photos)
    settings = SimpleNamespace(**SETTINGS, epochs=epochs)
    lora, losses = finetuning.train(base, DTYPES[precision], photos, captions, settings, checkpoint)
    return lora, json.loads(losses)


def _photos(setting: Setting) -> int:
    return 8 if setting.tiny else PHOTOS


def _epochs(setting: Setting) -> int:
    return 3 if setting.tiny else EPOCHS


def fine_tuning(setting: Setting) -> Figures:
    """Steps of 8 photos in each precision, and in fp32 with products in TF32."""
    flops = BATCH * finetune_speed.flops_of_image(setting.base(), 1, True)
    figures: Figures = {"batch": BATCH, "tflop_a_step": flops / 1e12, "wrong": []}
    for name in ("fp32", "bf16", "fp16", "fp32_tf32"):
        precision = name.removesuffix("_tf32")
        torch.set_float32_matmul_precision("high" if name.endswith("tf32") else "highest")
        forget_peak()
        watch = Watch()
        _, losses = _train(setting, precision, _epochs(setting), watch)
        epochs = [after - before for before, after in pairwise(watch.ended)]
        step = statistics.median(epochs) * BATCH / _photos(setting)
        figures[name] = {
            "seconds_a_step": step,
            **setting.reached(flops, step, precision),
            "peak_memory": peak_memory(),
            "losses": losses,
        }
        figures["wrong"] += _wrong_losses(name, losses, figures["fp32"]["losses"])
        if name == precision:
            figures[name]["planned_memory"] = planned_memory(
                setting,
                "finetune",
                "fine_tuning_work",
                {**SETTINGS, "precision": precision, "epochs": _epochs(setting)},
                photos=_photos(setting),
            )
    torch.set_float32_matmul_precision("highest")
    return figures


def _wrong_losses(name: str, losses: Sequence[float], in_fp32: Sequence[float]) -> list[str]:
    if not all(map(math.isfinite, losses)):
        return [f"{name}: a loss is not finite"]
    wrong = []
    if losses[-1] >= losses[0]:
        wrong.append(f"{name}: the loss does not fall ({losses[0]:.4f} to {losses[-1]:.4f})")
    if (distance := _distance(losses, in_fp32)) > NEAR:
        wrong.append(f"{name}: losses differ from fp32's by up to {distance:.1%}")
    return wrong


def _distance(losses: Sequence[float], others: Sequence[float]) -> float:
    """The largest relative difference."""
    return max(abs(one / other - 1) for one, other in zip(losses, others, strict=True))


class BrokenOffError(Exception):
    """What ends a training after its checkpoint."""


class Breaking(Checkpoint):
    """Saves after each epoch, and breaks off after so many."""

    def __init__(self, folder: Path, key: str, epochs: int) -> None:
        super().__init__(folder, key)
        self._left = epochs

    def is_due(self) -> bool:
        return True

    def save(self, state: dict[str, Any]) -> None:
        super().save(state)
        self._left -= 1
        if not self._left:
            raise BrokenOffError


def resume(setting: Setting) -> Figures:
    """Four epochs at a stretch, and two and two: the same losses, and how near the weights are."""
    figures: Figures = {"wrong": []}
    folder = setting.scratch / "checkpoints"
    folder.mkdir(exist_ok=True)
    for precision in dict.fromkeys((setting.auto, "fp16")):
        whole, losses = _train(setting, precision, 4, None)
        try:
            _train(setting, precision, 4, Breaking(folder, precision, 2))
            figures["wrong"].append(f"{precision}: the training was not broken off")
        except BrokenOffError:
            pass
        checkpoint = Checkpoint(folder, precision)
        resumed, again = _train(setting, precision, 4, checkpoint)
        checkpoint.remove()
        one, other = load_tensors(whole), load_tensors(resumed)
        figures[precision] = {
            "losses": losses,
            "losses_after_a_break": again,
            "same_bytes": whole == resumed,
            "largest_difference_of_a_weight": max(
                float((one[name] - other[name]).abs().max()) for name in one
            ),
        }
        if _distance(again, losses) > (0 if setting.device.type == "cpu" else SAME):
            figures["wrong"].append(f"{precision}: other losses after a break")
    return figures


def _steps(setting: Setting) -> int:
    return 2 if setting.tiny else STEPS


def _maker(setting: Setting, batch: int) -> ImageMaker:
    base = setting.base()
    lora = setting.built("lora", partial(generate_speed.build_lora, base))
    return ImageMaker(
        base,
        lora,
        sampler="dpmsolver++",
        steps=_steps(setting),
        guidance_scale=GUIDANCE,
        precision=setting.auto,
        batch_size=batch,
    )


@contextmanager
def _timed(of: Any, method: str) -> Iterator[list[float]]:
    """Seconds of each call of a method while this is open, the GPU's work included."""
    took: list[float] = []
    call = getattr(of, method)

    def timed(*given: Any, **named: Any) -> Any:
        answer: list[Any] = []
        took.append(seconds(lambda: answer.append(call(*given, **named))))
        return answer[0]

    with patch.object(of, method, timed):
        yield took


def generation(setting: Setting) -> Figures:
    """Images of 512 px by batch size, denoising and decoding apart; layouts of the UNet."""
    step_flops = generate_speed.flops_of_step(setting.base())
    maker = _maker(setting, 1)
    pipeline, steps = maker._pipeline, _steps(setting)
    decode_flops = _flops_of_decoding(pipeline)
    figures: Figures = {
        "pixels": diffusion.resolution(pipeline),
        "steps": steps,
        "precision": setting.auto,
        "tflop_a_step_and_image": step_flops / 1e12,
        "tflop_to_decode_an_image": decode_flops / 1e12,
        "wrong": [],
    }
    for batch in (1, 2) if setting.tiny else BATCHES:
        of_batch = copy.copy(maker)  # the models are shared
        of_batch._batch_size = batch
        forget_peak()
        try:
            whole, decode = _batch_seconds(of_batch, batch, 1 if setting.tiny else 3)
        except torch.OutOfMemoryError:
            figures[f"batch_{batch}"] = "does not fit"
            continue
        denoise = whole - decode
        figures[f"batch_{batch}"] = {
            "images_per_second": batch / whole,
            "denoising": {
                "seconds": denoise,
                **setting.reached(batch * steps * step_flops, denoise, setting.auto),
            },
            "decoding": {
                "seconds": decode,
                **setting.reached(batch * decode_flops, decode, "fp32"),
            },
            "peak_memory": peak_memory(),
            "planned_memory": planned_memory(
                setting,
                "generate",
                "generating_work",
                {"precision": setting.auto, "batch_size": batch, "steps": steps},
            ),
        }
    figures["milliseconds_of_a_step"] = _layouts(setting, pipeline)
    return figures


def _batch_seconds(maker: ImageMaker, batch: int, repeats: int) -> tuple[float, float]:
    """Median seconds that a full batch takes, and of these its decoding."""
    run = partial(maker.make, _prompts(batch), range(batch))
    run()
    whole, decoding = [], []
    for _ in range(repeats):
        with _timed(maker._pipeline.vae, "decode") as parts:
            whole.append(seconds(run))
        decoding.append(sum(parts))
    return statistics.median(whole), statistics.median(decoding)


def _prompts(count: int) -> list[str]:
    return [f"a bird photo of a wren in the green leaves {n} background" for n in range(count)]


@torch.no_grad()
def _flops_of_decoding(pipeline: Any) -> float:
    """Of one image."""
    with FlopCounterMode(display=False) as counter:
        pipeline.vae.decode(_noise(pipeline, 1))
    return counter.get_total_flops()


def _noise(pipeline: Any, count: int) -> torch.Tensor:
    config = pipeline.unet.config
    side = config.sample_size
    return torch.randn(count, config.in_channels, side, side, device=pipeline.device)


@torch.no_grad()
def _layouts(setting: Setting, pipeline: Any) -> Figures:
    """The UNet on a batch as it is sampled, and as it could be; the autoencoder on an image."""
    unet, vae, dtype = pipeline.unet, pipeline.vae, DTYPES[setting.auto]
    latents = _noise(pipeline, 2 * BATCH)
    text = torch.randn(2 * BATCH, 77, unet.config.cross_attention_dim, device=pipeline.device)
    image = _noise(pipeline, 1)

    def step() -> None:
        with autocast(pipeline.device, dtype):
            unet(latents, 500, text)

    took: Figures = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        name = str(layout).removeprefix("torch.")
        unet.to(memory_format=layout)
        vae.to(memory_format=layout)
        took[f"unet, autocast, {name}"] = setting.median(step, 5)
        took[f"vae, {name}"] = setting.median(lambda: vae.decode(image), 5)
    # Norms and sums in it too, which autocast leaves in fp32.
    unet.to(dtype)
    latents, text = latents.to(dtype), text.to(dtype)
    took[f"unet, all in {setting.auto}, channels_last"] = setting.median(
        lambda: unet(latents, 500, text), 5
    )
    return {name: 1000 * each for name, each in took.items()}


def compiled(setting: Setting) -> Figures:
    """A batch with the UNet by torch.compile, in place as finetune.compile does, and without."""
    batch = 2 if setting.tiny else BATCH
    maker = _maker(setting, batch)
    run = partial(maker.make, _prompts(batch), range(batch))
    before = run()
    plain = setting.median(run, 3)
    maker._pipeline.unet.compile(backend="eager" if setting.tiny else "inductor")
    first = seconds(run)
    fast = setting.median(run, 3)
    return {
        "batch": batch,
        "images_per_second": batch / plain,
        "images_per_second_compiled": batch / fast,
        "times_as_fast": plain / fast,
        "seconds_to_compile": first - fast,
        "distance": peak_signal_to_noise(png(before[0]), png(run()[0])),
    }
