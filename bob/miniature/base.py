"""The text-to-image base, in Stable Diffusion's format: autoencoder, text encoder, UNet."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from bob.formats.files import replacing, replacing_file
from bob.formats.prompts import Context, prompt
from bob.miniature import world
from bob.miniature.backbone import fit_network
from bob.miniature.corpus import Pictures
from bob.miniature.formats import declare_float32, merges, write_vocabulary
from bob.miniature.recipes import SEED, Recipe, Scale
from bob.miniature.training import fit
from bob.miniature.world import BACKGROUNDS, CONTEXTS, DESCRIPTOR, POSES, SIZE, Variant
from bob.models import diffusion

ABOUT = "A Stable-Diffusion-shaped text-to-image model of drawn aircraft, 64 x 64 pixels."


LATENT_SIZE = SIZE // 4


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
PERCEPTUAL_WEIGHT = 0.1
RESIZED = 0.5  # share of the autoencoder's batches


def fit_autoencoder(
    corpus: Pictures, network: nn.Module, scale: Scale, work: Path
) -> AutoencoderTiny:
    """L1 on pixels and on the differences of neighbours, and distance in a network's features.

    The latter as in Stable Diffusion's own autoencoder: without it the small parts that tell
    variants apart are the first to be lost. Half the batches are decoded from latents resized, to
    the picture resized alike (Kouzelis et al. 2025): such latents are learned sooner by the UNet.
    Latents come out with about zero mean and unit variance per channel.
    """

    def loss(autoencoder: AutoencoderTiny, generator: torch.Generator, count: int) -> Tensor:
        pixels = corpus.tensor(corpus.rows(count, generator))
        latents = autoencoder.encode(pixels).latents.float()
        shown, target = latents, pixels
        if torch.rand((), generator=generator) < RESIZED:
            side = int(torch.randint(LATENT_SIZE // 2, LATENT_SIZE, (), generator=generator))
            shown, target = _resized(latents, side), _resized(pixels, side * SIZE // LATENT_SIZE)
        noisy = shown + DECODER_NOISE * torch.randn(shown.shape, generator=generator)
        rebuilt = autoencoder.decode(noisy).sample.float()
        error = rebuilt - target
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        # Diffusion wants standardized latents, and a scaling factor alone cannot centre them.
        standard = mean.square().mean() + (std - 1).square().mean()
        seen = PERCEPTUAL_WEIGHT * perceptual_distance(network, rebuilt, target)
        return error.abs().mean() + edges + seen + 0.01 * standard

    torch.manual_seed(SEED)
    autoencoder = fit("autoencoder", new_autoencoder(), loss, scale.autoencoder, work)
    latents = _encode(autoencoder, corpus, slice(0, len(corpus), max(1, len(corpus) // 512)))
    autoencoder.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return autoencoder


def _resized(images: Tensor, side: int) -> Tensor:
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True)


def perceptual_distance(network: Any, one: Tensor, other: Tensor) -> Tensor:
    """Squared distance of unit-length features (Zhang et al. 2018), summed over four stages."""
    distances = [
        (F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)).square().sum(1).mean()
        for a, b in zip(
            *(
                network.forward_intermediates(x, indices=[0, 1, 2, 3], intermediates_only=True)
                for x in (one, other)
            ),
            strict=True,
        )
    ]
    return torch.stack(distances).sum()


@torch.inference_mode()
def _encode(autoencoder: AutoencoderTiny, corpus: Pictures, rows: slice) -> Tensor:
    chosen = range(*rows.indices(len(corpus)))
    batches = [chosen[i : i + 64] for i in range(0, len(chosen), 64)]
    return torch.cat([autoencoder.encode(corpus.tensor(list(rows))).latents for rows in batches])


def _hash(module: nn.Module) -> str:
    weights = b"".join(weight.numpy().tobytes() for weight in module.state_dict().values())
    return hashlib.sha256(weights).hexdigest()[:12]


def _all_latents(autoencoder: AutoencoderTiny, corpus: Pictures, work: Path) -> Tensor:
    """The corpus as the UNet sees it, encoded once for each encoder: (n, 8, 16, 16)."""
    path = work / f"latents-{_hash(autoencoder.encoder)}-{len(corpus)}.npy"
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
    learned = merges(draft)
    # CLIP's own order: bytes, bytes that end a word, merges, then the two special tokens. The
    # trainer alone would leave out word-ending bytes that no caption has.
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *("".join(m) for m in learned)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=learned, model_max_length=TEXT_LENGTH)


def corpus_tokenizer(variants: tuple[Variant, ...], work: Path) -> CLIPTokenizer:
    """The tokenizer of the corpus: every name and every phrase of a context is a few tokens.

    Kept in `work`, because the trainer numbers pieces that are equally frequent as chance has it,
    and a text encoder must keep the numbers it was trained with.
    """
    folder = work / "tokenizer"
    if not folder.exists():
        names = [prompt(DESCRIPTOR, variant.name) for variant in variants]
        contexts = [prompt(DESCRIPTOR, "", Context(*context)) for context in CONTEXTS]
        with replacing(folder) as draft:
            new_tokenizer([*names, *contexts]).save_pretrained(draft)
    return CLIPTokenizer.from_pretrained(folder)


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
        sample_size=LATENT_SIZE,
        in_channels=8,
        out_channels=8,
        block_out_channels=(96, 128, 128),
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


def timestep_shares(scheduler: DDIMScheduler) -> Tensor:
    """How often training meets each timestep: (timesteps,), not normalized.

    So that log SNR is normal (Karras et al. 2022, section 5). Stable Diffusion's schedule is made
    for latents of 64 x 64: drawn evenly, six of ten of its timesteps have more noise than signal,
    and of 16 x 16 latents each says more.
    """
    signal = scheduler.alphas_cumprod
    log_snr = torch.log(signal / (1 - signal))
    density = torch.exp(-0.5 * ((log_snr - LOG_SNR_MEAN) / LOG_SNR_STD).square())
    return density * -torch.gradient(log_snr)[0]


class TextReader(nn.Module):
    """The text encoder and the heads that only its training needs."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.text_encoder = new_text_encoder(tokenizer)
        self.heads = nn.ModuleList(nn.Linear(TEXT_WIDTH, n) for n in FACT_SIZES)


def _facts(variant: Variant) -> list[int]:
    """A variant as class indices, one for each field of its body and parts."""
    fact_values = {**world.BODY_VALUES, **world.PART_VALUES}
    own = {**asdict(variant.body), **asdict(variant.parts)}
    return [values.index(own[name]) for name, values in fact_values.items()]


FACT_SIZES = (
    *(len(values) for values in world.BODY_VALUES.values()),
    *(len(values) for values in world.PART_VALUES.values()),
    len(BACKGROUNDS),
    len(POSES),
)
LOG_SNR_MEAN, LOG_SNR_STD = 0.0, 2.2
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
    return fit("text_encoder", TextReader(tokenizer), loss, scale.text_encoder, work).text_encoder


def fit_unet(
    corpus: Pictures,
    autoencoder: AutoencoderTiny,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    recipe: Recipe,
    work: Path,
    name: str = "unet",
    start: UNet2DConditionModel | None = None,
) -> UNet2DConditionModel:
    """Train the UNet by predicting v (Salimans and Ho 2022) in the latents of the corpus.

    It begins anew, or with the weights of `start`.
    """
    latents = _all_latents(autoencoder, corpus, work)
    captions = Captions.of(corpus.variants, tokenizer)
    scheduler = new_scheduler()
    timesteps = timestep_shares(scheduler)

    def loss(unet: UNet2DConditionModel, generator: torch.Generator, count: int) -> Tensor:
        rows = corpus.rows(count, generator)
        context = torch.from_numpy(corpus.context[rows])
        tokens, _, _ = captions.draw(torch.from_numpy(corpus.variant[rows]), context, generator)
        with torch.no_grad():
            text = text_encoder(tokens).last_hidden_state
        clean = latents[rows]
        noise = torch.randn(clean.shape, generator=generator)
        t = torch.multinomial(timesteps, count, replacement=True, generator=generator)
        predicted = unet(scheduler.add_noise(clean, noise, t), t, text).sample.float()
        return (predicted - scheduler.get_velocity(clean, noise, t)).square().mean()

    torch.manual_seed(SEED)
    unet = start or new_unet()
    # On a CPU the fused attention's bf16 backward alone took half as long as all else together.
    unet.set_attn_processor(AttnProcessor())
    return fit(name, unet, loss, recipe, work)


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
    write_vocabulary(tokenizer.backend_tokenizer, folder / "tokenizer")
    declare_float32(folder / "text_encoder" / "config.json")
    # diffusers writes a key that it then warns about whenever it reads the folder.
    _forget(folder / "vae" / "config.json", "block_out_channels")


def _forget(config: Path, key: str) -> None:
    values = json.loads(config.read_text("utf-8"))
    values.pop(key, None)
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def train(corpus: Pictures, scale: Scale, folder: Path, work: Path) -> dict[str, Recipe]:
    """Train autoencoder, text encoder and UNet, write the folder, and say how."""
    # Not the backbone, which is to judge what comes of it.
    network = fit_network("perceptual", corpus, scale.perceptual, 1, work)
    autoencoder = fit_autoencoder(corpus, network, scale, work)
    tokenizer = corpus_tokenizer(corpus.variants, work)
    text_encoder = fit_text_encoder(corpus, tokenizer, scale, work)
    unet = fit_unet(corpus, autoencoder, text_encoder, tokenizer, scale.unet, work)
    write_base(unet, text_encoder, tokenizer, autoencoder, folder)
    return {
        "perceptual": scale.perceptual,
        "autoencoder": scale.autoencoder,
        "text_encoder": scale.text_encoder,
        "unet": scale.unet,
    }


def train_further(
    corpus: Pictures, scale: Scale, base: Path, folder: Path, work: Path
) -> dict[str, Recipe]:
    """Train the UNet of `base` further, on the same autoencoder and text encoder, into `folder`."""
    pipeline = diffusion.load(base, torch.device("cpu"))
    others = pipeline.vae, pipeline.text_encoder, pipeline.tokenizer
    start = pipeline.unet.requires_grad_(True)
    name = f"unet-{_hash(start)}"
    unet = fit_unet(corpus, *others, scale.unet_further, work, name, start)
    shutil.copytree(base, folder, dirs_exist_ok=True)
    unet.half().save_pretrained(folder / "unet")
    _forget(folder / "unet" / "config.json", "_name_or_path")
    return {name: scale.unet_further}
