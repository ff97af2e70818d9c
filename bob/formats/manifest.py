"""The manifest of the generated set: what was asked for, image by image.

It is the `metadata.jsonl` of an image folder as Hugging Face `datasets` loads it: `file_name` is
the image, each other key a column.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

from bob.errors import BobError
from bob.formats.files import read_jsonl, write_jsonl
from bob.formats.layout import GENERATED
from bob.formats.prompts import Context
from bob.formats.schemas import check

_WORDS = {"anyOf": [{"type": "string"}, {"const": None}]}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["class", "background", "pose", "prompt", "seed", "file_name", "recipe"],
    "properties": {
        "class": {"type": "string"},
        "background": _WORDS,
        "pose": _WORDS,
        "prompt": {"type": "string"},
        "seed": {"type": "integer"},
        "file_name": {
            "type": "string",
            "pattern": r"^(?!/)(?!(.*/)?\.\.(/|$))(.*/)?\d+\.\w+$",
            "description": "<folder>/<number>.<suffix>, in the manifest's folder",
        },
        "recipe": {"type": "string"},
    },
}


@dataclass(frozen=True)
class Generated:
    """One generated image."""

    class_name: str
    context: Context | None
    prompt: str
    seed: int
    """Of the initial noise."""
    file: str
    """Relative to the manifest's folder."""
    recipe: str = ""
    """Of the image's item, by which a verdict names it; empty where it is no item."""

    @property
    def number(self) -> int:
        """Its number in its class, after which its file is named."""
        return int(PurePosixPath(self.file).stem)


def passed_over_of(images: Sequence[Generated]) -> Counter[str]:
    """How many images of each class were rejected before its last, if any.

    Their numbers are missing among those of the images.
    """
    last = {image.class_name: image.number for image in images}
    counts = Counter(image.class_name for image in images)
    return +Counter({name: number + 1 - counts[name] for name, number in last.items()})


def write_manifest(path: Path, images: Iterable[Generated]) -> None:
    """Write the manifest, one image a line."""
    write_jsonl(
        path,
        (
            {
                "class": image.class_name,
                "background": image.context.background if image.context else None,
                "pose": image.context.pose if image.context else None,
                "prompt": image.prompt,
                "seed": image.seed,
                "file_name": image.file,
                "recipe": image.recipe,
            }
            for image in images
        ),
    )


def read_manifest(path: Path = GENERATED) -> list[Generated]:
    """Read the manifest; an empty one is a generated set without images."""
    return [
        Generated(
            row["class"],
            None if row["background"] is None else Context(row["background"], row["pose"]),
            row["prompt"],
            row["seed"],
            row["file_name"],
            row["recipe"],
        )
        for row in read_jsonl(path, partial(check, rules=SCHEMA))
    ]


def check_files(path: Path) -> None:
    """Raise BobError unless the files beside a manifest are the images that it lists, each once."""
    listed = sorted(image.file for image in read_manifest(path))
    there = sorted(
        file.relative_to(path.parent).as_posix()
        for file in path.parent.rglob("*")
        if file.is_file() and file != path
    )
    if listed != there:
        wrong = set(listed) ^ set(there) or {one for one, two in pairwise(listed) if one == two}
        raise BobError(f"{path.name} and the images of the generated set differ: {min(wrong)}")
