"""What a study measures: settings, written out or as grids of presets, and their sweeps."""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bob.errors import BobError
from bob.formats.params import load
from bob.formats.presets import PRESETS, Preset, nearest, overridden, read_presets


@dataclass(frozen=True)
class Setting:
    """Params under a name, measured under several data seeds."""

    name: str
    seeds: tuple[int, ...]
    overrides: Mapping[str, Any]
    drawn: bool
    """Whether the synthetic set is drawn by the true renderer, not generated (the ceiling)."""
    sweep: tuple[Mapping[str, Any], ...] = ({},)
    """Overrides on top; the run of them that is best on validation is reported."""

    @property
    def points(self) -> tuple["Setting", ...]:
        """What is run: a setting for each point of the sweep."""
        return tuple(
            replace(self, overrides={**self.overrides, **point}, sweep=({},))
            for point in self.sweep
        )

    @property
    def swept(self) -> bool:
        """Whether there is anything to choose."""
        return len(self.sweep) > 1

    def key(self, seed: int) -> tuple[str, int]:
        """What makes two runs the same measurement, whatever their settings are called."""
        return " ".join((*(["drawn"] if self.drawn else []), *self.written)), seed

    @property
    def written(self) -> tuple[str, ...]:
        """The overrides as `dvc exp run -S` takes them."""
        return tuple(sorted(f"{key}={_written(value)}" for key, value in self.overrides.items()))


def read_settings(path: Path, content: Mapping[str, Any]) -> dict[str, Setting]:
    """Name -> setting of the study `content`, read from `path`: those written out, then the grids'.

    What is common to the study comes first, then what is the setting's own; in each the presets, in
    their order, and then the params. The later wins.

    Raises BobError with one line for a name that stands twice or for nothing, and for an override
    that `params.yaml` does not allow.
    """
    entries = _entries(path, content)
    file = path.parent / PRESETS.name
    presets: Mapping[str, Preset] = {}
    if any("use" in part for part in (content, *entries.values())):
        presets = read_presets(file)
    params = load()
    settings = {}
    for name, entry in entries.items():
        where = f"{path}, setting {name}"
        overrides: dict[str, Any] = {}
        for part in (content, entry):
            for preset in part.get("use", []):
                if preset not in presets:
                    raise BobError(f"{where}: {file} has no {preset!r}; {nearest(preset, presets)}")
                overrides |= presets[preset].params
            overrides |= part.get("params", {})
        seeds = entry.get("seeds", content.get("seeds"))
        if seeds is None:
            raise BobError(f"{where} has no seeds; give them there, or once for the whole study")
        sweep = entry.get("sweep", content.get("sweep", {}))
        settings[name] = Setting(
            name,
            tuple(seeds),
            overrides,
            entry.get("drawn", False),
            tuple(
                dict(zip(sweep, point, strict=True)) for point in itertools.product(*sweep.values())
            ),
        )
        for point in settings[name].points:
            overridden(point.overrides, where, params)
    return settings


def _entries(path: Path, content: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Name -> entry; a grid's are named after their presets."""
    entries = dict(content.get("settings", {}))
    for grid in content.get("grids", []):
        for presets in itertools.product(*grid["use"]):
            name = "-".join(presets)
            if name in entries:
                raise BobError(f"{path}: two settings are called {name}; remove one")
            entries[name] = {**grid, "use": presets}
    if not entries:
        raise BobError(f"{path} measures nothing; give it settings or grids")
    return entries


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
