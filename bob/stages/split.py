"""Stage split: draw the shots, set validation and test aside; the one reader of users' folders.

Later stages read copies under `results/split`, in one layout, so none of them depends on how a
dataset is laid out, and editing a test photo does not fine-tune a model again. Of a photo that DVC
has linked into the workspace, the copy is another link.
"""

import hashlib
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bob.cache.items import ItemCache
from bob.cache.recipe import item_key, maker_of
from bob.cache.wanted import Wanted
from bob.errors import NAME, BobError, shown, tell
from bob.formats.files import replacing, sha256
from bob.formats.layout import CLASSES, SPLIT, TEST, TRAIN, VAL
from bob.formats.names import class_name_of
from bob.formats.params import Params, check, read_yaml
from bob.formats.photos import Photo, Task, batches, open_image, write_photos, write_task

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}

MADE_BY = ("formats.photos",)
"""Modules of bob that decide whether a file is a readable image."""
LIBRARIES = ("pillow",)
READABLE = b"a readable image\n"
"""The item of every photo that is one: there is nothing else to say of it."""
_AT_ONCE = 32  # photos that are read between two entries in the item cache

DATASET_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["descriptor"],
    "additionalProperties": False,
    "properties": {
        "descriptor": {
            "type": "string",
            "pattern": r"\S",
            "maxLength": NAME,
            "description": "a noun such as bird",
        },
        "classes": {
            "type": "object",
            "description": "a mapping of folders to class names",
            "additionalProperties": {
                "type": "string",
                "pattern": r"\S",
                "maxLength": NAME,
                "description": "the class's name",
            },
        },
    },
}


@dataclass(frozen=True)
class Dataset:
    """A folder `data/<name>`: class -> photos, by part. `val` and `test` may be missing."""

    descriptor: str
    train: dict[str, list[Photo]]
    val: dict[str, list[Photo]] | None
    test: dict[str, list[Photo]] | None


Split = tuple[list[Photo], list[Photo], list[Photo]]


def run(params: Params) -> None:
    """Write `results/split`: the photos as train/, val/ and test/, with a manifest of each."""
    with ItemCache("split") as cache:
        dataset = read_dataset(Path("data") / params.data.name, partial(checked_hashes, cache))
        parts = dict(zip((TRAIN, VAL, TEST), split_of(dataset, params.data), strict=True))
        with replacing(SPLIT) as folder:
            copies = {}
            for manifest, photos in parts.items():
                moved = []
                for photo in photos:
                    source = Path(photo.path)
                    copy = Path(manifest.stem) / source.parent.name / source.name
                    (folder / copy).parent.mkdir(parents=True, exist_ok=True)
                    copies[source] = folder / copy
                    moved.append(Photo((SPLIT / copy).as_posix(), photo.class_name, photo.sha256))
                # The folders exist even when empty: DVC fails a stage whose dependency is missing.
                (folder / manifest.stem).mkdir(exist_ok=True)
                write_photos(folder / manifest.name, moved)
            cache.copy(copies)
            write_task(
                folder / CLASSES.name, Task(dataset.descriptor, tuple(sorted(dataset.train)))
            )
    if not parts[VAL]:
        _warn("there is no validation photo: classify will keep the last epoch of every training")
    counts = ", ".join(f"{len(photos)} {manifest.stem}" for manifest, photos in parts.items())
    about = shown(dataset.descriptor)
    print(f"split: {len(dataset.train)} classes of {about}; photos: {counts}")


def split_of(dataset: Dataset, settings: Any) -> Split:
    """The split of `dataset` by `settings`, the parameters of `data`; raises as `draw_split`."""
    return draw_split(
        dataset,
        shots=settings.shots,
        imbalance=settings.imbalance,
        seed=settings.seed,
        val_per_class=settings.val_per_class,
        test_fraction=settings.test_fraction,
        name=settings.name,
    )


def draw_split(
    dataset: Dataset,
    *,
    shots: int | str,
    imbalance: float,
    seed: int,
    val_per_class: int,
    test_fraction: float,
    name: str,
) -> Split:
    """Choose train, validation and test photos of every class.

    Photos are ranked by a hash of the seed and their content, and the shots are the first ones, as
    many as `shots_by_class` says: so ten shots contain the five and a balanced split the long tail,
    and a photo that is added moves no other. Validation is the end of the same ranking, so it stays
    when the number of shots or the imbalance changes. Test, where the dataset has
    none of its own, is ranked without the seed: every draw of shots is measured on the same photos.

    Raises BobError naming the classes that have too few photos, and what would fit.
    """
    train: list[Photo] = []
    val: list[Photo] = []
    test: list[Photo] = []
    pools: dict[str, list[Photo]] = {}
    for class_name, photos in sorted(dataset.train.items()):
        if dataset.test is None:
            ranked = _ranked(photos, "test")
            held_out = max(1, round(test_fraction * len(photos)))
            test += sorted(ranked[:held_out], key=_by_path)
            photos = ranked[held_out:]
        pools[class_name] = _ranked(photos, str(seed))
    _check_enough(pools, dataset, shots, val_per_class, name)
    available = {class_name: len(pool) for class_name, pool in pools.items()}
    drawn = shots_by_class(available, shots, imbalance, seed)

    for class_name, pool in pools.items():
        train += pool[: drawn[class_name]]
        taken = len(pool) if shots == "all" else int(shots)
        if dataset.val is None and val_per_class:
            val += sorted(pool[taken:][-val_per_class:], key=_by_path)
        elif dataset.val is not None:
            val += dataset.val.get(class_name, [])
        if dataset.test is not None:
            test += dataset.test.get(class_name, [])
    return train, val, test


def shots_by_class(
    available: Mapping[str, int], shots: int | str, imbalance: float, seed: int
) -> dict[str, int]:
    """How many photos of each class are for training, of those that are `available`.

    With an `imbalance` of 1 it is `shots` of every class, or all it has. Above, it is the
    exponential long tail of Cui et al. 2019 (arXiv 1901.05555): the class of rank i among C has
    max(1, round(n_max * imbalance^(-i / (C - 1)))), where n_max is `shots`, or for `all` what the
    smallest class has, so that any class can have any rank. Ranks follow a hash of seed and class
    name: another data seed is another draw of which classes are rare.
    """
    if imbalance == 1:
        return {name: have if shots == "all" else int(shots) for name, have in available.items()}
    most = min(available.values()) if shots == "all" else int(shots)
    ranked = sorted(available, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    return {
        name: max(1, round(most * imbalance ** (-rank / (len(ranked) - 1))))
        for rank, name in enumerate(ranked)
    }


def _check_enough(
    pools: Mapping[str, list[Photo]],
    dataset: Dataset,
    shots: int | str,
    val_per_class: int,
    name: str,
) -> None:
    needs_val = dataset.val is None and val_per_class > 0 and shots != "all"
    needed = (1 if shots == "all" else int(shots)) + needs_val
    short = {class_name: len(pool) for class_name, pool in pools.items() if len(pool) < needed}
    if not short:
        return
    fits = min(map(len, pools.values())) - needs_val
    listed = _some(f"{class_name!r} ({count})" for class_name, count in short.items())
    kept = " and at least one for validation" if needs_val else ""
    after = " after the test photos are taken" if dataset.test is None else ""
    advice = f"data.shots: {fits} fits every class" if fits > 0 else "no number of shots would fit"
    if needs_val and fits < 1:
        advice += "; data.val_per_class: 0 does without validation"
    raise BobError(
        f"data/{name}: too few photos{after} for data.shots: {shots}{kept} in class {listed}; "
        f"{advice}, or add photos"
    )


def read_dataset(folder: Path, hashes_of: Callable[[list[Path]], dict[Path, str]]) -> Dataset:
    """Read `folder`: class folders, directly or inside train/, val/ and test/, and dataset.yaml.

    A class is named as its folder, or as `classes` in dataset.yaml says, in Unicode's composed
    form. `hashes_of` gives the SHA-256 of the photos, and raises where one is none, as
    `checked_hashes` does. Raises BobError naming the file or class for: no descriptor, a name for a
    folder that is not there, two folders of one class, a folder or file whose name is none, an
    empty class, a test class that is not in train, one content in two classes or in two parts. A
    second copy of an image within a class is left out with a warning, and so is what lies where
    nothing is read: a folder in a class's, a photo beside the classes, a broken link.
    """
    if not folder.is_dir():
        raise BobError(
            f"{folder} is missing; put class folders of photos there, then "
            f"`dvc add {folder} && git add {folder}.dvc`, or set data.name to what you have"
        )
    about = folder / "dataset.yaml"
    descriptor, names = _read_about(about)
    if any(path.is_dir() for path in (folder / "train").glob("*")):
        roots = {
            part: folder / part for part in ("train", "val", "test") if (folder / part).is_dir()
        }
    else:
        roots = {"train": folder}
    for name in names:
        if not any(name == path.name for root in roots.values() for path in root.iterdir()):
            raise BobError(
                f"{about}: classes names the folder {name!r}, which is not there; correct or "
                "remove the entry"
            )
    parts = {part: _list_classes(root, names, about) for part, root in roots.items()}
    if folder not in roots.values():
        others = [path for path in _visible(folder) if path not in roots.values()]
        _warn_of_unread(folder, [path for path in others if path.is_dir() or _is_stray(path)])

    files = [path for classes in parts.values() for paths in classes.values() for path in paths]
    hashes = hashes_of(files)
    photos = {
        part: {
            class_name: [Photo(path.as_posix(), class_name, hashes[path]) for path in paths]
            for class_name, paths in classes.items()
        }
        for part, classes in parts.items()
    }
    _check_parts(folder, photos)
    return Dataset(descriptor, photos["train"], photos.get("val"), photos.get("test"))


def _read_about(path: Path) -> tuple[str, dict[str, str]]:
    """The descriptor, and the names of classes that are not spelled as their folders."""
    if not path.is_file():
        raise BobError(
            f"{path} is missing; write one line into it, the generic noun of all classes, such as: "
            "descriptor: bird"
        )
    value = read_yaml(path)
    check(path, value, DATASET_SCHEMA)
    # YAML reads a folder "747" as a number.
    names = {str(name): " ".join(said.split()) for name, said in value.get("classes", {}).items()}
    return " ".join(value["descriptor"].split()), names


def _list_classes(folder: Path, names: Mapping[str, str], about: Path) -> dict[str, list[Path]]:
    classes: dict[str, list[Path]] = {}
    for directory in (path for path in _visible(folder) if path.is_dir()):
        # An accented letter that another system has decomposed is the same letter.
        class_name = unicodedata.normalize(
            "NFC", names.get(directory.name) or class_name_of(directory.name)
        )
        if not class_name:
            raise BobError(
                f"{folder}: the folder {directory.name!r} names no class; rename it, or name it "
                f"under classes in {about}"
            )
        if class_name in classes:
            raise BobError(f"{folder}: two folders spell the class {class_name!r}; merge them")
        classes[class_name] = _list_photos(directory)
    _warn_of_unread(folder, filter(_is_stray, _visible(folder)))
    if len(classes) < 2:
        raise BobError(f"{folder} holds {len(classes)} class folders; at least two are needed")
    return classes


def _list_photos(directory: Path) -> list[Path]:
    """The photos of a class's folder; warns of what else is there."""
    files = [path for path in _visible(directory) if path.is_file()]
    photos = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    left_out = [shown(path.name) for path in files if path.suffix.lower() not in IMAGE_SUFFIXES]
    if left_out:
        _warn(f"{directory}: not read, for their suffix: {_some(left_out)}")
    _warn_of_unread(directory, (path for path in _visible(directory) if not path.is_file()))
    if not photos:
        raise BobError(f"{directory} holds no image; add photos to it or remove the folder")
    return photos


def _visible(folder: Path) -> list[Path]:
    """What lies in a folder, sorted; raises BobError for a name that no manifest could hold."""
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    for path in paths:
        try:
            path.name.encode("utf-8")
        except UnicodeEncodeError:
            raise BobError(f"{path}: its name is not UTF-8; rename it") from None
    return paths


def _is_stray(path: Path) -> bool:
    """Whether it is a photo, or a link that leads nowhere: beside the classes neither is read."""
    return not path.exists() or (path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES)


def _warn_of_unread(folder: Path, paths: Iterable[Path]) -> None:
    unread = [
        f"{shown(path.name)}{'' if path.exists() else ' (a broken link)'}"
        f"{'/' if path.is_dir() else ''}"
        for path in paths
    ]
    if unread:
        _warn(f"{folder}: not read: {_some(unread)}")


def checked_hashes(cache: ItemCache, files: list[Path]) -> dict[Path, str]:
    """SHA-256 of photos, all of which can be decoded.

    A photo whose content has been decoded before, by this code and this Pillow, is not decoded
    again: that it is readable is an item. Raises BobError naming the first that is not.
    """
    hashes: dict[Path, str] = {}
    errors: list[BobError] = []
    family, maker = {"item": "readable"}, maker_of(MADE_BY, LIBRARIES)
    with (
        ThreadPoolExecutor() as threads,
        tqdm(total=len(files), desc="reading photos", disable=None) as bar,
    ):
        for batch in batches(files, _AT_ONCE):
            contents = list(threads.map(sha256, batch))
            recipes = [item_key(**family, photo=content) for content in contents]
            wanted = Wanted(recipes, family, maker)
            known = cache.known(wanted)
            cache.reused += len(known)
            new = [n for n, recipe in enumerate(recipes) if recipe not in known]
            found = list(threads.map(_unreadable, (batch[n] for n in new)))
            good = {recipes[n]: READABLE for n, error in zip(new, found, strict=True) if not error}
            if good:
                cache.keep(wanted, good)
            errors += filter(None, found)
            hashes |= zip(batch, contents, strict=True)
            bar.update(len(batch))
    if errors:
        more = f" (and {len(errors) - 1} more like it)" if len(errors) > 1 else ""
        raise BobError(f"{errors[0]}{more}")
    return hashes


def _unreadable(path: Path) -> BobError | None:
    """What is wrong with a photo, if anything is."""
    try:
        open_image(path)
    except BobError as error:
        return error
    return None


def _check_parts(folder: Path, photos: dict[str, dict[str, list[Photo]]]) -> None:
    """Check contents across classes and parts; drops second copies within a class, in place."""
    seen: dict[str, tuple[str, Photo]] = {}
    doubles: list[str] = []
    for part, classes in photos.items():
        for class_name, members in classes.items():
            if class_name not in photos["train"]:
                raise BobError(
                    f"{folder}/{part}: class {class_name!r} is not in {folder}/train; add it there "
                    "or remove it"
                )
            kept = []
            for photo in members:
                other_part, other = seen.setdefault(photo.sha256, (part, photo))
                if other is photo:
                    kept.append(photo)
                elif other_part != part:
                    raise BobError(
                        f"{photo.path} is the same image as {other.path}: accuracy on it would be "
                        "a lie; remove one of them"
                    )
                elif other.class_name != class_name:
                    raise BobError(
                        f"{photo.path} is the same image as {other.path} of another class; remove "
                        "the one that is wrong"
                    )
                else:
                    doubles.append(photo.path)
            members[:] = kept
        missing = photos["train"].keys() - classes.keys()
        if missing:
            _warn(f"{folder}/{part} has no photo of class {_some(map(repr, sorted(missing)))}")
    if doubles:
        _warn(f"left out, being second copies within their class: {_some(doubles)}")


def _ranked(photos: Iterable[Photo], salt: str) -> list[Photo]:
    return sorted(
        photos,
        key=lambda photo: hashlib.sha256(f"{salt}:{photo.sha256}".encode()).digest(),
    )


def _by_path(photo: Photo) -> str:
    return photo.path


def _some(items: Iterable[str], limit: int = 5) -> str:
    listed = list(items)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def _warn(message: str) -> None:
    tell(f"split: warning: {message}")
