"""The lists of the items that a stage used, `results/items/<stage>.jsonl`."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bob.errors import BobError
from bob.formats.files import read_jsonl, write_jsonl


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
    items = []
    for number, line in enumerate(read_jsonl(path), start=1):
        item = Item(
            str(line.get("recipe")),
            str(line.get("maker")),
            str(line.get("md5")),
            line.get("file"),
            line.get("text"),
        )
        if not (_is_hex(item.recipe, 64) and _is_hex(item.maker, 64) and _is_hex(item.oid, 32)):
            raise BobError(f"{path}, line {number}: not an item of a stage, found {line}")
        items.append(item)
    return items


def _is_hex(text: str, length: int) -> bool:
    return len(text) == length and not set(text) - set("0123456789abcdef")
