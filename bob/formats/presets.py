"""Presets: params under a name, for studies and for `bob use`."""

import difflib
import json
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from bob.formats.params import check, load, read_yaml, schema

PRESETS = Path("experiments/presets.yaml")


@dataclass(frozen=True)
class Preset:
    """A recipe, or a part of one."""

    about: str
    """In a line."""
    params: Mapping[str, Any]
    """By section.key."""
    models: Mapping[str, str] = field(default_factory=dict)
    """ID@REVISION on the Hub of folders models/<name>."""


def read_presets(file: Path) -> dict[str, Preset]:
    """The presets in a file, by name; raises BobError where it is not as the schema says."""
    content = read_yaml(file)
    text = resources.files("bob.formats").joinpath("presets.schema.json").read_text("utf-8")
    check(file, content, json.loads(text))
    return {name: Preset(**fields) for name, fields in content.items()}


def nearest(name: str, known: Iterable[str]) -> str:
    """What to say of a name that is not among the `known`."""
    near = difflib.get_close_matches(name, known)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"


def overridden(
    overrides: Mapping[str, Any], where: str, params: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """`params`, by default `params.yaml`, with `overrides` (section.key -> value).

    Raises BobError naming `where` for what `params.yaml` does not allow.
    """
    values: dict[str, Any] = deepcopy(dict(params or load()))
    for key, value in overrides.items():
        section, _, name = key.partition(".")
        values.setdefault(section, {})[name] = value
    check(Path(where), values, schema())
    return values
