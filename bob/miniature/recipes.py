"""How each model of the miniature is trained, and how long."""

from __future__ import annotations

from dataclasses import dataclass

from bob.miniature.world import corpus_variants

SEED = 2026


@dataclass(frozen=True)
class Recipe:
    """How one model is trained: AdamW, linear warm-up, cosine decay to nothing."""

    steps: int
    batch: int
    lr: float
    weight_decay: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.99)
    ema: float = 0.0
    warmup: int = 100
    shards: int = 1  # of a batch, one thread each
    precision: str = "auto"
    compile: bool = False  # by torch.compile, which wants a C++ compiler


@dataclass(frozen=True)
class Scale:
    """How large the corpus is and how long each model trains."""

    variants: int  # of the corpus, the first so many
    pictures: int  # of each variant in each context
    judged: int  # generated images that the base is measured on
    perceptual: Recipe  # the network in whose features the autoencoder is compared
    autoencoder: Recipe
    text_encoder: Recipe
    unet: Recipe
    unet_further: Recipe
    captioner: Recipe
    backbone: Recipe


SCALES = {
    "full": Scale(
        variants=len(corpus_variants()),
        pictures=5,
        judged=1000,
        perceptual=Recipe(steps=3500, batch=64, lr=3e-3, weight_decay=5e-2),
        autoencoder=Recipe(steps=5000, batch=32, lr=2e-3, weight_decay=0, ema=0.995, shards=2),
        text_encoder=Recipe(steps=1500, batch=256, lr=2e-3, ema=0.99, shards=2),
        unet=Recipe(steps=10000, batch=64, lr=1e-3, ema=0.999, shards=2, compile=True),
        unet_further=Recipe(steps=16000, batch=64, lr=5e-4, ema=0.999, shards=2, compile=True),
        # On a CPU, attention over an image's few tokens goes backwards slower in bf16 than in fp32.
        captioner=Recipe(steps=5000, batch=32, lr=1.5e-3, shards=2, precision="fp32"),
        backbone=Recipe(steps=3500, batch=64, lr=3e-3, weight_decay=5e-2),
    ),
    "tiny": Scale(
        variants=2,
        pictures=1,
        judged=4,
        perceptual=Recipe(steps=2, batch=4, lr=1e-3),
        autoencoder=Recipe(steps=2, batch=4, lr=1e-3, ema=0.5),
        text_encoder=Recipe(steps=2, batch=4, lr=1e-3, ema=0.5),
        unet=Recipe(steps=2, batch=4, lr=1e-3, ema=0.5, shards=2),
        unet_further=Recipe(steps=2, batch=4, lr=1e-3, ema=0.5, shards=2),
        captioner=Recipe(steps=2, batch=4, lr=1e-3),
        backbone=Recipe(steps=2, batch=4, lr=1e-3),
    ),
}
