"""A text-to-image model of Stable Diffusion's shape: loading, latents, text, LoRA, sampling."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from diffusers.utils import convert_state_dict_to_diffusers, logging
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners import lora
from PIL import Image

from bob.errors import BobError
from bob.models.device import autocast, fastest_layout

logging.disable_progress_bar()  # a bar for five files is noise beside the stage's own

# Attention alone, as in the paper's recipe: the four projections of every attention layer.
LORA_FILE = "pytorch_lora_weights.safetensors"  # as diffusers names it
UNET_LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT_LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]

# Decoded at once: 64 images of 64 px, or one of 512 px, which fills a GPU with work already, where
# a batch's activations in fp32 would fill its memory.
DECODED_PIXELS = 512**2

SAMPLERS: Mapping[str, Any] = {
    "dpmsolver++": lambda config: DPMSolverMultistepScheduler.from_config(
        config, algorithm_type="dpmsolver++", solver_order=2
    ),
    "ddim": DDIMScheduler.from_config,
    "pndm": lambda config: PNDMScheduler.from_config(config, skip_prk_steps=True),
    "euler": EulerDiscreteScheduler.from_config,
}


def load(folder: Path, device: torch.device, lora: Path | None = None) -> StableDiffusionPipeline:
    """Load a text-to-image folder in fp32, with a LoRA folder fused into its weights if given.

    Raises BobError naming the folder where it does not hold a Stable Diffusion (1.x, 2.x) pipeline.
    """
    kind = None
    with contextlib.suppress(OSError):
        kind = StableDiffusionPipeline.load_config(folder, local_files_only=True).get("_class_name")
    if kind != "StableDiffusionPipeline":
        raise BobError(
            f"{folder} holds {'no text-to-image model' if kind is None else f'a {kind}'}; a folder "
            "in diffusers' format with a StableDiffusionPipeline (Stable Diffusion 1.x or 2.x) is "
            "needed: `bob fetch` brings one"
        )
    try:
        # Quiet: diffusers warns where the autoencoder is another class than the pipeline's own,
        # which AutoencoderTiny, its documented replacement, always is.
        logging.set_verbosity_error()
        pipeline = StableDiffusionPipeline.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    except (OSError, ValueError) as error:
        raise BobError(f"{folder} does not load: {' '.join(str(error).split())[:200]}") from None
    finally:
        logging.set_verbosity_warning()
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        part.requires_grad_(False)
    if lora is not None:
        pipeline.load_lora_weights(str(lora))
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    return pipeline.to(device)


def cast(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Keep the weights of products in `dtype`, in which autocast multiplies anyway, and lay out.

    Norms and embeddings stay in fp32: on the CPU a norm in bf16 refuses fp32 activations. To be
    called after a LoRA is fused, because in bf16 its small changes would be rounded away.
    """
    for part in module.modules():
        if isinstance(part, torch.nn.Linear | torch.nn.Conv2d):
            part.to(dtype)
    device = next(module.parameters()).device
    module.to(memory_format=fastest_layout(device, dtype))


def resolution(pipeline: StableDiffusionPipeline) -> int:
    """The side in pixels of the square images the model was made for."""
    return pipeline.unet.config.sample_size * pipeline.vae_scale_factor


@torch.no_grad()
def encode_images(
    pipeline: StableDiffusionPipeline, images: Sequence[Image.Image]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the images' scaled latents, each (n, channels, h, w) fp32.

    Images are resized and centre-cropped to the model's resolution. An autoencoder without a
    posterior (AutoencoderTiny) has standard deviation zero.
    """
    side = resolution(pipeline)
    pixels = pipeline.image_processor.preprocess(list(images), side, side, resize_mode="crop")
    encoded = pipeline.vae.encode(pixels.to(pipeline.device))
    scale = pipeline.vae.config.scaling_factor
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mean * scale, encoded.latent_dist.std * scale
    return encoded.latents * scale, torch.zeros_like(encoded.latents)


def tokenize(pipeline: StableDiffusionPipeline, texts: Sequence[str]) -> torch.Tensor:
    """Token ids, (n, model_max_length), padded and truncated as the pipeline does."""
    return pipeline.tokenizer(
        list(texts),
        padding="max_length",
        max_length=pipeline.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids.to(pipeline.device)


@torch.no_grad()
def text_features(pipeline: StableDiffusionPipeline, texts: Sequence[str]) -> torch.Tensor:
    """Pooled, normalised features of the text encoder, (n, width) fp32."""
    features = [pipeline.text_encoder(tokenize(pipeline, [text])).pooler_output for text in texts]
    return torch.nn.functional.normalize(torch.cat(features).float(), dim=-1)


class LoraLinear(lora.Linear):
    """PEFT's LoRA layer of one adapter without dropout and alpha = rank, in fewer passes.

    PEFT raises the input to fp32, from which autocast lowers it again, multiplies by a scale that
    is 1, and adds; here the sum is part of the second product. That is 6 % of the miniature's step.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """W x + B A x, for x of shape (..., in)."""
        (name,) = self.active_adapters
        base = self.base_layer(x)
        down = self.lora_A[name](x).flatten(0, -2)
        return torch.addmm(base.flatten(0, -2), down, self.lora_B[name].weight.T).view_as(base)


def add_lora(pipeline: StableDiffusionPipeline, rank: int, seed: int) -> list[torch.nn.Parameter]:
    """Put LoRA of `rank` on the attention of UNet and text encoder; returns what is to be trained.

    alpha = rank, so that the file needs no adapter metadata: diffusers infers the rank and takes it
    for alpha, and the file's bytes do not depend on the process that wrote it.
    """
    parameters = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for model, targets in (
            (pipeline.unet, UNET_LORA_TARGETS),
            (pipeline.text_encoder, TEXT_LORA_TARGETS),
        ):
            config = LoraConfig(
                r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets
            )
            config._register_custom_module({torch.nn.Linear: LoraLinear})
            model.add_adapter(config)
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            for parameter in trained:
                parameter.data = parameter.data.float()
            parameters += trained
    return parameters


def save_lora(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Save the LoRA so that stock diffusers' `pipe.load_lora_weights(folder)` loads both parts."""
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet)),
        text_encoder_lora_layers=convert_state_dict_to_diffusers(
            get_peft_model_state_dict(pipeline.text_encoder)
        ),
    )


@torch.no_grad()
def encode_prompts(
    pipeline: StableDiffusionPipeline, prompts: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Embedding, (tokens, width), of every distinct prompt.

    One prompt at a time: the last bits of an embedding must not depend on the others asked for.
    """
    return {
        text: pipeline.encode_prompt(text, pipeline.device, 1, False)[0][0]
        for text in dict.fromkeys(prompts)
    }


@torch.no_grad()
def sample(
    pipeline: StableDiffusionPipeline,
    embeddings: torch.Tensor,
    negative: torch.Tensor,
    seeds: Sequence[int],
    *,
    steps: int,
    guidance_scale: float,
    dtype: torch.dtype,
) -> list[Image.Image]:
    """Sample one image per prompt embedding.

    `embeddings` is (n, tokens, width), `negative` (tokens, width) the embedding of the empty
    prompt, `seeds` the n seeds of the initial noise, drawn on the CPU so that they mean the same
    noise on every device. Denoising runs in `dtype`; decoding stays in fp32, because eight bits of
    mantissa are fewer than an image's eight bits want.
    """
    with autocast(pipeline.device, dtype):
        latents = pipeline(
            prompt_embeds=embeddings,
            negative_prompt_embeds=negative.expand_as(embeddings),
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            output_type="latent",
        ).images
    latents = latents.float() / pipeline.vae.config.scaling_factor
    return [
        image
        for part in latents.split(decoded_at_once(pipeline, len(latents)))
        for image in pipeline.image_processor.postprocess(pipeline.vae.decode(part).sample)
    ]


def decoded_at_once(pipeline: StableDiffusionPipeline, count: int) -> int:
    """How many of a batch of `count` images the autoencoder decodes at once."""
    # Equal parts: an image's last bits depend on how many are decoded with it.
    most = max(1, DECODED_PIXELS // resolution(pipeline) ** 2)
    return max(part for part in range(1, most + 1) if count % part == 0)
