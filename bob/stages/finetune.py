"""Stage finetune: LoRA on the text-to-image model, with context preservation (paper: step 2)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from dvclive import Live

from bob.cache.checkpoints import Checkpoint
from bob.cache.index import Row
from bob.cache.items import ItemCache
from bob.cache.lists import Item, write_items
from bob.cache.recipe import item_key, maker_of
from bob.cache.wanted import Wanted
from bob.cache.work import Work
from bob.errors import BobError
from bob.formats.files import replacing
from bob.formats.layout import BANK, FINETUNE, FINETUNE_ITEMS, LORA, TRAIN
from bob.formats.params import Params
from bob.formats.photos import Photo, Task, read_photos, read_task
from bob.formats.prompts import Entry, prompt, read_bank
from bob.models import denoising, finetuning
from bob.models.lora import LORA_FILE
from bob.models.precision import device_name, dtype_name, hardware, resolve_precision

# Of the parameters, those that decide the run beside model, captions and precision.
DECIDING = (
    "rank",
    "learning_rate",
    "warmup_steps",
    "epochs",
    "batch_size",
    "gradient_accumulation",
    "gradient_checkpointing",
    "seed",
)
STEPS_WORTH_COMPILING = 3000


def run(params: Params) -> None:
    """Write `results/finetune`: lora/ in diffusers' layout, and curves/ with the loss.

    A run that was killed goes on from its last checkpoint, to the same bytes.
    """
    settings = params.finetune
    if settings.batch_size % settings.gradient_accumulation:
        raise BobError(
            f"finetune.batch_size {settings.batch_size} cannot be cut into "
            f"finetune.gradient_accumulation {settings.gradient_accumulation} equal parts; make "
            "it a multiple"
        )
    with ItemCache("finetune") as cache:
        lora, curve = take_items(params, cache)
        written = cache.read(curve.oid).decode()
        losses = json.loads(written)
        with replacing(FINETUNE) as folder:
            write_curves(folder / "curves", losses)
            cache.place([lora.oid], [folder / LORA.name / LORA_FILE])
    made = f"trained on {device_name()}" if cache.made else "reused"
    write_items(
        FINETUNE_ITEMS,
        [
            Item(lora.recipe, lora.maker, lora.oid, file=str(LORA / LORA_FILE)),
            Item(curve.recipe, curve.maker, curve.oid, text=written),
        ],
    )
    print(
        f"finetune: LoRA of rank {settings.rank} {made}, {settings.epochs} epochs in "
        f"{dtype_name(resolve_precision(settings.precision))}"
        + (f", loss of the last {losses[-1]:.4f}" if losses else "")
    )


def take_items(params: Params, cache: ItemCache) -> list[Row]:
    """The LoRA and the losses of its epochs; trained where the cache has none."""
    settings = params.finetune
    task, photos = read_task(), read_photos(TRAIN)
    captions = training_captions(task, photos, read_bank(BANK), settings.context)
    base_model = Path(settings.base_model)
    dtype = resolve_precision(settings.precision)
    wanted = lora_wanted(cache, photos, captions, settings, dtype)
    checkpoint = (
        cache.folder("checkpoints"),
        item_key(recipe=wanted.recipes[0], maker=wanted.maker.id),
    )

    model = cache.reading(base_model)
    training = {
        "base_model": base_model,
        "dtype": dtype,
        "photos": photos,
        "captions": captions,
        "settings": settings,
        "compiled": is_compiled(settings, len(photos)),
    }

    def files(numbers: list[int]) -> Mapping[Path, str]:
        return model(numbers) | {Path(photo.path): photo.sha256 for photo in photos}

    def inputs(numbers: list[int]) -> tuple[Any, ...]:
        return numbers, checkpoint, training

    rows = cache.take(wanted, Work(_train, inputs, files=files), len(wanted.recipes))
    Checkpoint(*checkpoint).remove()
    return rows


def _train(
    numbers: Sequence[int], checkpoint: tuple[Path, str], training: Mapping[str, Any]
) -> list[bytes]:
    """Of the LoRA and its losses those that are asked for."""
    made = finetuning.train(**training, checkpoint=Checkpoint(*checkpoint))
    return [made[number] for number in numbers]


def is_compiled(settings: Any, photos: int) -> bool:
    """Whether the UNet is compiled, by `finetune.compile`.

    `auto` compiles where a run on so many photos is long enough to get the minutes back, and only
    where it can be.
    """
    if settings.compile != "auto":
        return bool(settings.compile)
    steps = settings.epochs * denoising.steps_an_epoch(photos, settings)
    return steps >= STEPS_WORTH_COMPILING and hardware().compiles


def lora_wanted(
    cache: ItemCache,
    photos: Sequence[Photo],
    captions: Sequence[str],
    settings: Any,
    dtype: torch.dtype,
) -> Wanted:
    """The LoRA's file and the losses of its epochs, as the item cache takes them."""
    deciding = {
        "model": cache.content_hash(Path(settings.base_model)),
        "photos": [photo.sha256 for photo in photos],
        "captions": list(captions),
        "precision": dtype_name(dtype),
        "compile": is_compiled(settings, len(photos)),
        **{name: getattr(settings, name) for name in DECIDING},
    }
    # No trial: it would cost the training that it is to save. The weights after an epoch prove
    # nothing of those after the last, because code can act later: at a checkpoint, for one.
    return Wanted(
        [item_key(item=item, **deciding) for item in ("lora", "losses")],
        {"item": "lora", **deciding},
        maker_of(finetuning.MADE_BY, finetuning.LIBRARIES),
        on_trial=False,
    )


def training_captions(
    task: Task, photos: Sequence[Photo], bank: Sequence[Entry], context: str
) -> list[str]:
    """The caption of every photo; with `context` "caption" its own context is in it, else in none.

    Paper, context preservation: what is said of the background and pose need not be learned as
    part of the class. Raises BobError where the bank is not that of these photos.
    """
    contexts = {entry.image: entry.context for entry in bank}
    if missing := [photo.path for photo in photos if photo.sha256 not in contexts]:
        raise BobError(f"{BANK} has no entry for {missing[0]}; run `dvc repro caption`")
    return [
        prompt(
            task.descriptor,
            photo.class_name,
            contexts[photo.sha256] if context == "caption" else None,
        )
        for photo in photos
    ]


def write_curves(folder: Path, losses: Sequence[float]) -> None:
    """Write the loss of every epoch as dvclive does: `plots/metrics/loss.tsv`."""
    with Live(str(folder), report=None, save_dvc_exp=False, dvcyaml=None) as live:
        for loss in losses:
            live.log_metric("loss", loss)
            live.next_step()
