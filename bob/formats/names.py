"""A class's name and the folder that stands for it."""

import re


def class_name_of(folder: str) -> str:
    """As benchmarks and prompts spell it: a folder "Anna_Hummingbird" is "Anna Hummingbird"."""
    return " ".join(folder.replace("_", " ").split())


def folder_of(class_name: str) -> str:
    """A folder for the class, "Anna_Hummingbird" or "F%2FA-18", that no other class has.

    What a folder's name cannot hold, and the underscore, are escaped as in a URL.
    """
    escaped = re.sub(r"^\.|[%/_]", lambda found: f"%{ord(found[0]):02X}", class_name)
    return escaped.replace(" ", "_")
