"""Small random models in the formats of the real ones, and small photos, for tests to run on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
)

Config = dict[str, Any]

# The config.json files of the published models, where they differ from the classes' defaults.
SD15_UNET: Config = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SD15_TEXT: Config = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
SD21_UNET: Config = {
    "sample_size": 64,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
SD21_TEXT: Config = {
    "vocab_size": 49408,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
SD_VAE: Config = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
TINY_UNET: Config = {
    "sample_size": 8,
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
# A compiler takes a second for each kernel: the least network that has all kinds of layers.
ONE_BLOCK: Config = {
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
TINY_TEXT: Config = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
CLIP_B16_VISION: Config = {"image_size": 224, "patch_size": 16}
CLIP_B16_TEXT: Config = {"vocab_size": 49408}
TINY_CLIP_VISION: Config = TINY_TEXT | {"image_size": 32, "patch_size": 8}
TINY_VAE: Config = {
    "block_out_channels": (16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 8,
}


def build_text_to_image(
    folder: Path,
    prediction_type: str = "epsilon",
    *,
    unet_config: Config = TINY_UNET,
    text_config: Config = TINY_TEXT,
    vae_config: Config = TINY_VAE,
) -> Path:
    """A random Stable Diffusion in the layout of the Hub's own folders; by default one of 16 px."""
    torch.manual_seed(0)
    tokenizer = build_clip_tokenizer(folder.parent / f"{folder.name}-tokenizer")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            **{"vocab_size": len(tokenizer)} | text_config,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(**unet_config)
    vae = AutoencoderKL(**vae_config)
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            steps_offset=1,
            prediction_type=prediction_type,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def build_clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """A byte-level BPE tokenizer in CLIP's two files, the same ones in every run."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<|startoftext|>", "<|endoftext|>", *alphabet, *(f"{one}</w>" for one in alphabet)]
    merges = []
    # Not by tokenizers' trainer, which orders what is equally frequent by chance.
    caption = "a bird photo of a wren in the green leaves background with the perched pose"
    for word in dict.fromkeys(caption.split()):
        token, *rest = [*word[:-1], f"{word[-1]}</w>"]
        for letter in rest:
            merges.append(f"{token} {letter}")
            token += letter
            names.append(token)
    vocabulary = {name: number for number, name in enumerate(dict.fromkeys(names))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    lines = ["#version: 0.2", *dict.fromkeys(merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def build_clip(
    folder: Path,
    *,
    vision_config: Config = TINY_CLIP_VISION,
    text_config: Config = TINY_TEXT,
    projection_dim: int = 24,
    resized: int = 36,
) -> Path:
    """A CLIP with its tokenizer and image processor, as a folder of the Hub has them.

    By default one of 32 px. A photo's shorter side is `resized` before it is cropped.
    """
    torch.manual_seed(0)
    tokenizer = build_clip_tokenizer(folder.parent / f"{folder.name}-tokenizer")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos")}
    config = CLIPConfig(
        vision_config=vision_config,
        text_config={"vocab_size": len(tokenizer)}
        | text_config
        | ids
        | {"pad_token_id": ids["eos_token_id"]},
        projection_dim=projection_dim,
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": resized}, crop_size=config.vision_config.image_size
    ).save_pretrained(folder)
    return folder


# As in the repositories of Qwen2.5-VL, but for its branch for videos.
QWEN_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# Of Qwen2.5-VL-3B-Instruct.
QWEN_3B: Config = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128000,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": True,
}
QWEN_3B_VISION: Config = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 2048,
    "fullatt_block_indexes": [7, 15, 23, 31],
}


def build_captioner(
    folder: Path,
    tied: bool = False,
    *,
    text_config: Config = {},  # noqa: B006
    vision_config: Config = {},  # noqa: B006
    shard: str = "300KB",
) -> Path:
    """A Qwen2.5-VL of random bf16 weights, in the files that the Hub's have; by default a tiny one.

    A flat configuration, the older files for images and chat, weights in several files, padding on
    the right, and generation that samples and penalises repetition.
    """
    from bob.miniature.captioner import new_processor  # late: bench/ builds models without DVC

    torch.manual_seed(0)
    tokenizer = new_processor().tokenizer
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(folder)
    special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    config = {
        "model_type": "qwen2_5_vl",
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "tie_word_embeddings": tied,  # the 3B's are
        "bos_token_id": special["<|endoftext|>"],
        "eos_token_id": special["<|im_end|>"],
        "image_token_id": special["<|image_pad|>"],
        "video_token_id": special["<|video_pad|>"],
        "vision_start_token_id": special["<|vision_start|>"],
        "vision_end_token_id": special["<|vision_end|>"],
        "torch_dtype": "bfloat16",
        "vision_config": {
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": 64,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            **vision_config,
        },
        **text_config,
    }
    model = AutoModelForImageTextToText.from_config(
        Qwen2_5_VLConfig(**config), dtype=torch.bfloat16
    )
    # Random weights of the usual size say the same of every image.
    torch.nn.init.normal_(model.lm_head.weight, std=1)
    model.save_pretrained(folder, max_shard_size=shard)
    files = {
        "config.json": {"architectures": [type(model).__name__], **config},
        "generation_config.json": {
            "do_sample": True,
            "temperature": 1e-6,
            "repetition_penalty": 1.05,
            "eos_token_id": [special["<|im_end|>"], special["<|endoftext|>"]],
            "pad_token_id": special["<|endoftext|>"],
        },
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
            "min_pixels": 56 * 56,
            "max_pixels": 28 * 28 * 16384,
            "patch_size": 14,
            "merge_size": 2,
            "temporal_patch_size": 2,
        },
        "chat_template.json": {"chat_template": QWEN_CHAT_TEMPLATE},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def build_photos(folder: Path, classes: dict[str, int], size: tuple[int, int] = (40, 30)) -> Path:
    """Class folders of JPEG noise in a colour of the class: every file another content."""
    for number, (name, count) in enumerate(classes.items()):
        random = np.random.default_rng(number)
        colour = random.integers(64, 192, 3)
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = colour + random.integers(-60, 60, (size[1], size[0], 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index:03d}.jpg")
    return folder
