"""A class's name and the folder that stands for it."""

import re

# What a folder's name cannot hold everywhere; `$` and `:` mean something in fsspec's paths, which
# `datasets` opens images by; and the underscore, which stands for a space.
_UNFIT = re.compile(r"^\.|[$%/:\\_]")
# The last letter of a word by which `datasets` would take the folder for a split of its own.
_SPLIT_WORD = re.compile(
    r"(?<![^-._0-9])(?:train|training|validation|valid|val|dev|test|testing|eval|evaluation)"
    r"(?![^-._0-9])"
)


def class_name_of(folder: str) -> str:
    """As benchmarks and prompts spell it: a folder "Anna_Hummingbird" is "Anna Hummingbird"."""
    return " ".join(folder.replace("_", " ").split())


def folder_of(class_name: str) -> str:
    """A folder for the class, "Anna_Hummingbird" or "F%2FA-18", that no other class has.

    What would be misread in a folder's name is escaped as in a URL: "trai%6E" is the class "train".
    """
    folder = _UNFIT.sub(lambda found: _escaped(found[0]), class_name).replace(" ", "_")
    return _SPLIT_WORD.sub(lambda found: found[0][:-1] + _escaped(found[0][-1]), folder)


def _escaped(letter: str) -> str:
    return f"%{ord(letter):02X}"
