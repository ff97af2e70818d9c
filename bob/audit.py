"""Stage audit: what the synthetic set is like, beside the accuracy that comes of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score
from sklearn.metrics.pairwise import polynomial_kernel

from bob import diffusion
from bob.classifiers import Preprocessing, load_backbone, read_inputs
from bob.data import Photo, batches, open_image, read_photos, read_task
from bob.device import best_device
from bob.files import replacing, write_json
from bob.layout import AUDIT, BANK, GENERATE, SYNTHETIC_METRICS, TRAIN, VAL
from bob.manifest import Generated, read_manifest
from bob.params import Params
from bob.prompts import Context, read_bank

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000  # at most; Binkowski et al. 2018
SHEET_CLASSES, SHEET_REAL, SHEET_GENERATED, SHEET_CELL = 8, 4, 8, 96

Pairs = list[tuple[str, Context]]


def run(params: Params) -> None:
    """Write `metrics/synthetic.json` and the contact sheets in `results/audit`."""
    task, generated = read_task(), read_manifest()
    photos, val = read_photos(TRAIN), read_photos(VAL)
    device = best_device()

    metrics: dict[str, Any] = {"images": len(generated)}
    metrics["leakage"] = context_leakage(
        [(e.class_name, e.context) for e in read_bank(BANK) if e.context],
        [(image.class_name, image.context) for image in generated if image.context],
        diffusion.load(Path(params.finetune.base_model), device),
    )
    if generated:
        network = load_backbone(params.audit.feature_model, 0).eval().to(device)
        real = _features(network, [photo.path for photo in photos + val])
        synthetic = _features(network, [GENERATE / image.file for image in generated])
        metrics["diversity"] = {
            "real": diversity(real[: len(photos)], [photo.class_name for photo in photos]),
            "generated": diversity(synthetic, [image.class_name for image in generated]),
        }
        mean, std = kernel_inception_distance(real, synthetic)
        metrics["kid"] = {"mean": mean, "std": std, "subset_size": _subset_size(real, synthetic)}

    with replacing(AUDIT) as folder:
        write_contact_sheets(folder / "contact_sheets", task.classes, photos, generated)
    write_json(SYNTHETIC_METRICS, _rounded(metrics))
    leakage = metrics["leakage"]
    print(
        f"audit: context leakage (AMI with class) real {leakage['real']['background']:.3f} "
        f"background, {leakage['real']['pose']:.3f} pose; generated "
        f"{leakage['generated']['background']:.3f} and {leakage['generated']['pose']:.3f}"
    )


def _rounded(value: Any) -> Any:
    # Beyond six decimals there is nothing but the rounding of sums.
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return round(value, 6) + 0.0 if isinstance(value, float) else value


def context_leakage(real: Pairs, generated: Pairs, pipeline: Any) -> dict[str, Any]:
    """How much the context tells of the class, in the real shots and in the generated set.

    Adjusted mutual information between class and background, and class and pose: 1 where the one
    decides the other, 0 at chance. Adjusted, because plain mutual information of phrases that are
    all distinct is maximal whatever they say. Phrases are clustered first, by the text features of
    the base model; `clusters` records into how many. Marginalization is to bring it to zero.
    """
    scores: dict[str, dict[str, Any]] = {"real": {}, "generated": {}, "clusters": {}}
    for attribute in ("background", "pose"):
        phrases = sorted({getattr(context, attribute) for _, context in real + generated})
        cluster = cluster_phrases(phrases, len(real), pipeline)
        scores["clusters"][attribute] = len(set(cluster.values()))
        for name, pairs in (("real", real), ("generated", generated)):
            classes = [class_name for class_name, _ in pairs]
            labels = [cluster[getattr(context, attribute)] for _, context in pairs]
            scores[name][attribute] = (
                float(adjusted_mutual_info_score(classes, labels)) if pairs else 0.0
            )
    return scores


def cluster_phrases(phrases: Sequence[str], photos: int, pipeline: Any) -> dict[str, int]:
    """Phrase -> cluster, by k-means on text features with k = sqrt(photos), or each its own."""
    k = max(1, round(photos**0.5))
    if len(phrases) <= k:
        return {phrase: index for index, phrase in enumerate(phrases)}
    features = diffusion.text_features(pipeline, phrases).cpu().numpy()
    labels = KMeans(k, n_init=10, random_state=0).fit_predict(features)
    return {phrase: int(label) for phrase, label in zip(phrases, labels, strict=True)}


def diversity(features: np.ndarray, classes: Sequence[str]) -> float:
    """Mean cosine distance between two images of one class, averaged over classes: 0 to 2.

    `features` is (n, d). A class with a single image counts as 0.
    """
    features = features / np.linalg.norm(features, axis=1, keepdims=True)
    names = np.asarray(classes)
    distances = []
    for name in sorted(set(classes)):
        members = features[names == name]
        n = len(members)
        # The mean over pairs of 1 - cos, from the norm of the sum instead of all pairs.
        squared_sum = float((members.sum(axis=0) ** 2).sum())
        distances.append(1 - (squared_sum - n) / (n * (n - 1)) if n > 1 else 0.0)
    return float(np.mean(distances))


def kernel_inception_distance(real: np.ndarray, generated: np.ndarray) -> tuple[float, float]:
    """KID, mean and standard deviation over random subsets (Binkowski et al. 2018, eq. 4).

    The squared MMD between features (n, d) and (m, d). Unlike FID it is unbiased at any number of
    images; few of them only make it noisier.
    """
    random = np.random.default_rng(0)
    size = _subset_size(real, generated)
    if size < 2:
        return 0.0, 0.0
    values = [
        squared_mmd(
            real[random.choice(len(real), size, replace=False)],
            generated[random.choice(len(generated), size, replace=False)],
        )
        for _ in range(KID_SUBSETS)
    ]
    return float(np.mean(values)), float(np.std(values))


def squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased squared MMD of features (n, d) and (n, d) with the kernel (x.y / d + 1)^3."""
    n = len(x)
    k_xx, k_yy, k_xy = (
        polynomial_kernel(a, b, degree=3, coef0=1) for a, b in ((x, x), (y, y), (x, y))
    )
    within = (k_xx.sum() - k_xx.trace() + k_yy.sum() - k_yy.trace()) / (n * (n - 1))
    return float(within - 2 * k_xy.mean())


def _subset_size(real: np.ndarray, generated: np.ndarray) -> int:
    # Half of the smaller set, so that the subsets differ and their spread says something.
    return min(KID_SUBSET_SIZE, len(real) // 2, len(generated) // 2)


@torch.inference_mode()
def _features(network: torch.nn.Module, paths: Sequence[str | Path]) -> np.ndarray:
    """Pooled features, (n, d) float64."""
    device = next(network.parameters()).device
    features = [
        network(batch.to(device)).double().cpu()
        for batch in read_inputs(paths, Preprocessing.of(network))
    ]
    return torch.cat(features).numpy()


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
            for column, path in enumerate(paths):
                image = ImageOps.contain(open_image(path), (cell - 2, cell - 2))
                sheet.paste(image, (left + column * cell, top + title))
    return sheet
