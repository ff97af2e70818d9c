"""Photos: a split's manifest of them, and reading one from disk."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image, ImageOps, UnidentifiedImageError

from bob.errors import BobError, shown
from bob.formats.files import read_json, read_jsonl, write_json, write_jsonl
from bob.formats.layout import CLASSES
from bob.formats.params import check

# Pillow's others are not asked, whatever a file is called: that for EPS starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
# Grey of 16 or 32 bits, or of floats, which Pillow would cut off at 255: most of it is white then.
DEEP = ("I", "F")

_TEXT = {"type": "string", "pattern": r"\S", "description": "a text that is not blank"}
_PHOTO = {"path": _TEXT, "class_name": _TEXT, "sha256": {"type": "string"}}
PHOTO_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": list(_PHOTO),
    "additionalProperties": False,
    "properties": _PHOTO,
}
TASK_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["descriptor", "classes"],
    "properties": {
        "descriptor": _TEXT,
        "classes": {"type": "array", "items": _TEXT, "description": "a list of names"},
    },
}

T = TypeVar("T")


@dataclass(frozen=True)
class Photo:
    """One real image of a split."""

    path: str
    """Relative to the project root."""
    class_name: str
    """As it stands in a prompt: "Anna Hummingbird"."""
    sha256: str
    """Of the file's bytes."""


@dataclass(frozen=True)
class Task:
    """What is to be told apart."""

    descriptor: str
    """The generic noun of all classes: "aircraft", "bird"."""
    classes: tuple[str, ...]
    """Names as they stand in a prompt, sorted; a class's index here is its label."""


def write_photos(path: Path, photos: Sequence[Photo]) -> None:
    """Write a split's manifest, one photo a line."""
    write_jsonl(path, (asdict(photo) for photo in photos))


def read_photos(path: Path) -> list[Photo]:
    """Read a split's manifest; an empty one is a split without images."""
    return [Photo(**row) for row in read_jsonl(path, partial(check, rules=PHOTO_SCHEMA))]


def write_task(path: Path, task: Task) -> None:
    """Write the descriptor and the class names."""
    write_json(path, {"descriptor": task.descriptor, "classes": list(task.classes)})


def read_task(path: Path = CLASSES) -> Task:
    """Read the descriptor and the class names."""
    value = read_json(path)
    check(path, value, TASK_SCHEMA)
    return Task(value["descriptor"], tuple(value["classes"]))


def open_image(path: str | Path) -> Image.Image:
    """Decode an image completely, upright, as RGB.

    Raises BobError naming the file where it is truncated, of another format than FORMATS, too large
    to be a photo (Pillow's limit, 179 megapixels), or has more than 8 bits a channel in a mode that
    Pillow would clip to white.
    """
    with _opened(path) as image:
        if image.mode.startswith(DEEP):
            raise ValueError(f"its pixels are of mode {image.mode}; save it with 8 bits a channel")
        # A palette or an alpha channel would otherwise become black where it is transparent.
        upright = ImageOps.exif_transpose(image)
        if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
            upright = upright.convert("RGBA")
            canvas = Image.new("RGBA", upright.size, "white")
            upright = Image.alpha_composite(canvas, upright)
        return upright.convert("RGB")


def size_of(path: str | Path) -> tuple[int, int]:
    """Width and height of an image, without decoding it; raises as `open_image` does."""
    with _opened(path) as image:
        return image.size


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except FileNotFoundError:
        raise BobError(f"{path} is missing; `dvc checkout` brings tracked files back") from None
    except UnidentifiedImageError:
        raise BobError(
            f"{path} cannot be read as an image (none of {', '.join(FORMATS)}); replace or remove "
            "it"
        ) from None
    except Exception as error:  # decoders raise whatever broken bytes lead them to
        reason = shown(" ".join(str(error).split()) or type(error).__name__)
        raise BobError(
            f"{path} cannot be read as an image ({reason}); replace or remove it"
        ) from None


def batches(items: Sequence[T], size: int) -> Iterator[list[T]]:
    """Cut `items` into lists of `size`; the last may be shorter."""
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
