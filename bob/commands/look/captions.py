"""Captions that are edited: they go into a caption bank of the user's, `data/contexts/*.jsonl`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from bob.errors import BobError
from bob.formats import params
from bob.formats.files import locked
from bob.formats.layout import BANK, CONTEXTS
from bob.formats.params import PARAMS
from bob.formats.photos import Photo
from bob.formats.prompts import ATTRIBUTES, Context, Entry, read_bank, write_bank
from bob.stages.caption import MAX_WORDS, clean, names_class

CAPTIONER = "captioner"

Edits = Mapping[str, Context]
"""SHA-256 of a photo -> its context."""


def bank_file(values: Mapping[str, Mapping[str, str]]) -> Path:
    """Where edits go, by the parameters: to the file that `caption.bank` names, or a new one."""
    bank = values["caption"]["bank"]
    return CONTEXTS / f"{values['data']['name']}.jsonl" if bank == CAPTIONER else Path(bank)


def checked(texts: Mapping[str, Mapping[str, str]], classes: Sequence[str]) -> dict[str, Context]:
    """Texts as they are typed -> contexts, cleaned as a captioner's answers are.

    Raises BobError for one that would be refused from a captioner too: it is empty or too long, or
    names a class, which its context must not tell.
    """
    edits = {}
    for photo, text in texts.items():
        phrases = []
        for attribute in ATTRIBUTES:
            said, phrase = text[attribute], clean(text[attribute], attribute)
            if not phrase.isprintable():
                raise BobError(f"the {attribute} has signs that are no text: {said[:60]!r}")
            if not phrase:
                raise BobError(f"the {attribute} is empty; say it in a few words")
            if len(said.split()) > MAX_WORDS:
                raise BobError(f"the {attribute} has more than {MAX_WORDS} words: {said[:60]!r}")
            if names_class(said, classes):
                raise BobError(
                    f"the {attribute} {said[:60]!r} names a class; a caption's context must not"
                )
            phrases.append(phrase)
        edits[photo] = Context(*phrases)
    return edits


def read_file(path: Path) -> list[Entry]:
    """A user's caption bank; empty where there is none yet. Raises BobError where it is no bank."""
    try:
        return read_bank(path) if path.exists() else []
    except BobError as error:
        raise BobError(
            f"{error}; to keep it as it is, set caption.bank in {PARAMS} to another file of "
            f"{CONTEXTS}"
        ) from None


def edited(path: Path, edits: Edits, photos: Sequence[Photo]) -> list[Entry]:
    """The bank that the file at `path` becomes: a line for every shot, and those that it has.

    The shots that it lacks are as they were captioned. Raises BobError for a photo that is none of
    the shots.
    """
    entries = {entry.image: entry for entry in read_file(path)}
    captioned = {entry.image: entry for entry in read_bank(BANK)} if BANK.exists() else {}
    for photo in photos:
        if photo.sha256 not in entries:
            if photo.sha256 not in captioned:
                raise BobError(f"{BANK} has no entry for {photo.path}; run `dvc repro caption`")
            entries[photo.sha256] = captioned[photo.sha256]
    for image, context in edits.items():
        if image not in entries:
            raise BobError(f"{image[:64]!r} is none of the shots; reload the page")
        entries[image] = Entry(image, entries[image].class_name, context)
    return list(entries.values())


def save(edits: Edits, photos: Sequence[Photo]) -> list[Path]:
    """Write the edits to their file, and the file into `caption.bank`; returns what was written.

    Several processes and threads may do this at once.
    """
    with locked(CONTEXTS):
        values = params.load()
        path, written = bank_file(values), []
        after = edited(path, edits, photos)
        if after != read_file(path):
            write_bank(path, after)
            written.append(path)
        if values["caption"]["bank"] == CAPTIONER:
            params.replace({"caption.bank": path.as_posix()})
            written.append(PARAMS)
    return written


def pending(path: Path) -> dict[str, Context]:
    """The contexts that the file has otherwise than the captions that the stages last used."""
    try:
        saved = read_bank(path) if path.exists() else []
    except BobError:  # a file of contexts that is no bank
        return {}
    used = {entry.image: entry.context for entry in read_bank(BANK)} if BANK.exists() else {}
    return {
        entry.image: entry.context
        for entry in saved
        if entry.context and entry.image in used and used[entry.image] != entry.context
    }
