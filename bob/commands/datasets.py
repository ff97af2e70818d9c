"""`bob dataset`: a public benchmark with its official split, in bob's layout, tracked by DVC."""

import os
import shutil
import tarfile
import tempfile
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from torchvision.datasets import FGVCAircraft, Flowers102, OxfordIIITPet, StanfordCars
from torchvision.datasets.utils import download_and_extract_archive
from tqdm import tqdm

from bob.commands.fetch import check_free, track
from bob.errors import NAME, BobError, shown, tell
from bob.formats.files import replacing, sha256
from bob.formats.names import class_name_of, folder_of

Parts = dict[str, list[tuple[Path, str]]]
"""By part (train, test, maybe val): its photos, each with the name of its class."""

CUB_URL = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
CUB_MD5 = "97eceeb196236b17998738112f37df78"

# Published archives hold a tenth of that, published lists a thousandth of what is read.
UNPACKED, FILES, LIST = 20_000_000_000, 1_000_000, 10_000_000  # bytes, files, bytes of a list
LISTS = (".txt", ".mat")


@dataclass(frozen=True)
class Benchmark:
    """A public dataset as its authors published it."""

    descriptor: str
    folder: str
    """Holds `entries` when everything is unpacked, below the root that `read` is given."""
    files: tuple[str, ...]
    """What was published."""
    entries: tuple[str, ...]
    """What is read: in the folder, after the files are unpacked."""
    read: Callable[[Path, bool], Parts]
    """Of (root, download): lists the photos, after downloading and unpacking if `download`."""


def _listed(reader: Callable[..., Any], parts: Sequence[str], root: Path, download: bool) -> Parts:
    """What a torchvision dataset lists in each part."""
    listed = {}
    for part in parts:
        # A loader that loads nothing: paths come in place of decoded images.
        photos = reader(root, part, download=download, loader=Path)
        listed[part] = [(photo, photos.classes[label]) for photo, label in photos]
    return listed


def _pets(root: Path, download: bool) -> Parts:
    parts = {}
    for part, published in (("train", "trainval"), ("test", "test")):
        pets = OxfordIIITPet(root, published, download=download)
        # This one takes no loader.
        parts[part] = [
            (photo, pets.classes[label])
            for photo, label in zip(pets._images, pets._labels, strict=True)
        ]
    return parts


def _cub(root: Path, download: bool) -> Parts:
    if download:
        download_and_extract_archive(CUB_URL, root, md5=CUB_MD5)
    folder = root / "CUB_200_2011"

    def table(name: str) -> dict[str, str]:
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
        return dict(line.split() for line in lines)

    classes, labels, in_train = map(
        table, ("classes.txt", "image_class_labels.txt", "train_test_split.txt")
    )
    parts: Parts = {"train": [], "test": []}
    for image, file in table("images.txt").items():
        _, class_folder = classes[labels[image]].split(".", 1)  # "018.Spotted_Catbird"
        part = "train" if in_train[image] == "1" else "test"
        parts[part].append((folder / "images" / file, class_name_of(class_folder)))
    return parts


BENCHMARKS = {
    "aircraft": Benchmark(
        "aircraft",
        "fgvc-aircraft-2013b",
        files=("fgvc-aircraft-2013b.tar.gz",),
        entries=("data",),
        read=partial(_listed, FGVCAircraft, ("train", "val", "test")),
    ),
    "cars": Benchmark(
        "car",
        "stanford_cars",
        files=(
            "cars_train.tgz",
            "cars_test.tgz",
            "car_devkit.tgz",
            "cars_test_annos_withlabels.mat",
        ),
        entries=("cars_train", "cars_test", "devkit", "cars_test_annos_withlabels.mat"),
        read=partial(_listed, StanfordCars, ("train", "test")),
    ),
    "cub": Benchmark(
        "bird",
        "CUB_200_2011",
        files=("CUB_200_2011.tgz",),
        entries=(
            "images",
            "images.txt",
            "classes.txt",
            "image_class_labels.txt",
            "train_test_split.txt",
        ),
        read=_cub,
    ),
    "pets": Benchmark(
        "pet",
        "oxford-iiit-pet",
        files=("images.tar.gz", "annotations.tar.gz"),
        entries=("images", "annotations"),
        read=_pets,
    ),
    "flowers": Benchmark(
        "flower",
        "flowers-102",
        files=("102flowers.tgz", "imagelabels.mat", "setid.mat"),
        entries=("jpg", "imagelabels.mat", "setid.mat"),
        read=partial(_listed, Flowers102, ("train", "val", "test")),
    ),
}


def dataset(name: str, source: Path | None, folder: Path) -> None:
    """Write the benchmark `name` to `folder` ("data/<name>") and `dvc add` it.

    `source` is the published archive, or a folder with the published files, packed or unpacked;
    nothing in it is changed. Without one the files are downloaded.

    Raises BobError where the folder is taken or not in data/, a file cannot be had or is not as
    published, or a photo of the official lists is missing.
    """
    check_free(folder, "data")
    benchmark = BENCHMARKS[name]
    with replacing(folder) as draft:
        # Archives are unpacked here and not in /tmp, which may be too small for gigabytes.
        with tempfile.TemporaryDirectory(dir=draft) as scratch:
            root = Path(scratch)
            if source is None:
                parts = _download(name, benchmark, root)
            else:
                parts = _read(source, name, benchmark, root)
            _check_classes(name, parts)
            parts = _distinct(parts, root, benchmark)
            _copy(parts, draft)
        _write_about(draft / "dataset.yaml", benchmark.descriptor, parts)
    classes = {class_name for photos in parts.values() for _, class_name in photos}
    counts = ", ".join(f"{len(photos)} {part}" for part, photos in parts.items())
    print(f"{shown(folder)}: {len(classes)} classes of {benchmark.descriptor}; photos: {counts}")
    track(folder)


def _download(name: str, benchmark: Benchmark, root: Path) -> Parts:
    try:
        return benchmark.read(root, True)
    except MemoryError:
        raise
    except Exception as error:  # of connections, archives and lists, by several libraries
        raise BobError(
            f"{name} could not be downloaded ({_reason(error)}); put {_all(benchmark.files)}, or "
            f"what they hold, into a folder and say: bob dataset {name} --from FOLDER"
        ) from None


def _read(source: Path, name: str, benchmark: Benchmark, root: Path) -> Parts:
    if not (source.is_dir() or source.is_file()):
        raise BobError(f"{source} is neither a folder nor a file; --from names where {name} is")
    try:
        _gather(source, name, benchmark, root)
        return benchmark.read(root, False)
    except (BobError, MemoryError):
        raise
    except Exception as error:  # damaged archives and lists lead their readers to anything
        reason = _reason(error).replace(f"{root}/", "")
        raise BobError(f"{name} cannot be read from {source}: {reason}") from None


def _gather(source: Path, name: str, benchmark: Benchmark, root: Path) -> None:
    """Link the benchmark's entries into its folder below `root`, unpacked if they are not yet."""
    unpacked = root / "unpacked"
    places = [source, source / benchmark.folder, unpacked, unpacked / benchmark.folder]

    def find(entry: str) -> Path | None:
        return next((place / entry for place in places if (place / entry).exists()), None)

    archives = [source]
    if source.is_dir():
        packed = [source / file for file in benchmark.files if not file.endswith(".mat")]
        archives = [] if all(map(find, benchmark.entries)) else [p for p in packed if p.is_file()]
    for archive in archives:
        _unpack(archive, unpacked)

    (root / benchmark.folder).mkdir()
    for entry in benchmark.entries:
        found = find(entry)
        if found is None:
            raise BobError(
                f"{source} has no {entry}; {name} needs {_all(benchmark.files)}, or what they "
                "hold, in one folder"
            )
        (root / benchmark.folder / entry).symlink_to(found.absolute())
        for file in (found, *found.glob("*")):
            if file.suffix in LISTS and file.stat().st_size > LIST:
                raise ValueError(f"{file.name} has more than {LIST:,} bytes")


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack the plain files of a tar archive; no link of any kind, and no device, is made.

    Raises ValueError for a file that would be outside `folder`, and where there is more than
    published archives hold. Not by `extractall`, whose safe filter Python has only since 3.11.4.
    """
    size = 0
    with tarfile.open(archive) as tar:
        for number, member in enumerate(tar, start=1):
            size += member.size
            if size > UNPACKED or number > FILES:
                raise ValueError(f"it unpacks to over {UNPACKED:,} bytes or {FILES:,} files")
            target = folder / member.name
            if not target.resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"{member.name} would be written outside the destination")
            content = tar.extractfile(member) if member.isfile() else None
            if content is not None:
                target.parent.mkdir(parents=True, exist_ok=True)
                with content, target.open("wb") as file:
                    shutil.copyfileobj(content, file)


def _check_classes(name: str, parts: Parts) -> None:
    """Raise BobError for a class that `split` would not read from the folder that is written."""
    classes = sorted({class_name for photos in parts.values() for _, class_name in photos})
    spelled: dict[str, str] = {}
    for class_name in classes:
        words = unicodedata.normalize("NFC", " ".join(class_name.split()))
        if not (words and words.isprintable() and len(os.fsencode(folder_of(class_name))) <= NAME):
            raise BobError(
                f"{name}: its lists name a class {class_name!r}; a class's name is a line of at "
                f"most {NAME} letters"
            )
        if words in spelled:
            raise BobError(
                f"{name}: its lists spell one class twice, {spelled[words]!r} and {class_name!r}"
            )
        spelled[words] = class_name


def _distinct(parts: Parts, root: Path, benchmark: Benchmark) -> Parts:
    """The parts without the photos whose content another one has; warns of those.

    `split` refuses one image in two parts or classes. Test photos have precedence, so that accuracy
    on test can be compared with what is published. Raises BobError naming a photo that is missing,
    or lies elsewhere than in the benchmark's entries, wherever a list or a link leads.
    """
    inside = [(root / benchmark.folder / entry).resolve() for entry in benchmark.entries]
    first: dict[str, Path] = {}
    kept: Parts = {part: [] for part in parts}
    copies = []
    ordered = [(part, *photo) for part in ("test", "val", "train") for photo in parts.get(part, [])]
    for part, photo, class_name in tqdm(ordered, "reading photos", disable=None):
        listed = Path(os.path.relpath(photo, root))
        if not any(photo.resolve().is_relative_to(entry) for entry in inside):
            raise BobError(
                f"{listed}, which the official list of {part} names, is or leads outside of "
                f"{_all(benchmark.entries)}; put a copy of the photo there, or correct the list"
            )
        if not photo.is_file():
            raise BobError(f"{listed} is missing, which the official list of {part} names")
        other = first.setdefault(sha256(photo), listed)
        if other is listed:
            kept[part].append((photo, class_name))
        else:
            copies.append(f"{listed} of {part} (is {other})")
    if copies:
        tell(f"dataset: warning: left out, being copies: {', '.join(copies)}")
    return kept


def _copy(parts: Parts, folder: Path) -> None:
    """Copy the photos to `<folder>/<part>/<class folder>/`; the second of a name gets a number."""
    for part, photos in parts.items():
        for photo, class_name in tqdm(photos, f"copying {part}", disable=None):
            copy = folder / part / folder_of(class_name) / photo.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            names = (copy.with_stem(f"{photo.stem}-{number}") for number in count(2))
            shutil.copyfile(photo, next(path for path in chain([copy], names) if not path.exists()))


def _write_about(path: Path, descriptor: str, parts: Parts) -> None:
    """Write dataset.yaml: the descriptor, and the names that the class folders cannot spell."""
    classes = sorted({class_name for photos in parts.values() for _, class_name in photos})
    names = {folder_of(name): name for name in classes if class_name_of(folder_of(name)) != name}
    with path.open("w", encoding="utf-8") as file:
        YAML().dump({"descriptor": descriptor} | ({"classes": names} if names else {}), file)


def _all(files: tuple[str, ...]) -> str:
    return " and ".join(filter(None, [", ".join(files[:-1]), files[-1]]))


def _reason(error: Exception) -> str:
    words = f"{error} is not in every list" if isinstance(error, KeyError) else str(error)
    return " ".join(words.split()) or type(error).__name__
