"""How good the miniature's models are, measured with each other on fixed seeds.

Each measure of a model yields lines (what, value) for its card and for `bob miniature --measure`.
The pictures drawn here were in no training: their indices start where the corpus's may end.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from diffusers import AutoencoderTiny, DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from bob.formats.photos import batches
from bob.formats.prompts import ATTRIBUTES, QUESTION
from bob.miniature.corpus import Pictures, as_input, draw_pictures
from bob.miniature.recipes import SEED
from bob.miniature.world import (
    BACKGROUNDS,
    CONTEXTS,
    DESCRIPTOR,
    POSES,
    SIZE,
    TASK,
    Variant,
    corpus_variants,
)
from bob.models.captioner import open_captioner
from bob.models.similarity import kernel_inception_distance

BATCH = 64
STEPS, GUIDANCE_SCALE = 20, 3.0  # fixed, so that what the cards say stays comparable
FRESH = 100  # the first index of pictures that no corpus has

Measured = Iterator[tuple[str, str]]


def of_captioner(folder: Path, models: Path, count: int) -> Measured:
    """Its answers on every task class, which it has never seen, in every context, five times."""
    unseen = draw_pictures(TASK, range(5))
    images = [Image.fromarray(pixels) for pixels in unseen.pixels]
    truth = {
        "background": [BACKGROUNDS[i] for i in unseen.background],
        "pose": [POSES[i] for i in unseen.pose],
    }
    for attribute in ATTRIBUTES:
        right = _agreement(answer(folder, images, attribute), truth[attribute])
        yield (
            f"{attribute} answered rightly on {len(unseen)} pictures of variants not in the corpus",
            f"{right:.1%}",
        )


def of_backbone(folder: Path, models: Path, count: int) -> Measured:
    """Its top-1 accuracy on fresh pictures of the corpus variants, one in every context."""
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    fresh = draw_pictures(_known(network), range(FRESH, FRESH + 1))
    yield (
        f"top-1 accuracy over {len(fresh.variants)} classes on {len(fresh)} pictures not "
        "trained on",
        f"{_agreement(_named(network, fresh.tensor(slice(None))), fresh.variant):.1%}",
    )


def of_base(folder: Path, models: Path, count: int) -> Measured:
    """What the autoencoder loses, and whether generated images show what their prompts say.

    `count` images of corpus names in all contexts, by DPM-Solver++ with STEPS steps and guidance
    GUIDANCE_SCALE; the captioner and the backbone in `models` are the judges.
    """
    network = timm.create_model(f"local-dir:{models / 'miniature-backbone'}", pretrained=True)
    network.eval()
    variants = _known(network)
    drawn = wanted_pictures(variants, count, FRESH)
    pixels = drawn.tensor(slice(None))
    rebuilt = reconstructed(folder, pixels)
    yield "reconstruction, PSNR in dB", f"{psnr(rebuilt, pixels):.2f}"
    yield (
        f"backbone's top-1 accuracy on {count} drawn pictures, and on their reconstructions",
        f"{_agreement(_named(network, pixels), drawn.variant):.1%}, "
        f"{_agreement(_named(network, rebuilt), drawn.variant):.1%}",
    )
    images = generate(folder, [drawn.caption(row) for row in range(count)])
    obeyed = obedience(images, drawn, models / "miniature-captioner", network)
    for what, judge in (("background", "captioner"), ("pose", "captioner"), ("class", "backbone")):
        yield (
            f"{what} of {count} images generated with guidance {GUIDANCE_SCALE} as prompted "
            f"(judged by the miniature's {judge})",
            f"{obeyed[what]:.1%}",
        )
    again = wanted_pictures(variants, count, FRESH + 1)
    real = _features(network, pixels)
    for what, other in (
        ("generated images", _pixels(images)),
        ("other drawn pictures", again.tensor(slice(None))),
    ):
        mean, std = kernel_inception_distance(real, _features(network, other))
        yield (
            f"KID of {count} {what} against drawn ones, in the backbone's features",
            f"{mean:.3f} (std {std:.3f})",
        )


MEASURES: dict[str, Callable[[Path, Path, int], Measured]] = {
    "captioner": of_captioner,
    "backbone": of_backbone,
    "base": of_base,
}


def wanted_pictures(variants: tuple[Variant, ...], count: int, index: int) -> Pictures:
    """`count` drawn pictures: every context in turn, of variants drawn at random."""
    rng = np.random.default_rng(SEED)
    rows = [
        (int(rng.integers(len(variants))), *CONTEXTS[i % len(CONTEXTS)], index + i // len(CONTEXTS))
        for i in range(count)
    ]
    return Pictures.drawn(variants, rows)


@torch.inference_mode()
def reconstructed(base: Path, pixels: Tensor) -> Tensor:
    """Pictures after the autoencoder, both (n, 3, 64, 64) in [-1, 1]."""
    autoencoder = AutoencoderTiny.from_pretrained(base, subfolder="vae")
    return torch.cat(
        [
            autoencoder.decode(autoencoder.encode(batch).latents).sample.clamp(-1, 1)
            for batch in pixels.split(64)
        ]
    )


def psnr(one: Tensor, other: Tensor) -> float:
    """Peak signal-to-noise ratio in dB between pictures in [-1, 1] of the same shape."""
    return float(10 * torch.log10(4 / (one - other).square().mean()))


def obedience(
    images: list[Image.Image], wanted: Pictures, captioner: Path, network: nn.Module
) -> dict[str, float]:
    """Share of images that show the background, the pose and the class of `wanted`."""
    return {
        "background": _agreement(
            answer(captioner, images, "background"), [BACKGROUNDS[i] for i in wanted.background]
        ),
        "pose": _agreement(answer(captioner, images, "pose"), [POSES[i] for i in wanted.pose]),
        "class": _agreement(
            _named(network, _pixels(images)),
            wanted.variant,
        ),
    }


def answer(folder: Path, images: list[Image.Image], attribute: str) -> list[str]:
    """What the captioner in `folder` says of each image when asked for `attribute`."""
    captioner = open_captioner(folder, precision="fp32", batch_size=BATCH, image_side=SIZE)
    question = QUESTION.format(attribute=attribute, descriptor=DESCRIPTOR)
    return [said for batch in batches(images, BATCH) for said in captioner.answer(batch, question)]


def generate(base: Path, prompts: list[str]) -> list[Image.Image]:
    """One image for each prompt, as stock diffusers makes it; image i has seed i."""
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    for start in tqdm(range(0, len(prompts), 48), desc="generating"):
        batch = prompts[start : start + 48]
        seeds = [torch.Generator().manual_seed(start + i) for i in range(len(batch))]
        images += pipeline(
            batch,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE_SCALE,
            generator=seeds,
        ).images
    return images


def _known(network: Any) -> tuple[Variant, ...]:
    # The tiny backbone knows the first few of them.
    return corpus_variants()[: network.num_classes]


def _pixels(images: list[Image.Image]) -> Tensor:
    return as_input(np.stack([np.asarray(image) for image in images]))


@torch.inference_mode()
def _named(network: nn.Module, pixels: Tensor) -> np.ndarray:
    return torch.cat([network(batch).argmax(1) for batch in pixels.split(256)]).numpy()


@torch.inference_mode()
def _features(network: Any, pixels: Tensor) -> np.ndarray:
    """The network's pooled features, (n, d) float64."""
    return (
        torch.cat(
            [
                network.forward_head(network.forward_features(batch), pre_logits=True)
                for batch in pixels.split(256)
            ]
        )
        .double()
        .numpy()
    )


def _agreement(found: Any, true: Any) -> float:
    return sum(a == b for a, b in zip(found, true, strict=True)) / len(true)
