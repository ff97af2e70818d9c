"""Which files of a repository on the Hub are wanted: what the loaders in bob/models read.

Configuration, tokenizer, image processor and one copy of the weights, as safetensors. No pickles,
which run code when they are loaded; no weights of other libraries or precisions.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from bob.commands.configuration import VARIANT
from bob.errors import BobError

INDEX = "model_index.json"
"""In the repository of a pipeline: which parts it has."""
PIPELINE = "StableDiffusionPipeline"
_NETWORKS = ("unet", "text_encoder", "vae")
# bob.models.diffusion loads a pipeline without these; the first is 1.2 GB.
_UNREAD = ("safety_checker", "feature_extractor")

_STEMS = ("model", "diffusion_pytorch_model")
_SETTINGS = re.compile(r"[^/]+\.(json|txt|model|jinja)")
_INDEX_OF_WEIGHTS = re.compile(r".*\.index\.(\w+\.)?json")
_ABOUT = re.compile(r"(readme|licen[cs]e|notice)[\w.-]*", re.IGNORECASE)


@dataclass(frozen=True)
class Wanted:
    """What of a repository is to come."""

    files: frozenset[str]
    lacking: tuple[str, ...]
    """Folders, "" or "unet/", that should have plain safetensors weights and have none."""
    variant: str | None
    """Weights of another precision that lie in the first of those."""


def wanted(names: Collection[str], index: Mapping[str, Any] | None) -> Wanted:
    """What is to come of a repository with the files `names`; `index` is a pipeline's INDEX.

    Raises BobError where it is a pipeline that bob does not load.
    """
    if index is None:
        files = _weights("", names) | _settings("", names)
        networks = [""]
    else:
        if (kind := index.get("_class_name")) != PIPELINE:
            raise BobError(
                f"is a {kind or 'pipeline of no class'}, and bob loads a {PIPELINE} (Stable "
                "Diffusion 1.x or 2.x)"
            )
        parts = [f"{part}/" for part in _parts(index)]
        networks = [part for part in parts if part[:-1] in _NETWORKS]
        files = {INDEX}.union(*(_weights(part, names) | _settings(part, names) for part in parts))
    about = {name for name in names if _ABOUT.fullmatch(name)}
    lacking = tuple(folder for folder in networks if not _weights(folder, names))
    variants = [name for folder in lacking[:1] for name in sorted(_in(folder, names, VARIANT))]
    return Wanted(frozenset(files | about), lacking, next(iter(variants), None))


def _parts(index: Mapping[str, Any]) -> list[str]:
    """A pipeline's parts that are loaded; its other entries are settings, or (null, null)."""
    return [
        name
        for name, value in index.items()
        if isinstance(value, list) and None not in value and name not in _UNREAD
    ]


def _weights(folder: str, names: Collection[str]) -> set[str]:
    """The plain weights of a folder, whole or in shards."""
    for stem in _STEMS:
        if (whole := f"{folder}{stem}.safetensors") in names:
            return {whole}
        if (index := f"{whole}.index.json") in names:
            return {index} | _in(folder, names, re.compile(rf"{stem}-\d+-of-\d+\.safetensors"))
    return set()


def _settings(folder: str, names: Collection[str]) -> set[str]:
    return _in(folder, names, _SETTINGS) - _in(folder, names, _INDEX_OF_WEIGHTS)


def _in(folder: str, names: Collection[str], pattern: re.Pattern[str]) -> set[str]:
    """Those of `names` right in a folder whose last part fits the pattern."""
    return {
        name
        for name in names
        if name.startswith(folder)
        and "/" not in (last := name.removeprefix(folder))
        and pattern.fullmatch(last)
    }
