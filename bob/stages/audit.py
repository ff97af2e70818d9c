"""Stage audit: what the synthetic set is like, beside the accuracy that comes of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score

from bob.cache.items import ItemCache
from bob.formats.files import replacing, sha256, write_json, write_jsonl
from bob.formats.layout import (
    AUDIT,
    AUDITED,
    BANK,
    CLUSTERS,
    GENERATE,
    SYNTHETIC_METRICS,
    TRAIN,
    VAL,
)
from bob.formats.manifest import Generated, read_manifest
from bob.formats.params import Params
from bob.formats.photos import Photo, Task, batches, open_image, read_photos, read_task
from bob.formats.prompts import ATTRIBUTES, Context, read_bank
from bob.models import diffusion
from bob.models.backbones import open_backbone
from bob.models.device import computing_device, device_here
from bob.models.features import pooled_features
from bob.models.similarity import diversity, kernel_inception_distance, nearest, subset_size
from bob.models.threads import in_threads
from bob.stages.caption import accepted_answers, cached_ask

ALIKE = 6  # generated images that are named as like a generated one
SHEET_CLASSES, SHEET_REAL, SHEET_GENERATED, SHEET_CELL = 8, 4, 8, 96

Pairs = list[tuple[str, Context]]
"""Class and context of each image."""
Clusters = dict[str, dict[str, int]]
"""Attribute (background, pose) -> phrase -> number of its cluster."""


def run(params: Params) -> None:
    """Write `metrics/synthetic.json` and, in `results/audit`, what it says of single images.

    These are contact sheets; of every generated image which images are like it and, where the
    captioner was asked, what it saw (`generated.jsonl`); and the clusters of the contexts' phrases
    (`clusters.json`).
    """
    task, generated = read_task(), read_manifest()
    photos, val = read_photos(TRAIN), read_photos(VAL)
    asked = first_of_each_class(generated, params.audit.captioned_per_class)
    shown: list[Context | None] = []
    if asked:
        with ItemCache("audit") as cache:
            shown = contexts_shown(asked, task, params, cache)
    sets = context_sets(generated, asked, shown)
    clusters = cluster_contexts(sets, len(sets["real"]), Path(params.finetune.base_model))
    metrics = {"images": len(generated), **context_metrics(sets, clusters)}
    prompted = [
        (image.context, seen)
        for image, seen in zip(asked, shown, strict=True)
        if image.context and seen
    ]
    if prompted:
        metrics["obedience"] = context_obedience(prompted, clusters)
    likenesses: list[dict[str, Any]] = []
    if generated:
        real, synthetic = features_of(photos, val, generated, params)
        metrics |= image_metrics(photos, generated, real, synthetic)
        likenesses = likeness(photos, generated, real, synthetic)
    with replacing(AUDIT) as folder:
        write_contact_sheets(folder / "contact_sheets", task.classes, photos, generated)
        write_json(folder / CLUSTERS.name, clusters)
        seen_in = {
            image.file: {"seen": asdict(seen) if seen else None}
            for image, seen in zip(asked, shown, strict=True)
        }
        write_jsonl(
            folder / AUDITED.name,
            (
                {"file_name": image.file, **like, **seen_in.get(image.file, {})}
                for image, like in zip(generated, likenesses, strict=True)
            ),
        )
    write_json(SYNTHETIC_METRICS, _rounded(metrics))
    leakage = metrics["leakage"]
    print(
        f"audit: context leakage (AMI with class) real {leakage['real']['background']:.3f} "
        f"background, {leakage['real']['pose']:.3f} pose; generated "
        f"{leakage['generated']['background']:.3f} and {leakage['generated']['pose']:.3f}"
        + (
            f"; in the pictures {leakage['pictures']['background']:.3f} and "
            f"{leakage['pictures']['pose']:.3f}"
            if "pictures" in leakage
            else ""
        )
        + f", on {device_here()}"
    )


def context_sets(
    generated: Sequence[Generated], asked: Sequence[Generated], shown: Sequence[Context | None]
) -> dict[str, Pairs]:
    """Class and context of each image, by set: by the bank, by prompts, and by the captioner.

    `real` are the real photos, `generated` the generated images by their prompts, and `pictures`,
    where the captioner was `asked`, what it was `shown` in some of these.
    """
    sets: dict[str, Pairs] = {
        "real": [(e.class_name, e.context) for e in read_bank(BANK) if e.context],
        "generated": [(image.class_name, image.context) for image in generated if image.context],
    }
    if asked:
        sets["pictures"] = [
            (image.class_name, context)
            for image, context in zip(asked, shown, strict=True)
            if context
        ]
    return sets


def context_metrics(sets: Mapping[str, Pairs], clusters: Clusters) -> dict[str, Any]:
    """`leakage` of context by set of images, and how many clusters of phrases it goes by."""
    return {
        "leakage": {
            **{name: context_leakage(members, clusters) for name, members in sets.items()},
            "clusters": {name: len(set(numbers.values())) for name, numbers in clusters.items()},
        },
    }


def features_of(
    photos: Sequence[Photo], val: Sequence[Photo], generated: Sequence[Generated], params: Params
) -> tuple[np.ndarray, np.ndarray]:
    """Features of shots and validation photos, and of generated images, by audit.feature_model."""
    backbone = open_backbone(params.audit.feature_model)
    network, device = backbone.features(), computing_device()
    real, synthetic = (
        pooled_features(network, backbone.preprocessing, paths, device)
        for paths in (
            [photo.path for photo in (*photos, *val)],
            [GENERATE / image.file for image in generated],
        )
    )
    return real, synthetic


def image_metrics(
    photos: Sequence[Photo],
    generated: Sequence[Generated],
    real: np.ndarray,
    synthetic: np.ndarray,
) -> dict[str, Any]:
    """`diversity` of the shots and of the generated images, and `kid` between real and generated.

    `real` are features (n, d) of the shots, `photos`, and, for `kid` alone, those of validation.
    """
    mean, std = kernel_inception_distance(real, synthetic)
    return {
        "diversity": {
            "real": diversity(real[: len(photos)], [photo.class_name for photo in photos]),
            "generated": diversity(synthetic, [image.class_name for image in generated]),
        },
        "kid": {"mean": mean, "std": std, "subset_size": subset_size(real, synthetic)},
    }


def likeness(
    photos: Sequence[Photo],
    generated: Sequence[Generated],
    real: np.ndarray,
    synthetic: np.ndarray,
) -> list[dict[str, Any]]:
    """Of each generated image the shot and the generated images that its features are most like."""
    shots, similarities = nearest(synthetic, real[: len(photos)], 1)
    alike, _ = nearest(synthetic, synthetic, ALIKE, itself=True)
    return [
        {
            "shot": photos[shots[number, 0]].path,
            "similarity": round(float(similarities[number, 0]), 4),  # cosine; beyond is rounding
            "alike": [generated[other].file for other in alike[number]],
        }
        for number in range(len(generated))
    ]


def _rounded(value: Any) -> Any:
    # Beyond six decimals there is nothing but the rounding of sums.
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return round(value, 6) + 0.0 if isinstance(value, float) else value


def first_of_each_class(generated: Sequence[Generated], count: int) -> list[Generated]:
    """The first `count` images of every class: a sample, since each image's context is drawn."""
    taken: dict[str, int] = {}
    first = []
    for image in generated:
        taken[image.class_name] = taken.get(image.class_name, 0) + 1
        if taken[image.class_name] <= count:
            first.append(image)
    return first


def take_items(params: Params, cache: ItemCache) -> list[Context | None]:
    """What the captioner sees in the images that it is asked about."""
    asked = first_of_each_class(read_manifest(), params.audit.captioned_per_class)
    return contexts_shown(asked, read_task(), params, cache)


def contexts_shown(
    images: Sequence[Generated], task: Task, params: Params, cache: ItemCache
) -> list[Context | None]:
    """What the captioner sees in each image, whatever its prompt asked for; None: no usable answer.

    The same questions as of the shots, and answers are accepted by the same rules.
    """
    paths = [GENERATE / image.file for image in images]
    photos = [
        Photo(path.as_posix(), image.class_name, content)
        for path, image, content in zip(paths, images, in_threads(sha256, paths), strict=True)
    ]
    ask = cached_ask(cache, params.caption)
    backgrounds, poses = (
        accepted_answers(ask, photos, attribute, task) for attribute in ATTRIBUTES
    )
    return [
        Context(backgrounds[i], poses[i]) if i in backgrounds and i in poses else None
        for i in range(len(images))
    ]


def context_leakage(pairs: Pairs, clusters: Clusters) -> dict[str, float]:
    """How much the context tells of the class, by attribute.

    Adjusted mutual information between class and background, and class and pose: 1 where the one
    decides the other, 0 at chance. Adjusted, because plain mutual information of phrases that are
    all distinct is maximal whatever they say. Marginalization is to bring it to zero.
    """
    classes = [class_name for class_name, _ in pairs]
    return {
        attribute: float(
            adjusted_mutual_info_score(
                classes, [cluster[getattr(context, attribute)] for _, context in pairs]
            )
        )
        if pairs
        else 0.0
        for attribute, cluster in clusters.items()
    }


def context_obedience(
    pairs: Sequence[tuple[Context, Context]], clusters: Clusters
) -> dict[str, float]:
    """Share of pairs (prompted, shown) whose phrases fall into one cluster, by attribute."""
    return {
        attribute: float(
            np.mean(
                [
                    cluster[getattr(prompted, attribute)] == cluster[getattr(shown, attribute)]
                    for prompted, shown in pairs
                ]
            )
        )
        for attribute, cluster in clusters.items()
    }


def cluster_contexts(sets: Mapping[str, Pairs], shots: int, base_model: Path) -> Clusters:
    """Cluster the phrases of all sets together, each attribute by itself.

    The base model's text encoder tells how like they are; it is loaded only where that is asked.
    """
    encoder = cache(lambda: diffusion.load(base_model, computing_device()))
    contexts = [context for pairs in sets.values() for _, context in pairs]
    return {
        attribute: cluster_phrases(
            sorted({getattr(context, attribute) for context in contexts}), shots, encoder
        )
        for attribute in ATTRIBUTES
    }


def cluster_phrases(
    phrases: Sequence[str], photos: int, encoder: Callable[[], Any]
) -> dict[str, int]:
    """Phrase -> cluster, by k-means on text features with k = sqrt(photos), or each its own."""
    k = max(1, round(photos**0.5))
    if len(phrases) <= k:
        return {phrase: index for index, phrase in enumerate(phrases)}
    features = text_features(encoder(), phrases).cpu().numpy()
    labels = KMeans(k, n_init=10, random_state=0).fit_predict(features)
    return {phrase: int(label) for phrase, label in zip(phrases, labels, strict=True)}


@torch.no_grad()
def text_features(pipeline: Any, texts: Sequence[str]) -> torch.Tensor:
    """Pooled, normalised features of the text encoder, (n, width) fp32."""
    features = [
        pipeline.text_encoder(diffusion.tokenize(pipeline, [text])).pooler_output for text in texts
    ]
    return torch.nn.functional.normalize(torch.cat(features).float(), dim=-1)


def write_contact_sheets(
    folder: Path, classes: Sequence[str], photos: Sequence[Photo], generated: Sequence[Generated]
) -> None:
    """Write sheets of a row a class: its first shots, a gap, its first generated images."""
    folder.mkdir()
    real_of = _by_class((photo.class_name, Path(photo.path)) for photo in photos)
    generated_of = _by_class((image.class_name, GENERATE / image.file) for image in generated)
    for number, rows in enumerate(batches(classes, SHEET_CLASSES), start=1):
        _sheet(rows, real_of, generated_of).save(folder / f"{number:02d}.png")


def _by_class(images: Any) -> Mapping[str, list[Path]]:
    by_class: dict[str, list[Path]] = {}
    for class_name, path in images:
        by_class.setdefault(class_name, []).append(path)
    return by_class


def _sheet(
    classes: Sequence[str],
    real_of: Mapping[str, list[Path]],
    generated_of: Mapping[str, list[Path]],
) -> Image.Image:
    cell, title, gap, margin = SHEET_CELL, 16, 16, 4
    columns = SHEET_REAL + SHEET_GENERATED
    size = (columns * cell + gap + 2 * margin, len(classes) * (cell + title) + title + margin)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    generated_left = margin + SHEET_REAL * cell + gap
    draw.text((margin, 0), "real", "gray", font)
    draw.text((generated_left, 0), "generated", "gray", font)
    for row, class_name in enumerate(classes):
        top = title + row * (cell + title)
        draw.text((margin, top), class_name, "black", font)
        for left, paths in (
            (margin, real_of.get(class_name, [])[:SHEET_REAL]),
            (generated_left, generated_of.get(class_name, [])[:SHEET_GENERATED]),
        ):
            for column, image in enumerate(in_threads(_thumbnail, paths)):
                sheet.paste(image, (left + column * cell, top + title))
    return sheet


def _thumbnail(path: Path) -> Image.Image:
    return ImageOps.contain(open_image(path), (SHEET_CELL - 2, SHEET_CELL - 2))
