"""Stage `evaluate`: the classifiers' accuracy on the test photos, which nothing else has seen."""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import click
from tqdm import tqdm

from bob.errors import BobError
from bob.formats import layout
from bob.formats.files import replacing, write_csv, write_json
from bob.formats.params import Params
from bob.formats.photos import Photo, read_photos
from bob.models.backbones import predict
from bob.models.classifiers import (
    REAL_AND_SYNTHETIC,
    REAL_ONLY,
    VARIANTS,
    Trained,
    load_classifier,
    read_trained,
)
from bob.models.device import computing_device, device_here
from bob.models.preprocessing import read_inputs

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
    groups = shot_groups(read_photos(layout.TRAIN), {photo.class_name for photo in photos})
    metrics = accuracy_metrics(photos, predictions, groups, validation_top1(trained))
    with replacing(layout.EVALUATE) as folder:
        _write_plots(folder, trained.classes, photos, predictions)
    write_json(layout.ACCURACY_METRICS, metrics)
    click.echo(_summary(metrics, len(photos)))


def classify_photos(trained: Trained, photos: Sequence[Photo]) -> Predictions:
    """What every classifier of `trained` says of every photo."""
    device = computing_device()
    models = {
        (variant, seed): load_classifier(variant, seed)
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


def shot_groups(train: Sequence[Photo], classes: Iterable[str]) -> dict[str, list[str]]:
    """Thirds of `classes` by number of training photos: many, medium and few.

    Equal numbers are ordered by name. `many` and `few` have round(C / 3) of the C classes each, so
    that no two groups differ by more than one class; of two classes none is medium. There are no
    groups where every class has the same number.
    """
    counts = Counter(photo.class_name for photo in train)
    ranked = sorted(classes, key=lambda name: (-counts[name], name))
    if counts[ranked[0]] == counts[ranked[-1]]:
        return {}
    outer = round(len(ranked) / 3)
    medium = ranked[outer : len(ranked) - outer]
    groups = {"many": ranked[:outer], "medium": medium, "few": ranked[-outer:]}
    return {group: members for group, members in groups.items() if members}


def accuracy_metrics(
    photos: Sequence[Photo],
    predictions: Predictions,
    groups: Mapping[str, Sequence[str]],
    validation: Mapping[str, float],
) -> dict[str, float | dict[str, float]]:
    """Top-1 accuracy in percent of each variant, mean and standard deviation over the seeds.

    `lift` is the difference of the means in points; `lift_std` is the standard deviation of the
    seeds' own differences, since both variants of a seed are trained on the same real batches.
    The deviations are those of a sample (n - 1), and zero for a single seed. For each of `groups`,
    `top1_<group>` is the mean of its classes' own top-1, and `lift_<group>` the difference in it.
    `val_top1` is the variant's entry in `validation`, if there is one.
    """
    by_seed = {
        variant: [_scores(photos, named, groups) for named in seeds.values()]
        for variant, seeds in predictions.items()
    }
    pairs = zip(by_seed[REAL_AND_SYNTHETIC], by_seed[REAL_ONLY], strict=True)
    lifts = [{of: both[of] - real[of] for of in both} for both, real in pairs]
    return {
        **{
            variant: _over_seeds("top1", scores)
            | ({"val_top1": validation[variant]} if variant in validation else {})
            for variant, scores in by_seed.items()
        },
        **_over_seeds("lift", lifts),
    }


def _scores(
    photos: Sequence[Photo], named: Sequence[str], groups: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """One classifier's top-1 over all photos, under "", and over the classes of each group."""
    return {"": top1(photos, named)} | {
        f"_{group}": statistics.fmean(class_top1(name, photos, named) for name in members)
        for group, members in groups.items()
    }


def _over_seeds(metric: str, scores: Sequence[dict[str, float]]) -> dict[str, float]:
    means = {f"{metric}{of}": _mean([score[of] for score in scores]) for of in scores[0]}
    return means | {f"{metric}_std": _std([score[""] for score in scores])}


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


def class_top1(class_name: str, photos: Sequence[Photo], named: Sequence[str]) -> float:
    """Percentage of one class's photos whose class was named; the class has at least one."""
    own = [
        name for photo, name in zip(photos, named, strict=True) if photo.class_name == class_name
    ]
    return 100 * own.count(class_name) / len(own)


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
                [
                    class_name,
                    _mean([class_top1(class_name, photos, named) for named in seeds.values()]),
                ]
                for class_name in classes
                if any(photo.class_name == class_name for photo in photos)
            ),
        )
        write_csv(
            folder / "per_seed" / f"{variant}.csv",
            ["seed", "top1"],
            ([seed, round(top1(photos, named), 2)] for seed, named in seeds.items()),
        )


def _summary(metrics: dict[str, float | dict[str, float]], photos: int) -> str:
    parts = []
    for variant in VARIANTS:
        values = metrics[variant]
        assert isinstance(values, dict)
        parts.append(f"{variant} {values['top1']} % (std {values['top1_std']})")
    return (
        f"evaluate: top-1 on {photos} test photos: {', '.join(parts)}; "
        f"lift {metrics['lift']:+} points (std {metrics['lift_std']}), on {device_here()}"
    )
