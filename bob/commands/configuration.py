"""Mistakes that would surface only when an earlier stage has run for hours.

What parameters must be together, and with the folders and files that they name; those that are not
there yet are let be. No weights are read. Every stage that DVC runs begins with this, for the whole
of `params.yaml` as for its schema, so the first one to run stops; `bob plan` does too.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from bob.errors import BobError
from bob.formats.files import read_json
from bob.formats.layout import CLASSES
from bob.formats.params import Params
from bob.formats.photos import read_task
from bob.formats.prompts import Context, prompt, read_bank, read_contexts

MODELS = (
    ("caption", "model"),
    ("finetune", "base_model"),
    ("classify", "backbone"),
    ("audit", "feature_model"),
)
# As diffusers and transformers name a variant: model.fp16-00001-of-00002.safetensors.
VARIANT = re.compile(r"(diffusion_pytorch_)?model\.[a-z]\w*(-\d+-of-\d+)?\.safetensors")


def model_folder(of: Params, section: str, key: str) -> Path:
    """The folder that the parameter `section.key` names."""
    return Path(getattr(getattr(of, section), key))


def check(values: Mapping[str, Any]) -> None:
    """Check parameters that the schema allows; raises BobError naming the first mistake."""
    of = Params(values, "check")
    for rule in CHECKS:
        rule(of)


def _whole_parts(of: Params) -> None:
    size, parts = of.finetune.batch_size, of.finetune.gradient_accumulation
    if size % parts:
        raise BobError(
            f"finetune.batch_size {size} cannot be cut into finetune.gradient_accumulation {parts} "
            "equal parts; make it a multiple"
        )


def _fitting_backbone(of: Params) -> None:
    rank, decay, folder = of.classify.lora_rank, of.classify.layer_decay, of.classify.backbone
    if not (Path(folder) / "config.json").is_file():
        return
    clip = read_json(Path(folder) / "config.json").get("model_type") == "clip"
    if rank and not clip:
        raise BobError(
            f"classify.lora_rank is {rank}, which is for CLIP, and {folder} is none; set it to 0, "
            "or classify.backbone to a CLIP folder"
        )
    if decay < 1 and clip:
        raise BobError(
            f"classify.layer_decay is {decay}, which is for timm's networks, and {folder} is a "
            "CLIP; set it to 1"
        )


def _plain_weights(of: Params) -> None:
    for section, key in MODELS:
        for folder, _, names in os.walk(model_folder(of, section, key)):
            weights = sorted(name for name in names if name.endswith(".safetensors"))
            if weights and all(map(VARIANT.fullmatch, weights)) and "safety_checker" not in folder:
                raise BobError(
                    f"{section}.{key}: {folder} has weights of another variant alone "
                    f"({weights[0]}), which nothing here loads; put the plain "
                    f"{weights[0].partition('.')[0]}.safetensors there"
                )


def _whole_folders(of: Params) -> None:
    """DVC would wait for ever at a pipe, and with a .dvcignore not hash all that is loaded."""
    for section, key in MODELS:
        for folder, _, names in os.walk(model_folder(of, section, key), followlinks=False):
            for path in (Path(folder, name) for name in sorted(names)):
                if path.name == ".dvcignore":
                    raise BobError(
                        f"{section}.{key}: {path} hides files from DVC, which would not notice "
                        "that they change; remove it"
                    )
                if not path.is_file():
                    raise BobError(
                        f"{section}.{key}: {path} is no file, but a "
                        f"{'broken link' if path.is_symlink() else 'pipe or device'}; remove it"
                    )


def _prompts_read_whole(of: Params) -> None:
    tokenizer = Path(of.finetune.base_model) / "tokenizer"
    files: dict[str, Callable[[Path], Iterable[Context | None]]] = {}
    if of.caption.bank != "captioner":
        files[of.caption.bank] = lambda path: [entry.context for entry in read_bank(path)]
    if of.generate.context not in ("bank", "class", "none"):
        files[of.generate.context] = read_contexts
    contexts = {file: [*filter(None, read(Path(file)))] for file, read in files.items()}
    if not (contexts and CLASSES.is_file() and tokenizer.is_dir()):
        return
    from transformers import CLIPTokenizer

    task, tokenize = read_task(), CLIPTokenizer.from_pretrained(tokenizer, local_files_only=True)
    longest = max(task.classes, key=lambda name: len(tokenize(name).input_ids))
    for file, known in contexts.items():
        texts = [prompt(task.descriptor, longest, context) for context in known]
        for text, tokens in zip(texts, tokenize(texts, verbose=False).input_ids, strict=True):
            if len(tokens) > tokenize.model_max_length:
                raise BobError(
                    f"{file}: the prompt {text!r} has {len(tokens)} tokens, and "
                    f"{of.finetune.base_model} reads {tokenize.model_max_length}; shorten it"
                )


CHECKS: tuple[Callable[[Params], None], ...] = (
    _whole_parts,
    _fitting_backbone,
    _whole_folders,
    _plain_weights,
    _prompts_read_whole,
)
