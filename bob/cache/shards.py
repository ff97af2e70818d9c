"""Shards: parts of an index of items, as the immutable files that a team's remote keeps.

A shard is JSON, one value a line, packed with gzip and named by the SHA-256 of its bytes. Its first
line has what its items rest on (makers, families, trials), every other is one item:
`[recipe, md5, bytes, maker, stage]`, the last two as places in the first line's lists.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from bob.cache.index import Row, Trial
from bob.cache.recipe import Maker
from bob.errors import BobError
from bob.formats.files import sha256

FORMAT = 1
ROWS = 100_000
"""Items of a shard, at most: about 6 MB."""
SUFFIX = ".jsonl.gz"
_RECIPE, _OID = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{32}")
_STAGE = re.compile(r"[\w-]+")
_LEVEL = 6
_WRONG = (ValueError, TypeError, LookupError, AttributeError, EOFError, OSError, zlib.error)


@dataclass(frozen=True)
class Family:
    """A family of items, which one stage makes."""

    id: str
    stage: str
    parts: Mapping[str, Any]


@dataclass(frozen=True)
class Evidence:
    """A trial in a family, and the recipes of the items that were compared."""

    family: str
    trial: Trial
    recipes: Sequence[str]


@dataclass(frozen=True)
class Basis:
    """What items rest on."""

    makers: Mapping[str, Maker | None]
    """Id -> maker; None where its parts are not known."""
    families: Sequence[Family] = ()
    trials: Sequence[Evidence] = ()


@dataclass(frozen=True)
class Shard:
    """Items, which can be read once, and what they rest on."""

    basis: Basis
    rows: Iterable[Row]


def write_shard(folder: Path, basis: Basis, rows: Sequence[Row]) -> Path:
    """Write a shard into a folder; the same items and basis give the same bytes and name."""
    makers = sorted(basis.makers)
    stages = sorted({row.stage for row in rows})
    header = {
        "bob": FORMAT,
        "makers": [[id, maker and maker.parts] for id, maker in sorted(basis.makers.items())],
        "stages": stages,
        "families": sorted([one.id, one.stage, one.parts] for one in basis.families),
        "trials": sorted(
            [one.family, *astuple(one.trial), list(one.recipes)] for one in basis.trials
        ),
    }
    number = {name: place for names in (makers, stages) for place, name in enumerate(names)}
    draft = folder / "draft"
    with draft.open("wb") as file, gzip.GzipFile("", "wb", _LEVEL, file, mtime=0) as packed:
        packed.write(_line(header))
        for row in rows:
            packed.write(
                _line([row.recipe, row.oid, row.size, number[row.maker], number[row.stage]])
            )
    return draft.rename(folder / f"{sha256(draft)}{SUFFIX}")


def _line(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode() + b"\n"


def read_shard(path: Path) -> Shard:
    """Open a shard, whose rows are read as they are wanted.

    Raises BobError where it is none, or of a later format; the rows may raise it, too.
    """
    lines = _lines(path)
    header: Any = next(lines, None)
    with _named(path):
        if header["bob"] > FORMAT:
            raise BobError(f"{path.name} was made by a later version of bob; use that one")
        makers = {_checked(_RECIPE, id): parts and Maker(**parts) for id, parts in header["makers"]}
        if any(maker and maker.id != id for id, maker in makers.items()):
            raise ValueError("a maker under another's name")
        families = [Family(*values) for values in header["families"]]
        trials = [
            Evidence(family, Trial(one, other, int(equal), int(compared)), list(recipes))
            for family, one, other, equal, compared, recipes in header["trials"]
        ]
        stages = [_checked(_STAGE, stage) for stage in header["stages"]]
    return Shard(Basis(makers, families, trials), _rows(path, lines, list(makers), stages))


def _rows(
    path: Path, lines: Iterator[Any], makers: Sequence[str], stages: Sequence[str]
) -> Iterator[Row]:
    with _named(path):
        for recipe, oid, size, maker, stage in lines:
            # An object's name becomes a path.
            _checked(_RECIPE, recipe), _checked(_OID, oid)
            yield Row(recipe, makers[maker], oid, int(size), stages[stage])


def _lines(path: Path) -> Iterator[Any]:
    with _named(path), gzip.open(path, "rb") as file:
        for line in file:
            yield json.loads(line)


def _checked(pattern: re.Pattern[str], text: str) -> str:
    if not pattern.fullmatch(text):
        raise ValueError(f"found {text!r}")
    return text


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Raise what is wrong in a shard as a BobError that names it."""
    try:
        yield
    except _WRONG as error:
        raise BobError(f"{path.name} is no shard of items: {error}") from None
