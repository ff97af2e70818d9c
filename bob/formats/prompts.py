"""Prompts, contexts and the caption bank (paper: caption bank, preservation, marginalization)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bob.errors import BobError
from bob.formats.files import read_jsonl, write_jsonl

ATTRIBUTES = ("background", "pose")

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
    """Read the caption bank."""
    try:
        return [
            Entry(
                row["image"],
                row["class"],
                None if row["background"] is None else Context(row["background"], row["pose"]),
            )
            for row in read_jsonl(path)
        ]
    except KeyError as error:
        raise BobError(f"{path}: an entry has no {error}; `dvc repro caption` makes it") from None


def read_contexts(path: Path) -> list[Context]:
    """Read a user's file of contexts: JSON lines with the keys "background" and "pose".

    Other keys are let be, so that the caption bank of another dataset will do. Raises BobError
    naming the line.
    """
    contexts = []
    for number, row in enumerate(read_jsonl(path), start=1):
        values = [row.get("background"), row.get("pose")]
        if not all(isinstance(value, str) and value.strip() for value in values):
            raise BobError(
                f'{path}, line {number}: a context needs the texts "background" and "pose", '
                f"found {row}"
            )
        contexts.append(Context(*(value.strip() for value in values)))  # type: ignore[union-attr]
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
