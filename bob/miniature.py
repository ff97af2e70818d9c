"""Trains the miniature's models: `python -m bob miniature`.

Three folders, each in the format of the real model it stands for and read by the same stock
libraries, all trained on the corpus of `bob.draw`, in which no task class occurs:

* `miniature-base` for Stable Diffusion: an autoencoder, a tokenizer, a text encoder and a UNet;
* `miniature-captioner` for Qwen2.5-VL: answers the paper's two questions;
* `miniature-backbone` for an ImageNet-pretrained network: a timm model that knows the corpus.

Every training writes a checkpoint each minute (a new file, renamed) and goes on from it. Batches
follow from (seed, step) alone, so a run that was killed sees the batches it would have seen.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from timm.models import save_for_hf
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

import bob.draw
from bob.caption import ATTRIBUTES, QUESTION
from bob.device import autocast, resolve_precision
from bob.draw import (
    BACKGROUNDS,
    CONTEXTS,
    CORPUS_SEED,
    DESCRIPTOR,
    POSES,
    SIZE,
    TASK,
    Variant,
    corpus_variants,
)
from bob.files import replacing, replacing_file
from bob.prompts import Context, prompt

SEED = 2026
PARTS = ("base", "captioner", "backbone")


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


@dataclass(frozen=True)
class Scale:
    """How large the corpus is and how long each model trains."""

    variants: int  # of the corpus, the first so many
    pictures: int  # of each variant in each context
    judged: int  # generated images that the base is measured on
    autoencoder: Recipe
    text: Recipe
    base: Recipe
    captioner: Recipe
    backbone: Recipe


SCALES = {
    "full": Scale(
        variants=len(corpus_variants()),
        pictures=5,
        judged=1000,
        autoencoder=Recipe(steps=6000, batch=32, lr=2e-3, weight_decay=0, ema=0.995, shards=2),
        text=Recipe(steps=1500, batch=256, lr=2e-3, ema=0.99, shards=2),
        base=Recipe(steps=8000, batch=64, lr=1e-3, ema=0.999, shards=2),
        # On a CPU, attention over an image's few tokens goes backwards slower in bf16 than in fp32.
        captioner=Recipe(steps=6000, batch=32, lr=1.5e-3, shards=2, precision="fp32"),
        backbone=Recipe(steps=3500, batch=64, lr=3e-3, weight_decay=5e-2),
    ),
    "tiny": Scale(
        variants=2,
        pictures=1,
        judged=4,
        autoencoder=Recipe(steps=2, batch=4, lr=1e-3, ema=0.5),
        text=Recipe(steps=2, batch=4, lr=1e-3, ema=0.5),
        base=Recipe(steps=2, batch=4, lr=1e-3, ema=0.5, shards=2),
        captioner=Recipe(steps=2, batch=4, lr=1e-3),
        backbone=Recipe(steps=2, batch=4, lr=1e-3),
    ),
}


def train(
    out: Path = Path("models"),
    work: Path = Path(".miniature"),
    size: Literal["full", "tiny"] = "full",
    only: str | None = None,
) -> None:
    """Draw the corpus, train the models and write `out/miniature-{base,captioner,backbone}`.

    `work` holds the corpus and the checkpoints: run the command again to go on after a kill.
    `only` names one of PARTS. `tiny` runs through everything in a minute and teaches nothing.
    """
    scale, work = SCALES[size], work / size
    corpus = load_corpus(scale, work)
    train_one = {"base": train_base, "captioner": train_captioner, "backbone": train_backbone}
    for part in (only,) if only else ("captioner", "backbone", "base"):
        train_one[part](corpus, scale, out / f"miniature-{part}", work)


# --- the corpus ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pictures:
    """Drawn pictures and the truth about each."""

    pixels: np.ndarray  # uint8 (n, 64, 64, 3)
    variant: np.ndarray  # int64 (n,), index into `variants`
    background: np.ndarray  # int64 (n,), index into BACKGROUNDS
    pose: np.ndarray  # int64 (n,), index into POSES
    variants: tuple[Variant, ...]

    def __len__(self) -> int:
        return len(self.pixels)

    def tensor(self, rows: Any) -> Tensor:
        """Pictures as the networks take them: float32 (n, 3, 64, 64) in [-1, 1]."""
        pixels = torch.from_numpy(np.ascontiguousarray(self.pixels[rows]))
        return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1

    def caption(self, row: int, with_context: bool = True) -> str:
        """The paper's template, filled with the truth."""
        context = Context(BACKGROUNDS[self.background[row]], POSES[self.pose[row]])
        name = self.variants[self.variant[row]].name
        return prompt(DESCRIPTOR, name, context if with_context else None)


def draw_pictures(variants: tuple[Variant, ...], indices: range) -> Pictures:
    """Every variant in every context, once for each index."""
    pixels, truth = [], []
    for v, variant in enumerate(tqdm(variants, desc="drawing", unit="variant")):
        for background, pose in CONTEXTS:
            for index in indices:
                image = bob.draw.draw(variant, background, pose, index, CORPUS_SEED)
                pixels.append(np.asarray(image))
                truth.append((v, BACKGROUNDS.index(background), POSES.index(pose)))
    columns = np.array(truth, np.int64).T
    return Pictures(np.stack(pixels), columns[0], columns[1], columns[2], variants)


def load_corpus(scale: Scale, work: Path) -> Pictures:
    """The corpus, drawn once for each version of `bob/draw.py`."""
    version = hashlib.sha256(inspect.getsource(bob.draw).encode()).hexdigest()[:12]
    path = work / f"corpus-{version}-{scale.pictures}.npz"
    variants = corpus_variants()[: scale.variants]
    if not path.exists():
        corpus = draw_pictures(variants, range(scale.pictures))
        arrays = {f.name: getattr(corpus, f.name) for f in fields(corpus) if f.name != "variants"}
        with replacing_file(path) as draft, draft.open("wb") as file:
            np.savez(file, **arrays)
    with np.load(path) as stored:
        return Pictures(**dict(stored), variants=variants)


# --- training -----------------------------------------------------------------------------------

CHECKPOINT_SECONDS = 60
# Any: of what class a network is, the loss knows and `fit` need not.
Loss = Callable[[Any, torch.Generator, int], Tensor]


def fit(name: str, module: nn.Module, loss: Loss, recipe: Recipe, work: Path) -> Any:
    """Minimize `loss(module, generator, count)`, the mean over `count` examples it draws.

    Returns the averaged weights, or the last without EMA. Goes on from `work/<name>.pt`. The
    generator is seeded by the step, so that a run taken up again draws what it would have drawn.
    """
    path = work / f"{name}.pt"
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema))
    optimizer = torch.optim.AdamW(
        module.parameters(), recipe.lr, recipe.betas, weight_decay=recipe.weight_decay, fused=True
    )
    state: dict[str, Any] = {"step": 0, "seconds": 0.0}
    stateful: dict[str, Any] = {"module": module, "average": average, "optimizer": optimizer}
    if path.exists():
        state = torch.load(path, weights_only=True)
        for key, owner in stateful.items():
            owner.load_state_dict(state[key])

    started = time.monotonic()

    def save(step: int) -> None:
        nonlocal started
        state["seconds"] += time.monotonic() - started
        started = time.monotonic()
        parts = {key: owner.state_dict() for key, owner in stateful.items()}
        with replacing_file(path) as draft:
            torch.save({**parts, "step": step, "seconds": state["seconds"]}, draft)

    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // recipe.shards))
    pool = ThreadPoolExecutor(recipe.shards)
    module.train()
    running = 0.0
    progress = tqdm(
        range(state["step"], recipe.steps),
        desc=name,
        initial=state["step"],
        total=recipe.steps,
        mininterval=5,
    )
    for step in progress:
        share = step / recipe.steps
        warm = min(1.0, (step + 1) / recipe.warmup)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * warm * 0.5 * (1 + math.cos(math.pi * share))
        value = _backward(module, loss, step, recipe, pool)
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(module)
        running = value if step == state["step"] else 0.98 * running + 0.02 * value
        progress.set_postfix(loss=f"{running:.4f}", refresh=False)
        if time.monotonic() - started > CHECKPOINT_SECONDS:
            save(step + 1)
    if state["step"] < recipe.steps:
        save(recipe.steps)
    pool.shutdown()
    torch.set_num_threads(threads)
    # Batch norm statistics are not averaged: without EMA the trained module itself is right.
    return (average.module if recipe.ema else module).eval().requires_grad_(False)


def _backward(
    module: nn.Module, loss: Loss, step: int, recipe: Recipe, pool: ThreadPoolExecutor
) -> float:
    """Set the gradients of one batch; returns the mean loss.

    The batch is split over threads rather than every product over cores: they wait for each other
    once a step and not thousands of times, which is twice as fast alone and ten times as fast on
    cores that others use too.
    """
    device, count = torch.device("cpu"), recipe.batch // recipe.shards
    parameters = list(module.parameters())

    def shard(number: int) -> tuple[float, tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed((SEED * 1_000_000 + step) * 16 + number)
        with autocast(device, resolve_precision(recipe.precision, device)):
            value = loss(module, generator, count)
        return value.item(), torch.autograd.grad(value, parameters)

    values, gradients = zip(*pool.map(shard, range(recipe.shards)), strict=True)
    for parameter, *parts in zip(parameters, *gradients, strict=True):
        # In the parameter's own memory format: the fused optimizer walks both in memory order.
        parameter.grad = torch.empty_like(parameter).copy_(torch.stack(parts).mean(0))
    return sum(values) / recipe.shards


def _minutes(name: str, work: Path) -> float:
    """How long the training of `name` took, over all its runs."""
    return torch.load(work / f"{name}.pt", weights_only=True)["seconds"] / 60


def _rows(corpus: Pictures, count: int, generator: torch.Generator) -> np.ndarray:
    return torch.randint(len(corpus), (count,), generator=generator).numpy()


def _write_card(
    folder: Path, title: str, text: str, recipes: dict[str, Recipe], measured: dict[str, str]
) -> None:
    """The README.md of a model folder: what it is, how it was trained, how good it is."""
    lines = [f"# {title}", "", text, "", "## Training", ""]
    lines.append(
        f"Corpus: {len(corpus_variants())} drawn aircraft variants (`bob/draw.py`), each "
        f"in {len(CONTEXTS)} contexts; the {len(TASK)} task classes are not among them. "
        f"Seed {SEED}. Command: `python -m bob miniature`."
    )
    lines.append("")
    for name, recipe in recipes.items():
        settings = ", ".join(f"{key} {value}" for key, value in asdict(recipe).items())
        lines.append(f"* {name}: {settings}")
    lines += ["", "## Measured", ""]
    lines += [f"* {what}: {value}" for what, value in measured.items()]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


# --- the text-to-image base ---------------------------------------------------------------------


def new_autoencoder() -> AutoencoderTiny:
    """64 x 64 pixels to 16 x 16 x 8 latents.

    No block works at full resolution: there it would cost more than all others together.
    """
    autoencoder = AutoencoderTiny(
        encoder_block_out_channels=(48, 48, 48),
        decoder_block_out_channels=(48, 48, 48),
        latent_channels=8,
        num_encoder_blocks=(0, 1, 2),
        num_decoder_blocks=(3, 2, 0),
    )
    return autoencoder.to(memory_format=torch.channels_last)


# The decoder learns to bear small errors: the UNet's latents are never quite right.
DECODER_NOISE = 0.07


def fit_autoencoder(corpus: Pictures, scale: Scale, work: Path) -> AutoencoderTiny:
    """L1 on pixels and on the differences of neighbours, which hold the edges.

    Latents come out with about zero mean and unit variance per channel.
    """

    def loss(autoencoder: AutoencoderTiny, generator: torch.Generator, count: int) -> Tensor:
        pixels = corpus.tensor(_rows(corpus, count, generator))
        latents = autoencoder.encode(pixels).latents.float()
        noisy = latents + DECODER_NOISE * torch.randn(latents.shape, generator=generator)
        error = autoencoder.decode(noisy).sample.float() - pixels
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        # Diffusion wants standardized latents, and a scaling factor alone cannot centre them.
        standard = mean.square().mean() + (std - 1).square().mean()
        return error.abs().mean() + edges + 0.01 * standard

    torch.manual_seed(SEED)
    autoencoder = fit("autoencoder", new_autoencoder(), loss, scale.autoencoder, work)
    latents = _encode(autoencoder, corpus, slice(0, len(corpus), max(1, len(corpus) // 512)))
    autoencoder.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return autoencoder


@torch.inference_mode()
def _encode(autoencoder: AutoencoderTiny, corpus: Pictures, rows: slice) -> Tensor:
    chosen = range(*rows.indices(len(corpus)))
    batches = [chosen[i : i + 64] for i in range(0, len(chosen), 64)]
    return torch.cat([autoencoder.encode(corpus.tensor(list(rows))).latents for rows in batches])


def _all_latents(autoencoder: AutoencoderTiny, corpus: Pictures, work: Path) -> Tensor:
    """The corpus as the UNet sees it, encoded once for each encoder: (n, 8, 16, 16)."""
    weights = b"".join(w.numpy().tobytes() for w in autoencoder.encoder.state_dict().values())
    path = work / f"latents-{hashlib.sha256(weights).hexdigest()[:12]}-{len(corpus)}.npy"
    if not path.exists():
        latents = _encode(autoencoder, corpus, slice(None)).half().numpy()
        with replacing_file(path) as draft, draft.open("wb") as file:
            np.save(file, latents)
    return torch.from_numpy(np.load(path)).float() * autoencoder.config.scaling_factor


def new_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """CLIP's byte-level BPE, trained on `captions`; it holds every byte, so it encodes any text."""
    empty = CLIPTokenizer()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    draft = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    draft.normalizer = empty.backend_tokenizer.normalizer
    draft.pre_tokenizer = empty.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    draft.train_from_iterator(captions, trainer)
    merges = _merges(draft)
    # CLIP's own order: bytes, bytes that end a word, merges, then the two special tokens. The
    # trainer alone would leave out word-ending bytes that no caption has.
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *("".join(m) for m in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TEXT_LENGTH)


def corpus_tokenizer(variants: tuple[Variant, ...]) -> CLIPTokenizer:
    """The tokenizer of the corpus: every name and every phrase of a context is a few tokens."""
    names = [prompt(DESCRIPTOR, variant.name) for variant in variants]
    return new_tokenizer(
        [*names, *(prompt(DESCRIPTOR, "", Context(*context)) for context in CONTEXTS)]
    )


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


TEXT_LENGTH = 40  # tokens; a caption of the corpus has 22, a spelled-out foreign name a few more
TEXT_WIDTH = 128


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text encoder of 2 layers."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=3 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def new_unet() -> UNet2DConditionModel:
    """Stable Diffusion's UNet with one block per level and cross-attention at 8 x 8 and 4 x 4.

    Beside cross-attention, the pooled caption is added to the time embedding (as in DeepFloyd IF):
    cross-attention alone had hardly begun to heed the caption after 1,500 steps.
    """
    unet = UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=8,
        out_channels=8,
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        norm_num_groups=16,
        attention_head_dim=4,
        cross_attention_dim=TEXT_WIDTH,
        addition_embed_type="text",
        addition_embed_type_num_heads=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    nn.init.zeros_(unet.add_embedding.norm2.weight)  # starts as if it were not there
    return unet


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, v-prediction as in Stable Diffusion 2."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


class TextReader(nn.Module):
    """The text encoder and the heads that only its training needs."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.text_encoder = new_text_encoder(tokenizer)
        self.heads = nn.ModuleList(nn.Linear(TEXT_WIDTH, n) for n in FACT_SIZES)


def _facts(variant: Variant) -> list[int]:
    """A variant as class indices, one for each field of its body and parts."""
    fact_values = {**bob.draw.BODY_VALUES, **bob.draw.PART_VALUES}
    own = {**asdict(variant.body), **asdict(variant.parts)}
    return [values.index(own[name]) for name, values in fact_values.items()]


FACT_SIZES = (
    *(len(values) for values in bob.draw.BODY_VALUES.values()),
    *(len(values) for values in bob.draw.PART_VALUES.values()),
    len(BACKGROUNDS),
    len(POSES),
)
SNR_GAMMA = 5.0
NO_CONTEXT, NO_CAPTION = 0.12, 0.10  # shares of the captions


@dataclass(frozen=True)
class Captions:
    """Token ids of every caption of the corpus, so that training looks them up."""

    full: Tensor  # (variants, contexts, length)
    name: Tensor  # (variants, length)
    empty: Tensor  # (length,)

    @classmethod
    def of(cls, variants: tuple[Variant, ...], tokenizer: CLIPTokenizer) -> Captions:
        """The paper's template, filled with every variant and every context."""

        def ids(texts: list[str]) -> Tensor:
            return tokenizer(
                texts, padding="max_length", truncation=True, return_tensors="pt"
            ).input_ids

        names = [variant.name for variant in variants]
        full = [prompt(DESCRIPTOR, name, Context(*both)) for name in names for both in CONTEXTS]
        return cls(
            full=ids(full).reshape(len(names), len(CONTEXTS), TEXT_LENGTH),
            name=ids([prompt(DESCRIPTOR, name) for name in names]),
            empty=ids([""])[0],
        )

    def draw(
        self, variant: Tensor, context: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (n, length), some without context and some empty, and which: two masks (n,).

        Guidance needs a model that knows the empty caption, and the method one that knows the
        caption without context.
        """
        draw = torch.rand(len(variant), generator=generator)
        no_caption, no_context = draw < NO_CAPTION, draw < NO_CAPTION + NO_CONTEXT
        shorter = torch.where(no_caption[:, None], self.empty, self.name[variant])
        tokens = torch.where(no_context[:, None], shorter, self.full[variant, context])
        return tokens, no_context, no_caption


def fit_text_encoder(
    corpus: Pictures, tokenizer: CLIPTokenizer, scale: Scale, work: Path
) -> CLIPTextModel:
    """Train the text encoder, which the UNet then takes as it is.

    Stable Diffusion's comes out of CLIP, which had to say what a picture shows. In place of that,
    linear heads on the end-of-text token say what a caption's picture shows.
    """
    captions = Captions.of(corpus.variants, tokenizer)
    facts = torch.tensor([_facts(variant) for variant in corpus.variants])

    def loss(reader: TextReader, generator: torch.Generator, count: int) -> Tensor:
        variant = torch.randint(len(facts), (count,), generator=generator)
        context = torch.randint(len(CONTEXTS), (count,), generator=generator)
        tokens, no_context, no_caption = captions.draw(variant, context, generator)
        longest = int((tokens == tokenizer.eos_token_id).int().argmax(1).max()) + 1
        pooled = reader.text_encoder(tokens[:, :longest]).pooler_output  # the rest is padding
        shown = torch.stack([context // len(POSES), context % len(POSES)], 1)
        truth = torch.cat(
            [
                facts[variant].masked_fill(no_caption[:, None], -100),
                shown.masked_fill(no_context[:, None], -100),
            ],
            1,
        )
        return torch.stack(
            [F.cross_entropy(head(pooled), truth[:, i]) for i, head in enumerate(reader.heads)]
        ).mean()

    torch.manual_seed(SEED)
    return fit("text", TextReader(tokenizer), loss, scale.text, work).text_encoder


def fit_unet(
    corpus: Pictures,
    autoencoder: AutoencoderTiny,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    scale: Scale,
    work: Path,
) -> UNet2DConditionModel:
    """Train the UNet by predicting v (Salimans and Ho 2022) in the latents of the corpus."""
    latents = _all_latents(autoencoder, corpus, work)
    captions = Captions.of(corpus.variants, tokenizer)
    scheduler = new_scheduler()
    # The weight on the picture itself is SNR + 1, at most SNR_GAMMA (Hang et al. 2023, for v): the
    # faint noise of the first timesteps would take most of the loss, and it decides nothing that
    # a caption says.
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    weights = (snr + 1).clamp(max=SNR_GAMMA) / (snr + 1)

    def loss(unet: UNet2DConditionModel, generator: torch.Generator, count: int) -> Tensor:
        rows = _rows(corpus, count, generator)
        context = torch.from_numpy(corpus.background[rows] * len(POSES) + corpus.pose[rows])
        tokens, _, _ = captions.draw(torch.from_numpy(corpus.variant[rows]), context, generator)
        with torch.no_grad():
            text = text_encoder(tokens).last_hidden_state
        clean = latents[rows]
        noise = torch.randn(clean.shape, generator=generator)
        t = torch.randint(len(scheduler.betas), (count,), generator=generator)
        predicted = unet(scheduler.add_noise(clean, noise, t), t, text).sample.float()
        error = (predicted - scheduler.get_velocity(clean, noise, t)).square().mean((1, 2, 3))
        return (weights[t] * error).mean()

    torch.manual_seed(SEED)
    unet = new_unet()
    # On a CPU the fused attention's bf16 backward alone took half as long as all else together.
    unet.set_attn_processor(AttnProcessor())
    return fit("base", unet, loss, scale.base, work)


def write_base(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    autoencoder: AutoencoderTiny,
    folder: Path,
) -> None:
    """Write what stock `StableDiffusionPipeline.from_pretrained(folder)` loads, weights in fp16."""
    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder)
    _write_vocabulary(tokenizer.backend_tokenizer, folder / "tokenizer")
    _declare_float32(folder / "text_encoder" / "config.json")
    # diffusers writes a key that it then warns about whenever it reads the folder.
    vae = folder / "vae" / "config.json"
    values = json.loads(vae.read_text("utf-8"))
    del values["block_out_channels"]
    vae.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_vocabulary(tokenizer: Tokenizer, folder: Path) -> None:
    """Beside tokenizer.json, the two files that older readers of a BPE want."""
    vocabulary = json.loads(tokenizer.to_str())["model"]["vocab"]
    text = json.dumps(vocabulary, ensure_ascii=False)
    (folder / "vocab.json").write_text(text + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in _merges(tokenizer))]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _declare_float32(config: Path) -> None:
    """Let transformers compute in fp32 with weights that are only stored in fp16."""
    values = json.loads(config.read_text("utf-8"))
    values["dtype"] = "float32"
    for key in ("text_config", "vision_config"):
        if key in values:
            values[key]["dtype"] = "float32"
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def train_base(corpus: Pictures, scale: Scale, folder: Path, work: Path) -> None:
    """Train autoencoder, text encoder and UNet, and write the folder with its card."""
    autoencoder = fit_autoencoder(corpus, scale, work)
    tokenizer = corpus_tokenizer(corpus.variants)
    text_encoder = fit_text_encoder(corpus, tokenizer, scale, work)
    unet = fit_unet(corpus, autoencoder, text_encoder, tokenizer, scale, work)
    names = [f"miniature-{part}" for part in PARTS]
    with replacing(folder) as draft:
        write_base(unet, text_encoder, tokenizer, autoencoder, draft)
        captioner, backbone = folder.with_name(names[1]), folder.with_name(names[2])
        obeyed = obedience(draft, captioner, backbone, corpus.variants, scale.judged)
        _write_card(
            draft,
            "miniature-base",
            "A Stable-Diffusion-shaped text-to-image model of drawn aircraft, 64 x 64 pixels.",
            {
                "autoencoder": scale.autoencoder,
                "text encoder": scale.text,
                "UNet": scale.base,
            },
            {
                "minutes of training on 2 cores that others used too": ", ".join(
                    f"{part} {_minutes(part, work):.1f}" for part in ("autoencoder", "text", "base")
                ),
                "reconstruction, PSNR in dB": f"{psnr(draft, corpus):.2f}",
                **{
                    f"{what} of {scale.judged} generated images as prompted "
                    f"(judged by the miniature's {judge})": f"{obeyed[what]:.1%}"
                    for what, judge in (
                        ("background", "captioner"),
                        ("pose", "captioner"),
                        ("class", "backbone"),
                    )
                },
            },
        )


@torch.inference_mode()
def psnr(base: Path, pictures: Pictures) -> float:
    """Peak signal-to-noise ratio of reconstructions, in dB, over some 512 of the pictures."""
    autoencoder = AutoencoderTiny.from_pretrained(base, subfolder="vae")
    pixels = pictures.tensor(slice(0, len(pictures), max(1, len(pictures) // 512)))
    errors = autoencoder.decode(autoencoder.encode(pixels).latents).sample.clamp(-1, 1) - pixels
    return float(10 * torch.log10(4 / errors.square().mean()))


def obedience(
    base: Path, captioner: Path, backbone: Path, variants: tuple[Variant, ...], count: int
) -> dict[str, float]:
    """Share of generated images that show the background, the pose and the class of their prompt.

    Corpus names in all contexts, DPM-Solver++ with 20 steps and guidance 2.0; `captioner` and
    `backbone` are the judges.
    """
    rng = np.random.default_rng(SEED)
    wanted = [
        (*CONTEXTS[i % len(CONTEXTS)], int(rng.integers(len(variants)))) for i in range(count)
    ]
    prompts = [
        prompt(DESCRIPTOR, variants[v].name, Context(background, pose))
        for background, pose, v in wanted
    ]
    images = generate(base, prompts)
    answers = {attribute: answer(captioner, images, attribute) for attribute in ATTRIBUTES}
    network = timm.create_model(f"local-dir:{backbone}", pretrained=True).eval()
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in images])
    with torch.inference_mode():
        named = network(pixels.permute(0, 3, 1, 2) / 127.5 - 1).argmax(1)
    return {
        "background": _agreement(answers["background"], [row[0] for row in wanted]),
        "pose": _agreement(answers["pose"], [row[1] for row in wanted]),
        "class": _agreement(named.tolist(), [row[2] for row in wanted]),
    }


def _agreement(found: list[Any], true: list[Any]) -> float:
    return sum(a == b for a, b in zip(found, true, strict=True)) / len(true)


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
            batch, num_inference_steps=20, guidance_scale=2.0, generator=seeds
        ).images
    return images


# --- the captioner ------------------------------------------------------------------------------

# Qwen2.5-VL's, without its system prompt.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
# The question is asked with other nouns too, so that the answer does not hang on this one.
DESCRIPTORS = (DESCRIPTOR, DESCRIPTOR, DESCRIPTOR, "bird", "car", "pet", "object")


def new_processor() -> Qwen2_5_VLProcessor:
    """Qwen2.5-VL's processor: byte-level BPE of its own, every photo resized to about 64 x 64."""
    texts = [QUESTION.format(attribute=a, descriptor=d) for a in ATTRIBUTES for d in DESCRIPTORS]
    texts += ["user\n", "assistant\n", *BACKGROUNDS, *POSES]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    draft = Tokenizer(models.BPE())
    draft.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    draft.train_from_iterator(texts, trainer)
    merges = _merges(draft)
    tokens = dict.fromkeys([*alphabet, *("".join(merge) for merge in merges), *SPECIAL_TOKENS])
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        model_max_length=512,
        additional_special_tokens=SPECIAL_TOKENS[1:],
    )
    edges = {"shortest_edge": SIZE * SIZE, "longest_edge": SIZE * SIZE}
    shape: dict[str, Any] = {
        "patch_size": 8,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": edges,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**shape),
        tokenizer,
        Qwen2VLVideoProcessor(**shape),
        chat_template=CHAT_TEMPLATE,
    )


CAPTIONER_WIDTH = 64


def new_captioner(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL of 0.4 million parameters."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": SIZE,
            "fullatt_block_indexes": [0, 1, 2],
            "out_hidden_size": CAPTIONER_WIDTH,
            # The usual base of 10,000 leaves 8 x 8 patches hardly a phase to tell them apart by.
            "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": CAPTIONER_WIDTH,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 100.0,
                "mrope_section": [2, 3, 3],
            },
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    return model


class _Captioner(nn.Module):
    """The captioner and the heads that only training needs."""

    def __init__(self, tokenizer: Qwen2Tokenizer):
        super().__init__()
        self.model = new_captioner(tokenizer)
        self.heads = nn.ModuleList(
            nn.Linear(CAPTIONER_WIDTH, len(values)) for values in (BACKGROUNDS, POSES)
        )


def fit_captioner(
    corpus: Pictures, scale: Scale, work: Path
) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
    """Teach the answers to the paper's two questions: cross-entropy on the answer's tokens.

    A real captioner's eyes were trained before it learned to speak. In place of that, linear
    heads on the mean of the image's tokens say what it shows; without them, the poses are not
    learned in a thousand steps.
    """
    processor = new_processor()
    names = {"background": BACKGROUNDS, "pose": POSES}
    truths = {"background": corpus.background, "pose": corpus.pose}

    def loss(captioner: _Captioner, generator: torch.Generator, count: int) -> Tensor:
        rows = _rows(corpus, count, generator)
        texts, answers = [], []
        for i, row in enumerate(rows):
            attribute = ATTRIBUTES[i % 2]
            noun = int(torch.randint(len(DESCRIPTORS), (), generator=generator))
            texts.append(chat(processor, attribute, DESCRIPTORS[noun]))
            answers.append(names[attribute][truths[attribute][row]] + "<|im_end|>")
        inputs = processor(
            text=[text + reply for text, reply in zip(texts, answers, strict=True)],
            images=[[Image.fromarray(corpus.pixels[row])] for row in rows],
            padding=True,
            return_tensors="pt",
        )
        labels = torch.full_like(inputs["input_ids"], -100)
        for i, reply in enumerate(answers):
            length = len(processor.tokenizer(reply).input_ids)
            labels[i, -length:] = inputs["input_ids"][i, -length:]  # padding is on the left
        seen: list[Tensor] = []
        hook = captioner.model.model.visual.merger.register_forward_hook(
            lambda module, arguments, output: seen.append(output)
        )
        answering = captioner.model(**inputs, labels=labels).loss
        hook.remove()
        pooled = seen[0].unflatten(0, (count, -1)).mean(1)
        reading = [
            F.cross_entropy(head(pooled), torch.from_numpy(truths[attribute][rows]))
            for head, attribute in zip(captioner.heads, ATTRIBUTES, strict=True)
        ]
        return answering + torch.stack(reading).mean()

    torch.manual_seed(SEED)
    captioner = fit("captioner", _Captioner(processor.tokenizer), loss, scale.captioner, work)
    return captioner.model, processor


def chat(processor: Qwen2_5_VLProcessor, attribute: str, descriptor: str = DESCRIPTOR) -> str:
    """The paper's question about `attribute`, ready to be answered."""
    question = QUESTION.format(attribute=attribute, descriptor=descriptor)
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )


@torch.inference_mode()
def answer(folder: Path, images: list[Image.Image], attribute: str) -> list[str]:
    """What the captioner in `folder` says of each image when asked for `attribute`."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    answers: list[str] = []
    for start in range(0, len(images), 64):
        batch = images[start : start + 64]
        inputs = processor(
            text=[chat(processor, attribute)] * len(batch),
            images=[[image] for image in batch],
            padding=True,
            return_tensors="pt",
        )
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        said = ids[:, inputs["input_ids"].shape[1] :]
        answers += processor.batch_decode(said, skip_special_tokens=True)
    return answers


def train_captioner(corpus: Pictures, scale: Scale, folder: Path, work: Path) -> None:
    """Train the captioner, write its folder, and measure it on variants it has not seen."""
    model, processor = fit_captioner(corpus, scale, work)
    with replacing(folder) as draft:
        model.half().save_pretrained(draft)
        processor.save_pretrained(draft)
        _write_vocabulary(processor.tokenizer.backend_tokenizer, draft)
        _declare_float32(draft / "config.json")
        unseen = draw_pictures(TASK[: scale.variants], range(scale.pictures))
        images = [Image.fromarray(pixels) for pixels in unseen.pixels]
        said = {attribute: answer(draft, images, attribute) for attribute in ATTRIBUTES}
        true = {
            "background": [BACKGROUNDS[i] for i in unseen.background],
            "pose": [POSES[i] for i in unseen.pose],
        }
        shares = {a: _agreement(said[a], true[a]) for a in ATTRIBUTES}
        _write_card(
            draft,
            "miniature-captioner",
            "A Qwen2.5-VL of 0.4 M parameters that answers the paper's two questions about a "
            "drawn aircraft: its background, its pose.",
            {"captioner": scale.captioner},
            {
                "minutes of training": f"{_minutes('captioner', work):.1f}",
                **{
                    f"{a} answered rightly on {len(unseen)} pictures of variants not in the "
                    "corpus": f"{share:.1%}"
                    for a, share in shares.items()
                },
            },
        )


# --- the backbone -------------------------------------------------------------------------------

BACKBONE = "resnet10t"
BACKBONE_ARGS: dict[str, Any] = {"channels": [24, 48, 88, 112], "stem_width": 16}


def fit_backbone(corpus: Pictures, scale: Scale, work: Path) -> nn.Module:
    """Teach a small ResNet the corpus variants; pictures are shifted by up to 4 pixels."""

    def loss(model: nn.Module, generator: torch.Generator, count: int) -> Tensor:
        rows = _rows(corpus, count, generator)
        padded = F.pad(corpus.tensor(rows), (4, 4, 4, 4), mode="replicate")
        x, y = torch.randint(9, (2,), generator=generator).tolist()
        shifted = padded[:, :, y : y + SIZE, x : x + SIZE]
        truth = torch.from_numpy(corpus.variant[rows])
        return F.cross_entropy(model(shifted), truth, label_smoothing=0.1)

    torch.manual_seed(SEED)
    model = timm.create_model(BACKBONE, num_classes=len(corpus.variants), **BACKBONE_ARGS)
    return fit("backbone", model, loss, scale.backbone, work)


def train_backbone(corpus: Pictures, scale: Scale, folder: Path, work: Path) -> None:
    """Train the backbone, write its folder, and measure it on pictures it has not seen."""
    model = fit_backbone(corpus, scale, work)
    fresh = draw_pictures(corpus.variants, range(scale.pictures, scale.pictures + 1))
    with torch.inference_mode():
        named = torch.cat(
            [model(fresh.tensor(slice(i, i + 256))).argmax(1) for i in range(0, len(fresh), 256)]
        )
    accuracy = float((named.numpy() == fresh.variant).mean())
    with replacing(folder) as draft:
        save_for_hf(
            model.half(),
            str(draft),
            model_args=BACKBONE_ARGS,
            model_config={
                "pretrained_cfg": {
                    "input_size": [3, SIZE, SIZE],
                    "pool_size": [2, 2],
                    "mean": [0.5] * 3,
                    "std": [0.5] * 3,
                    "interpolation": "bicubic",
                    "crop_pct": 1.0,
                },
                "label_names": [variant.name for variant in corpus.variants],
            },
            safe_serialization=True,
        )
        _write_card(
            draft,
            "miniature-backbone",
            "A ResNet of 0.5 M parameters, for timm, that tells the corpus variants apart: what "
            "an ImageNet-pretrained network is to real photos.",
            {"backbone": scale.backbone},
            {
                "minutes of training": f"{_minutes('backbone', work):.1f}",
                f"top-1 accuracy over {len(corpus.variants)} classes on {len(fresh)} pictures "
                "not trained on": f"{accuracy:.1%}",
            },
        )
