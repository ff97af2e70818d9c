"""What the page reads and writes: verdicts, captions, and images that are no longer there."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from bob.cache.items import ItemCache
from bob.commands.look import captions
from bob.commands.look.pages import INDEX
from bob.dvc.store import ObjectStore
from bob.errors import BobError
from bob.formats import params
from bob.formats.layout import GENERATED, REVIEW, TRAIN
from bob.formats.manifest import Generated, read_manifest
from bob.formats.photos import read_photos, read_task
from bob.formats.prompts import Context
from bob.formats.review import KEEP, REJECT, Verdict, decide, read_verdicts

ITEM = "/api/image/"
_SHAPE = (
    'a JSON object is expected with "verdicts", recipe -> "reject", "keep" or null, and '
    '"captions", SHA-256 -> {"background", "pose"}'
)


@dataclass(frozen=True)
class Changes:
    """What was decided on the page."""

    verdicts: Mapping[str, str | None] = field(default_factory=dict)
    """Recipe -> verdict; None takes one back."""
    captions: Mapping[str, Context] = field(default_factory=dict)
    """SHA-256 of a photo -> its context."""

    @classmethod
    def of(cls, body: Any) -> Self:
        """From JSON; raises BobError where it is of another shape, or a caption is refused."""
        verdicts, texts = _part(body, "verdicts"), _part(body, "captions")
        if any(one not in (REJECT, KEEP, None) for one in verdicts.values()):
            raise BobError(_SHAPE)
        for text in texts.values():
            if not isinstance(text, dict) or text.keys() != {"background", "pose"}:
                raise BobError(_SHAPE)
            if not all(isinstance(phrase, str) for phrase in text.values()):
                raise BobError(_SHAPE)
        return cls(verdicts, captions.checked(texts, read_task().classes) if texts else {})


def _part(body: Any, name: str) -> dict[str, Any]:
    part = body.get(name, {}) if isinstance(body, dict) else None
    if not isinstance(part, dict) or body.keys() - {"verdicts", "captions"}:
        raise BobError(_SHAPE)
    return part


class Review:
    """The review of the project in the current folder.

    Raises BobError outside a DVC repository. All methods may be called from several threads.
    """

    def __init__(self) -> None:
        with ItemCache() as cache:
            self._index = cache.index
        with ObjectStore() as store:
            self.objects = store.root
            self._object = store.path
        self._seen: dict[str, Generated] = {}
        self._present: tuple[object, frozenset[str]] = (None, frozenset())

    def state(self) -> dict[str, Any]:
        """What the page is told: see docs/review.md for the parts that are files."""
        values = params.load()
        verdicts, present = read_verdicts(), self._recipes()
        gone = [one for one in verdicts.values() if one.verdict == REJECT]
        gone = [one for one in gone if one.recipe not in present]
        had = self._had([one.recipe for one in gone])
        path = captions.bank_file(values)
        return {
            "version": str(_signature(INDEX)),
            "file": self._file(values).as_posix(),
            "verdicts": {recipe: one.verdict for recipe, one in verdicts.items()},
            "rejected": [
                {
                    "recipe": one.recipe,
                    "class": one.class_name,
                    "file": one.file,
                    "image": f"{ITEM}{one.recipe}" if one.recipe in had else None,
                }
                for one in gone
            ],
            "captions": {
                "file": path.as_posix(),
                "edits": {
                    photo: {"background": context.background, "pose": context.pose}
                    for photo, context in captions.pending(path).items()
                },
            },
        }

    def save(self, changes: Changes) -> list[Path]:
        """Write what was decided; returns the files that were written.

        Raises BobError, and writes nothing, where an image or a photo is not known.
        """
        values, verdicts = params.load(), self.verdicts_of(changes)
        written: list[Path] = []
        if changes.captions:  # first, as more can be wrong with them
            written += captions.save(changes.captions, read_photos(TRAIN))
        if verdicts:
            written += decide(verdicts, self._file(values))
        return written

    def verdicts_of(self, changes: Changes) -> dict[str, Verdict | None]:
        """Recipe -> verdict as it is written; raises BobError for an image that is not known.

        Known are those of the present set and of those before it that were served here, and those
        that have a verdict.
        """
        if not changes.verdicts:
            return {}
        self._recipes()
        saved = read_verdicts()
        verdicts: dict[str, Verdict | None] = {}
        for recipe, verdict in changes.verdicts.items():
            seen, known = self._seen.get(recipe), saved.get(recipe)
            if seen is None and known is None:
                raise BobError(f"{recipe[:64]!r} is no image of {GENERATED}; reload the page")
            if verdict is None:
                verdicts[recipe] = None
            elif seen is not None:
                verdicts[recipe] = Verdict(recipe, verdict, seen.class_name, seen.file)
            elif known is not None:
                verdicts[recipe] = Verdict(recipe, verdict, known.class_name, known.file)
        return verdicts

    def image(self, recipe: str) -> bytes | None:
        """A generated image of the item cache, as PNG; None where it is not here."""
        for path in self._objects_of([recipe]).get(recipe, ()):
            with suppress(OSError):
                return path.read_bytes()
        return None

    def _had(self, recipes: list[str]) -> set[str]:
        found = self._objects_of(recipes)
        return {recipe for recipe, paths in found.items() if any(path.exists() for path in paths)}

    def _objects_of(self, recipes: list[str]) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = {}
        for row in self._index.find(recipes) if recipes else ():
            if row.stage == "generate":
                found.setdefault(row.recipe, []).append(self._object(row.oid))
        return found

    def _recipes(self) -> frozenset[str]:
        """The recipes of the present set; its images are remembered as seen."""
        signature = _signature(GENERATED)
        if signature != self._present[0]:
            try:
                images = read_manifest() if signature else []
            except BobError:  # it has just gone, or is of an earlier version of bob
                images = []
            self._seen |= {image.recipe: image for image in images if image.recipe}
            self._present = signature, frozenset(image.recipe for image in images)
        return self._present[1]

    @staticmethod
    def _file(values: Mapping[str, Mapping[str, str]]) -> Path:
        return REVIEW / f"{values['data']['name']}.jsonl"


def _signature(path: Path) -> tuple[int, int] | None:
    """Another one when the file is made anew; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
