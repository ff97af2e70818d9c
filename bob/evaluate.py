"""Stage `evaluate`: the classifiers' accuracy on the test photos, which nothing else has seen."""

import statistics
from collections.abc import Sequence
from pathlib import Path

import click
from tqdm import tqdm

from bob import layout
from bob.classifiers import (
    REAL_AND_SYNTHETIC,
    REAL_ONLY,
    VARIANTS,
    Trained,
    load_classifier,
    predict,
    read_inputs,
    read_trained,
)
from bob.data import Photo, read_photos
from bob.device import best_device
from bob.errors import BobError
from bob.files import replacing, write_csv, write_json
from bob.params import Params

Predictions = dict[str, dict[int, list[str]]]
"""By variant, then by seed: the class named for every photo, in the photos' order."""


def run(params: Params) -> None:
    """Write `metrics/accuracy.json`, and predictions and accuracy by class and seed for plots."""
    trained = read_trained()
    photos = read_photos(layout.TEST)
    if not photos:
        raise BobError(
            f"{layout.TEST} lists no photo; put photos into a test folder or raise "
            "data.test_fraction"
        )
    predictions = classify_photos(trained, photos)
    metrics = accuracy_metrics(photos, predictions)
    for variant, value in validation_top1(trained).items():
        metrics[variant]["val_top1"] = value  # type: ignore[index]
    with replacing(layout.EVALUATE) as folder:
        _write_plots(folder, trained.classes, photos, predictions)
    write_json(layout.ACCURACY_METRICS, metrics)
    click.echo(_summary(metrics, len(photos)))


def classify_photos(trained: Trained, photos: Sequence[Photo]) -> Predictions:
    """What every classifier of `trained` says of every photo."""
    device = best_device()
    models = {
        (variant, seed): load_classifier(trained, variant, seed)
        for variant in VARIANTS
        for seed in trained.seeds
    }
    predictions: Predictions = {v: {seed: [] for seed in trained.seeds} for v in VARIANTS}
    # All models take a batch before the next is decoded: photos cost more than weights in memory.
    inputs = read_inputs([photo.path for photo in photos], trained.preprocessing)
    with tqdm(total=len(photos), desc="evaluate", unit="photo", disable=None) as progress:
        for batch in inputs:
            for (variant, seed), model in models.items():
                labels = predict(model, [batch], device).argmax(1)
                predictions[variant][seed] += [trained.classes[int(label)] for label in labels]
            progress.update(len(batch))
    return predictions


def accuracy_metrics(
    photos: Sequence[Photo], predictions: Predictions
) -> dict[str, float | dict[str, float]]:
    """Top-1 accuracy in percent of each variant, mean and standard deviation over the seeds.

    `lift` is the difference of the means in points; `lift_std` is the standard deviation of the
    seeds' own differences, since both variants of a seed are trained on the same real batches.
    The deviations are those of a sample (n - 1), and zero for a single seed.
    """
    by_seed = {
        variant: [top1(photos, named) for named in seeds.values()]
        for variant, seeds in predictions.items()
    }
    pairs = zip(by_seed[REAL_AND_SYNTHETIC], by_seed[REAL_ONLY], strict=True)
    lifts = [both - real for both, real in pairs]
    return {
        **{
            variant: {"top1": _mean(values), "top1_std": _std(values)}
            for variant, values in by_seed.items()
        },
        "lift": _mean(lifts),
        "lift_std": _std(lifts),
    }


def validation_top1(trained: Trained) -> dict[str, float]:
    """Top-1 in percent on validation by variant, mean over the seeds, of the epochs kept.

    What a choice between runs may go by. Empty where there is no validation photo.
    """
    by_seed = {
        variant: [result["top1"] for result in results.values()]
        for variant, results in trained.validation.items()
    }
    return {
        variant: _mean([value for value in values if value is not None])
        for variant, values in by_seed.items()
        if None not in values
    }


def top1(photos: Sequence[Photo], named: Sequence[str]) -> float:
    """Percentage of the photos whose class was named."""
    hits = [photo.class_name == name for photo, name in zip(photos, named, strict=True)]
    return 100 * sum(hits) / len(hits)


# Two decimals: a percentage of some hundred photos has no more to say, and tables stay readable.
def _mean(values: Sequence[float]) -> float:
    return round(statistics.fmean(values), 2)


def _std(values: Sequence[float]) -> float:
    return round(statistics.stdev(values), 2) if len(values) > 1 else 0.0


def _write_plots(
    folder: Path, classes: Sequence[str], photos: Sequence[Photo], predictions: Predictions
) -> None:
    for variant, seeds in predictions.items():
        write_csv(
            folder / "predictions" / f"{variant}.csv",
            ["image", "seed", "actual", "predicted"],
            (
                [photo.path, seed, photo.class_name, name]
                for seed, named in seeds.items()
                for photo, name in zip(photos, named, strict=True)
            ),
        )
        write_csv(
            folder / "per_class" / f"{variant}.csv",
            ["class", "top1"],
            (
                [class_name, _class_top1(class_name, photos, seeds)]
                for class_name in classes
                if any(photo.class_name == class_name for photo in photos)
            ),
        )
        write_csv(
            folder / "per_seed" / f"{variant}.csv",
            ["seed", "top1"],
            ([seed, round(top1(photos, named), 2)] for seed, named in seeds.items()),
        )


def _class_top1(class_name: str, photos: Sequence[Photo], seeds: dict[int, list[str]]) -> float:
    own = [i for i, photo in enumerate(photos) if photo.class_name == class_name]
    return _mean(
        [100 * sum(named[i] == class_name for i in own) / len(own) for named in seeds.values()]
    )


def _summary(metrics: dict[str, float | dict[str, float]], photos: int) -> str:
    parts = []
    for variant in VARIANTS:
        values = metrics[variant]
        assert isinstance(values, dict)
        parts.append(f"{variant} {values['top1']} % (std {values['top1_std']})")
    return (
        f"evaluate: top-1 on {photos} test photos: {', '.join(parts)}; "
        f"lift {metrics['lift']:+} points (std {metrics['lift_std']})"
    )
