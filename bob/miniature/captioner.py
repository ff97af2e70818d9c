"""The captioner: a Qwen2.5-VL that answers the paper's two questions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from bob.formats.prompts import ATTRIBUTES, QUESTION
from bob.miniature.corpus import Pictures
from bob.miniature.formats import declare_float32, merges, write_vocabulary
from bob.miniature.recipes import SEED, Recipe, Scale
from bob.miniature.training import fit
from bob.miniature.world import BACKGROUNDS, DESCRIPTOR, POSES, SIZE

ABOUT = (
    "A Qwen2.5-VL of 0.4 M parameters that answers the paper's two questions about a drawn "
    "aircraft: its background, its pose."
)

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
    learned = merges(draft)
    tokens = dict.fromkeys([*alphabet, *("".join(merge) for merge in learned), *SPECIAL_TOKENS])
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=learned,
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
        rows = corpus.rows(count, generator)
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


def train(corpus: Pictures, scale: Scale, folder: Path, work: Path) -> dict[str, Recipe]:
    """Train the captioner, write its folder, and say how."""
    model, processor = fit_captioner(corpus, scale, work)
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    write_vocabulary(processor.tokenizer.backend_tokenizer, folder)
    declare_float32(folder / "config.json")
    return {"captioner": scale.captioner}
