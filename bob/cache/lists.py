"""The lists of the items that a stage used, `results/items/<stage>.jsonl`."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bob.formats.files import read_jsonl, write_jsonl
from bob.formats.params import check

_HASH = {"type": "string", "pattern": "^[0-9a-f]{64}$", "description": "64 hex digits"}
ITEM_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["recipe", "maker", "md5"],
    "properties": {
        "recipe": _HASH,
        "maker": _HASH,
        "md5": {"type": "string", "pattern": "^[0-9a-f]{32}$", "description": "32 hex digits"},
        "file": {"type": "string"},
        "text": {"type": "string"},
    },
}


@dataclass(frozen=True)
class Item:
    """One line of `results/items/<stage>.jsonl`, which is what `bob cache adopt` goes by."""

    recipe: str
    maker: str
    """Who really made it."""
    oid: str
    file: str | None = None
    """Where the item lies, relative to the project root."""
    text: str | None = None
    """The item itself, where it is a text and no file of the stage's output."""


def write_items(path: Path, items: Iterable[Item]) -> None:
    """Write a stage's list of items, one a line."""

    def lines() -> Iterator[dict[str, Any]]:
        for item in items:
            line = {
                "recipe": item.recipe,
                "maker": item.maker,
                "md5": item.oid,
                "file": item.file,
                "text": item.text,
            }
            yield {name: value for name, value in line.items() if value is not None}

    write_jsonl(path, lines())


def read_items(path: Path) -> list[Item]:
    """Read a stage's list of items; raises BobError naming the line that is no item."""
    return [
        Item(line["recipe"], line["maker"], line["md5"], line.get("file"), line.get("text"))
        for line in read_jsonl(path, partial(check, rules=ITEM_SCHEMA))
    ]
