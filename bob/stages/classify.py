"""Stage `classify`: train classifiers on the real photos, and on real plus synthetic images.

For every seed two variants are trained by the paper's recipe (published scripts of arXiv
2510.24078): `real_only` and `real_and_synthetic`. One epoch is one pass over the real photos. Both
variants of a seed see the same real photos in the same order with the same augmentation, so their
difference is what the synthetic images do; `real_only` depends on them in no way.

Classifiers that this repository has trained before come from the item cache. Validation decides
which epoch is kept; test photos are never looked at.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from dvclive import Live

from bob.cache.index import Row
from bob.cache.items import ItemCache
from bob.cache.lists import Item, write_items
from bob.cache.recipe import item_key, maker_of
from bob.cache.wanted import Wanted
from bob.cache.work import Work
from bob.errors import BobError
from bob.formats import layout
from bob.formats.files import replacing, sha256, write_json
from bob.formats.manifest import read_manifest
from bob.formats.params import Params
from bob.formats.photos import Photo, Task, read_photos, read_task
from bob.models import training
from bob.models.backbones import open_backbone
from bob.models.classifiers import (
    REAL_AND_SYNTHETIC,
    REAL_ONLY,
    VARIANTS,
    Trained,
    classifier_folder,
    read_history,
    weights_path,
    write_trained,
)
from bob.models.precision import device_name
from bob.models.training import Labelled, Recipe, Trainer

SETS = ("real", "synthetic", "validation")  # of images, among what decides a classifier


def run(params: Params) -> None:
    """Train both variants with every seed and keep their weights, validation results and curves."""
    settings = params.classify
    trainer, task = trainer_of(params), read_task()
    backbone = open_backbone(settings.backbone)
    config = trainer.config  # a backbone that is unfit shows before anything is trained
    planned = [(variant, seed) for seed in settings.seeds for variant in VARIANTS]

    with ItemCache("classify") as cache:
        rows = take_items(params, cache, trainer)
        with replacing(layout.CLASSIFY) as folder:
            cache.place(
                [rows[one].oid for one in planned], [weights_path(folder, *one) for one in planned]
            )
            for one in planned:
                for name, content in config.items():
                    write_json(classifier_folder(folder, *one) / name, content)
            histories = {one: read_history(weights_path(folder, *one)) for one in planned}
            curves = Curves(folder / "curves")
            for (variant, seed), history in histories.items():
                curves.add(variant, seed, history["curves"])
            curves.end()
            trained = Trained(
                descriptor=task.descriptor,
                classes=task.classes,
                preprocessing=backbone.preprocessing,
                seeds=tuple(settings.seeds),
                validation={
                    variant: {
                        str(seed): histories[variant, seed]["result"] for seed in settings.seeds
                    }
                    for variant in VARIANTS
                },
            )
            write_trained(folder, trained)
    write_items(
        layout.CLASSIFY_ITEMS,
        (
            Item(
                rows[one].recipe,
                rows[one].maker,
                rows[one].oid,
                file=str(weights_path(layout.CLASSIFY, *one)),
            )
            for one in planned
        ),
    )
    on = f" on {device_name()}" if cache.made else ""
    click.echo(f"{_summary(trained)}; {cache.account}{on}")


def trainer_of(params: Params) -> Trainer:
    """What trains the classifiers, on the photos and images of the workspace.

    Raises BobError where there is no photo to train on.
    """
    settings = params.classify
    task = read_task()
    real = labelled(read_photos(layout.TRAIN), task)
    validation = labelled(read_photos(layout.VAL), task)
    if not real:
        raise BobError(f"{layout.TRAIN} lists no photo; `dvc repro split` draws the shots")
    synthetic = read_synthetic(task)
    if not validation:
        click.echo("no validation photos: the last epoch of every run is kept")
    if not synthetic:
        click.echo(f"no synthetic images: {REAL_AND_SYNTHETIC} is {REAL_ONLY}")

    return Trainer(
        open_backbone(settings.backbone),
        task,
        recipe_of(settings),
        real=real,
        synthetic=synthetic,
        validation=validation,
    )


def take_items(
    params: Params, cache: ItemCache, trainer: Trainer | None = None
) -> dict[tuple[str, int], Row]:
    """(Variant, seed) -> classifier; trained where the cache has none."""
    trainer, settings = trainer or trainer_of(params), params.classify
    rows: dict[tuple[str, int], Row] = {}
    for variant in VARIANTS:
        folder = Path(settings.backbone)
        wanted = classifiers_wanted(cache, folder, trainer, variant, settings.seeds)
        rows |= _taken(cache, wanted, folder, trainer, variant, settings.seeds)
    return rows


def recipe_of(settings: Any) -> Recipe:
    """The training settings among `settings`, the parameters of `classify`."""
    return Recipe(**{field.name: getattr(settings, field.name) for field in fields(Recipe)})


def _taken(
    cache: ItemCache,
    wanted: Wanted,
    folder: Path,
    trainer: Trainer,
    variant: str,
    seeds: Sequence[int],
) -> dict[tuple[str, int], Row]:
    """One variant's classifiers, trained where the cache has none."""

    with_synthetic = variant == REAL_AND_SYNTHETIC
    backbone = cache.reading(folder)

    def inputs(numbers: list[int]) -> tuple[bool, int, str]:
        (number,) = numbers
        return with_synthetic, seeds[number], f"{variant}, seed {seeds[number]}"

    def files(numbers: list[int]) -> Mapping[Path, str]:
        return backbone(numbers) | trainer.files(with_synthetic)

    rows = cache.take(wanted, Work(trainer.make, inputs, files=files), 1, "training")
    return {(variant, seed): row for seed, row in zip(seeds, rows, strict=True)}


def classifiers_wanted(
    cache: ItemCache, folder: Path, trainer: Trainer, variant: str, seeds: Sequence[int]
) -> Wanted:
    """One variant's classifiers, one a seed, as the item cache takes them.

    `folder` is that of the backbone. Of a family are those that differ in the seed and the images.
    """
    common = {
        "item": "classifier",
        "backbone": cache.content_hash(folder),
        **trainer.settings(variant == REAL_AND_SYNTHETIC),
    }
    family = {name: bool(value) if name in SETS else value for name, value in common.items()}
    return Wanted(
        [item_key(**common, seed=seed) for seed in seeds],
        family,
        maker_of(trainer.made_by, trainer.libraries),
    )


def labelled(photos: Sequence[Photo], task: Task) -> Labelled:
    """Photos of a split as training takes them."""
    return Labelled(
        tuple(Path(photo.path) for photo in photos),
        tuple(photo.sha256 for photo in photos),
        tuple(task.classes.index(photo.class_name) for photo in photos),
    )


def read_synthetic(task: Task, where: Callable[[Path], Path] = lambda path: path) -> Labelled:
    """The generated set; `where` gives the place of its files where that is not the workspace.

    Raises BobError naming a class that is none of the task's.
    """
    images = read_manifest(where(layout.GENERATED))
    unknown = {image.class_name for image in images}.difference(task.classes)
    if unknown:
        raise BobError(
            f"{layout.GENERATED} has images of {min(unknown)!r}, which {layout.CLASSES} does not "
            "list; `dvc repro generate` makes the set anew"
        )
    paths = tuple(where(layout.GENERATE / image.file) for image in images)
    return Labelled(
        paths,
        tuple(map(sha256, paths)),
        tuple(task.classes.index(image.class_name) for image in images),
    )


def _summary(trained: Trained) -> str:
    runs = f"{len(trained.seeds)} seed{'s' if len(trained.seeds) > 1 else ''}"
    parts = []
    for variant in VARIANTS:
        top1 = [result["top1"] for result in trained.validation[variant].values()]
        known = [value for value in top1 if value is not None]
        parts.append(f"{variant} {statistics.mean(known):.1f} %" if known else f"{variant} trained")
    return f"classify: top-1 on validation, {runs}: {', '.join(parts)}"


# --- learning curves ----------------------------------------------------------------------------


class Curves:
    """Learning curves as dvclive writes them: `plots/metrics/<variant>/seed-<n>/<metric>.tsv`.

    `<variant>/<metric>.tsv` beside the seeds' folders is the mean over the seeds, which is what
    one wants to look at first.
    """

    def __init__(self, folder: Path) -> None:
        # The pipeline owns dvc.yaml and the experiment; dvclive is here for its file format.
        self._live = Live(str(folder), save_dvc_exp=False, dvcyaml=False)
        self._runs: dict[str, list[training.Curves]] = {}

    def add(self, variant: str, seed: int, rows: training.Curves) -> None:
        """Write the curves of one run: rows with the key step and any metrics."""
        self._runs.setdefault(variant, []).append(rows)
        self._write(f"{variant}/seed-{seed}", rows)

    def end(self) -> None:
        """Write the means over the seeds."""
        for variant, runs in self._runs.items():
            rows = [
                {key: statistics.fmean(row[key] for row in same_epoch) for key in same_epoch[0]}
                for same_epoch in zip(*runs, strict=True)
            ]
            self._write(variant, [{**row, "step": int(row["step"])} for row in rows])
        self._live.end()

    def _write(self, prefix: str, rows: training.Curves) -> None:
        for row in rows:
            self._live.step = row["step"]
            for name in sorted(row.keys() - {"step"}):  # a set has another order each time
                self._live.log_metric(f"{prefix}/{name}", row[name])
