"""Prompts, contexts and the caption bank (paper: caption bank, preservation, marginalization)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bob.errors import BobError
from bob.formats.files import read_jsonl, write_jsonl
from bob.formats.params import check

ATTRIBUTES = ("background", "pose")

_TEXT = {"type": "string", "pattern": r"\S", "description": "a text that is not blank"}
CONTEXT_SCHEMA: dict[str, Any] = {  # other keys are let be
    "type": "object",
    "required": list(ATTRIBUTES),
    "properties": dict.fromkeys(ATTRIBUTES, _TEXT),
}
_NO_CONTEXT = {key: {"const": None} for key in ATTRIBUTES}
BANK_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["image", "class", *ATTRIBUTES],
    "properties": {
        "image": {**_TEXT, "description": "the SHA-256 of a photo"},
        "class": _TEXT,
        **{key: {"anyOf": [_TEXT, {"const": None}]} for key in ATTRIBUTES},
    },
    # Both or none: half a context is no prompt.
    "if": {"properties": _NO_CONTEXT},
    "else": {"properties": dict.fromkeys(ATTRIBUTES, _TEXT)},
}

QUESTION = (
    "describe the {attribute} of the {descriptor} in as few words as possible. "
    "Refer to the {descriptor} as simply 'a {descriptor}'"
)


@dataclass(frozen=True, order=True)
class Context:
    """What an image shows besides its class: a (background, pose) pair, each a short phrase."""

    background: str
    pose: str


@dataclass(frozen=True)
class Entry:
    """One entry of the caption bank: the context of one real training photo."""

    image: str
    """SHA-256 of the photo's file."""
    class_name: str
    context: Context | None
    """None where the captioner gave no usable answer; such an entry is never drawn from."""


def prompt(descriptor: str, class_name: str, context: Context | None = None) -> str:
    """The caption of a training image and the prompt of a generated one: one template for both.

    `a [descriptor] photo of a [classname] in the [background] background with the [pose] pose`;
    without a context it ends after the class name.
    """
    subject = f"a {descriptor} photo of a {class_name}"
    if context is None:
        return subject
    return f"{subject} in the {context.background} background with the {context.pose} pose"


def write_bank(path: Path, entries: Iterable[Entry]) -> None:
    """Write the caption bank, one entry a line."""
    write_jsonl(
        path,
        (
            {
                "image": entry.image,
                "class": entry.class_name,
                "background": entry.context.background if entry.context else None,
                "pose": entry.context.pose if entry.context else None,
            }
            for entry in entries
        ),
    )


def read_bank(path: Path) -> list[Entry]:
    """Read a caption bank; raises BobError naming the line that is no entry, or another's photo."""
    where: dict[str, str] = {}

    def check_entry(line: str, row: dict[str, Any]) -> None:
        check(line, row, BANK_SCHEMA)
        if row["image"] in where:
            raise BobError(f"{line}: the photo of {where[row['image']]} again; remove one of them")
        where[row["image"]] = line.removeprefix(f"{path}, ")

    return [
        Entry(
            row["image"],
            row["class"],
            None if row["background"] is None else Context(row["background"], row["pose"]),
        )
        for row in read_jsonl(path, check_entry)
    ]


def read_contexts(path: Path) -> list[Context]:
    """Read a user's file of contexts: JSON lines with the keys "background" and "pose".

    Other keys are let be, so that the caption bank of another dataset will do. Raises BobError
    naming the line.
    """
    rows = read_jsonl(path, partial(check, rules=CONTEXT_SCHEMA))
    contexts = [Context(row["background"].strip(), row["pose"].strip()) for row in rows]
    if not contexts:
        raise BobError(f"{path} holds no context; write at least one line")
    return contexts


def drawn_from(source: str, bank: Sequence[Entry], class_name: str) -> list[Context | None]:
    """The pool that the context of a generated image of `class_name` is drawn from, uniformly.

    `bank` is the paper's context marginalization, P(X | do(Y)) = sum_Z P(X | Y, Z) P(Z): the pairs
    of all training photos, whatever the class. `class` keeps the pairs of the class's own photos,
    `none` gives the prompt without context, anything else is a file of contexts.

    Raises BobError where there is nothing to draw from.
    """
    if source == "none":
        return [None]
    if source not in ("bank", "class"):
        return list(read_contexts(Path(source)))
    pool: list[Context | None] = [
        entry.context
        for entry in bank
        if entry.context is not None and (source == "bank" or entry.class_name == class_name)
    ]
    if not pool:
        whose = f"class {class_name!r}" if source == "class" else "the caption bank"
        raise BobError(
            f"{whose} has no context to draw from: the captioner gave no usable answer; try "
            "another caption.model, or generate.context: none"
        )
    return pool
