"""`bob use`: presets, as params of `params.yaml`."""

import difflib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from bob.commands import configuration
from bob.commands.fetch import fetch
from bob.commands.fetch.tracked import tracking_file
from bob.errors import LINE, BobError, shown
from bob.formats import params
from bob.formats.params import PARAMS
from bob.formats.presets import PRESETS, Preset, nearest, overridden, read_presets


def list_presets() -> None:
    """Print what presets there are; a star is before those that params.yaml is set to."""
    presets, values = read_presets(PRESETS), params.load()
    width = max(map(len, presets))
    for name, preset in presets.items():
        mark = " " if changes_to(preset.params, values) else "*"
        click.echo(shown(f"{mark} {name:{width}}  {preset.about}", LINE))


def use(names: Sequence[str], *, yes: bool, fetch_models: bool) -> None:
    """Write what the presets `names` set into params.yaml, after showing it and asking.

    Without asking where `yes`. With `fetch_models`, models that are missing are fetched before.

    Raises BobError, with params.yaml as it was, for a name that is none, presets that do not go
    together, and params that the schema or the check of the whole configuration does not allow.
    """
    presets = read_presets(PRESETS)
    wanted, values = combined(names, presets), params.load()
    new = overridden(wanted, f"{PRESETS}, {' '.join(names)}", values)
    changes = changes_to(wanted, values)
    if changes:
        _show(changes)
        _ask(yes)
    missing = _missing(new, presets)
    if fetch_models:
        for folder, model in missing.items():
            if model and not tracking_file(folder).exists():
                fetch(model, folder)
        missing = _missing(new, presets)
    configuration.check(new)
    if changes:
        params.replace(changes)
        click.echo(f"{PARAMS} is written")
    else:
        click.echo(f"{PARAMS} says so already")
    for folder, model in missing.items():
        click.echo(shown(_remedy(folder, model), LINE))
    data = Path("data") / new["data"]["name"]
    if not data.exists():
        click.echo(shown(f"{data} is not here: bob dataset {data.name}, or your own photos", LINE))


def combined(names: Sequence[str], presets: Mapping[str, Preset]) -> dict[str, Any]:
    """All that the presets `names` set; raises BobError where one is none, or two do not agree."""
    wanted: dict[str, Any] = {}
    by: dict[str, str] = {}
    for name in names:
        if name not in presets:
            raise BobError(f"{PRESETS} has no {name!r}; {nearest(name, presets)}")
        for key, value in presets[name].params.items():
            if wanted.setdefault(key, value) != value:
                raise BobError(
                    f"{by[key]} sets {key} to {params.written(wanted[key])}, and {name} to "
                    f"{params.written(value)}; take one of them"
                )
            by.setdefault(key, name)
    return wanted


def changes_to(wanted: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """What of `wanted` (section.key -> value) the params `values` do not say."""
    found = {}
    for key, value in wanted.items():
        section, _, name = key.partition(".")
        if values.get(section, {}).get(name) != value:
            found[key] = value
    return found


def _show(changes: Mapping[str, Any]) -> None:
    text = PARAMS.read_text(encoding="utf-8")
    before, after = text.splitlines(), params.edited(text, changes).splitlines()
    for line in list(difflib.unified_diff(before, after, lineterm="", n=0))[2:]:
        if not line.startswith("@@"):
            click.secho(shown(line, LINE), fg="red" if line.startswith("-") else "green")


def _ask(yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise BobError(f"{PARAMS} is as it was: there is no terminal to ask at; --yes writes it")
    if not click.confirm(f"Write this into {PARAMS}?"):
        raise BobError(f"{PARAMS} is as it was")


def _missing(values: Mapping[str, Any], presets: Mapping[str, Preset]) -> dict[Path, str | None]:
    """The model folders that `values` name and that are not here, with what a preset has for it."""
    known = {Path(folder): id for one in presets.values() for folder, id in one.models.items()}
    named = [Path(values[section][key]) for section, key in configuration.MODELS]
    return {folder: known.get(folder) for folder in named if not folder.exists()}


def _remedy(folder: Path, model: str | None) -> str:
    if (tracking := tracking_file(folder)).exists():
        return f"{folder} is not here: dvc pull {tracking}"
    if model:
        return f"{folder} is not here: bob fetch {model} {folder}"
    return f"{folder} is not here: put the model there, or its endpoint.json, and dvc add {folder}"
