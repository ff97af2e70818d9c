"""What people have decided about generated images: `data/review/*.jsonl`, a line an image.

An image is named by its recipe, so a verdict holds for as long as that image would come back: over
code, other parameters and back, other branches. The lines are sorted, so that git merges them; its
`union` driver keeps both sides' lines (`data/review/.gitattributes`). Where an image then has two
verdicts, in one file or in two, it is rejected.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bob.errors import BobError
from bob.formats.files import locked, read_jsonl, write_jsonl
from bob.formats.layout import REVIEW

REJECT, KEEP = "reject", "keep"
_KEYS = {"class", "file", "recipe", "verdict"}
_RECIPE = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Verdict:
    """What was decided about one image."""

    recipe: str
    verdict: str
    """REJECT: another takes its place. KEEP: it was looked at; decides nothing."""
    class_name: str
    file: str
    """As the manifest had it; class and file are for people who read the line."""


def read_verdicts(folder: Path = REVIEW) -> dict[str, Verdict]:
    """Recipe -> verdict, by all files in the folder; raises BobError naming a line that is none."""
    verdicts: dict[str, Verdict] = {}
    for path in _files(folder):
        for recipe, one in _read(path).items():
            verdicts[recipe] = _stricter(verdicts.get(recipe), one)
    return verdicts


def _files(folder: Path) -> list[Path]:
    """The files of verdicts. `glob` would take a folder that may not be read for an empty one."""
    inside = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in inside if path.suffix == ".jsonl")


def rejected(folder: Path = REVIEW) -> frozenset[str]:
    """The recipes of the images that are rejected."""
    return rejections(read_verdicts(folder).values())


def rejections(verdicts: Iterable[Verdict]) -> frozenset[str]:
    """The recipes of those that these verdicts reject."""
    return frozenset(one.recipe for one in verdicts if one.verdict == REJECT)


def decide(changes: Mapping[str, Verdict | None], path: Path) -> list[Path]:
    """Write these verdicts, recipe -> verdict, to the file at `path`; None takes one back.

    What another file of the folder says otherwise of these images goes, or a rejection there could
    not be taken back. Several processes and threads may do this at once, and one may be killed:
    every file is whole, with all verdicts of those that have returned. A file without verdicts is
    removed, so that the folder is as before. Returns the files that are now other ones.
    """
    with locked(path.parent):
        others = [file for file in _files(path.parent) if file != path]
        # The new verdict first: killed before the old one has gone, a rejection still counts.
        return [file for file in (path, *others) if _change(file, changes, adding=file == path)]


def _change(path: Path, changes: Mapping[str, Verdict | None], *, adding: bool) -> bool:
    """Whether the file is now another one."""
    before = _read(path) if path.exists() else {}
    after = {
        recipe: one
        for recipe, one in before.items()
        if recipe not in changes or _says(changes[recipe], one.verdict)
    }
    if adding:
        after |= {recipe: one for recipe, one in changes.items() if one is not None}
    if after == before:
        return False
    if after:
        _write(path, after.values())
    else:
        path.unlink()
    return True


def _says(new: Verdict | None, verdict: str) -> bool:
    return new is not None and new.verdict == verdict


def _stricter(one: Verdict | None, other: Verdict) -> Verdict:
    return one if one is not None and one.verdict == REJECT else other


def _write(path: Path, verdicts: Iterable[Verdict]) -> None:
    write_jsonl(
        path,
        (
            {
                "class": one.class_name,
                "file": one.file,
                "recipe": one.recipe,
                "verdict": one.verdict,
            }
            for one in sorted(verdicts, key=lambda one: one.recipe)
        ),
    )


def _read(path: Path) -> dict[str, Verdict]:
    try:
        rows = read_jsonl(path)
    except BobError as error:
        raise BobError(f"{error}; mend the line, or `git checkout` the file") from None
    verdicts: dict[str, Verdict] = {}
    for number, row in enumerate(rows, start=1):
        if not _is_verdict(row):
            raise BobError(
                f'{path}, line {number}: a verdict has the texts "class", "file", "recipe" (64 hex '
                f'digits) and "verdict" ({REJECT} or {KEEP}); mend or remove the line'
            )
        one = Verdict(row["recipe"], row["verdict"], row["class"], row["file"])
        verdicts[one.recipe] = _stricter(verdicts.get(one.recipe), one)
    return verdicts


def _is_verdict(row: Mapping[str, object]) -> bool:
    return (
        row.keys() == _KEYS
        and all(isinstance(value, str) for value in row.values())
        and row["verdict"] in (REJECT, KEEP)
        and bool(_RECIPE.fullmatch(str(row["recipe"])))
    )
