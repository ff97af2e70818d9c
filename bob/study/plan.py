"""A study's file: settings, data seeds and claims; and the runs that they ask for."""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from bob.errors import BobError
from bob.files import sha256
from bob.params import PARAMS, PIPELINE, check, read_yaml, schema

TARGETS = ("evaluate", "audit")  # the stages whose metrics a study reads
# What takes the place of generate where the synthetic set is drawn by the true renderer.
DRAWN_STAGE = {
    "deps": ["bob/draw.py", "bob/study/drawn.py", "results/split/classes.json"],
    "outs": ["results/generate"],
    "params": ["data.seed", "generate.images_per_class"],
}
DOCS = Path("docs")


@dataclass(frozen=True)
class Setting:
    """Params under a name, measured under several data seeds."""

    name: str
    seeds: tuple[int, ...]
    overrides: Mapping[str, Any]
    drawn: bool
    """Whether the synthetic set is drawn by `bob.draw` instead of generated (the ceiling)."""

    def key(self, seed: int) -> tuple[str, int]:
        """What makes two runs the same measurement, whatever their settings are called."""
        return " ".join((*(["drawn"] if self.drawn else []), *self.written)), seed

    @property
    def written(self) -> tuple[str, ...]:
        """The overrides as `dvc exp run -S` takes them."""
        return tuple(sorted(f"{key}={_written(value)}" for key, value in self.overrides.items()))


@dataclass(frozen=True)
class Run:
    """One experiment: a setting under one data seed."""

    setting: Setting
    data_seed: int
    values: Mapping[str, Any]
    """All params."""
    code: str
    """Hash of the code of the stages that are run."""
    inputs: str
    """Hash of their params, the models and all other files that they read."""

    @property
    def key(self) -> tuple[str, int]:
        """What makes two runs the same measurement, whatever their settings are called."""
        return self.setting.key(self.data_seed)

    @property
    def name(self) -> str:
        """Of the DVC experiment; runs of other code or inputs have other names."""
        decided = hashlib.sha256(repr((self.key, self.code, self.inputs)).encode()).hexdigest()
        return f"study-{self.setting.name}-{self.data_seed}-{decided[:8]}"


@dataclass(frozen=True)
class Arm:
    """One line of a table: a metric of a setting."""

    label: str
    setting: Setting
    metric: str


@dataclass(frozen=True)
class Claim:
    """What a table is to show. `expect` decides whether the claim holds; `show` does not."""

    id: str
    title: str
    about: str
    arms: tuple[Arm, ...]
    x: str | None
    """The axis' label where the arms are points of a curve."""
    unit: str
    expect: tuple[Mapping[str, str], ...]
    """`{larger: A, smaller: B}`: the difference's interval must lie above zero."""
    expect_zero: tuple[str, ...]
    """Rows that must be no more than noise: the mean's interval must reach down to zero."""
    show: tuple[Mapping[str, str], ...]
    share: Mapping[str, str] | None
    """`{of: A, from: B, to: C}`: (A - B) / (C - B)."""

    @property
    def differences(self) -> tuple[Mapping[str, str], ...]:
        """All that the page shows, those that decide first."""
        return self.expect + self.show


@dataclass(frozen=True)
class Figure:
    """The one picture that sums the study up."""

    title: str
    unit: str
    groups: Mapping[str, tuple[Arm, ...]]


@dataclass(frozen=True)
class Study:
    """The content of a study's file."""

    path: Path
    title: str
    about: str
    settings: Mapping[str, Setting]
    claims: tuple[Claim, ...]
    figure: Figure | None

    @property
    def results(self) -> Path:
        """The CSV of what was measured."""
        return DOCS / f"{self.path.stem}-study.csv"

    @property
    def page(self) -> Path:
        """The page."""
        return DOCS / f"{self.path.stem}-study.md"

    @property
    def plots(self) -> Path:
        """The folder of the page's plots."""
        return DOCS / f"{self.path.stem}-study"

    def runs(self) -> list[Run]:
        """The runs, in the file's order, each once, however many settings and claims share it.

        All data seeds of a setting stand together: neighbours in the queue, which may run at the
        same time, then share nothing that one of them could take from the other.
        """
        runs: dict[tuple[str, int], Run] = {}
        for setting in self.settings.values():
            for seed in setting.seeds:
                values = overridden(
                    {**setting.overrides, "data.seed": seed}, f"{self.path}, setting {setting.name}"
                )
                run = Run(setting, seed, values, *fingerprints(values, setting.drawn))
                runs.setdefault(run.key, run)
        return list(runs.values())


def read_study(path: Path) -> Study:
    """Read and check a study's file.

    Raises BobError with one line for what does not fit the schema, an override that `params.yaml`
    does not allow, or a name that stands for nothing.
    """
    content = read_yaml(path)
    text = resources.files("bob").joinpath("study.schema.json").read_text("utf-8")
    check(path, content, json.loads(text))
    common = content.get("params", {})
    settings = {
        name: Setting(
            name,
            tuple(entry["seeds"]),
            common | entry.get("params", {}),
            entry.get("drawn", False),
        )
        for name, entry in content["settings"].items()
    }
    for setting in settings.values():
        overridden(setting.overrides, f"{path}, setting {setting.name}")
    figure = content.get("figure")
    return Study(
        path,
        content["title"],
        content.get("about", ""),
        settings,
        tuple(_claim(path, entry, settings) for entry in content["claims"]),
        figure
        and Figure(
            figure["title"],
            figure["unit"],
            {
                group["label"]: _arms(f"{path}: figure", group["rows"], figure["metric"], settings)
                for group in figure["groups"]
            },
        ),
    )


def _claim(path: Path, entry: Mapping[str, Any], settings: Mapping[str, Setting]) -> Claim:
    where = f"{path}: claim {entry['id']}"
    claim = Claim(
        entry["id"],
        entry["title"],
        entry.get("about", ""),
        _arms(where, entry["rows"], entry["metric"], settings),
        entry.get("x"),
        entry.get("unit", ""),
        tuple(entry.get("expect", [])),
        tuple(entry.get("expect_zero", [])),
        tuple(entry.get("show", [])),
        entry.get("share"),
    )
    labels = [arm.label for arm in claim.arms]
    named = [*claim.expect_zero, *(claim.share or {}).values()]
    named += [label for difference in claim.differences for label in difference.values()]
    for label in named:
        if label not in labels:
            raise BobError(f"{where} has no row {label!r}; its rows are {', '.join(labels)}")
    if len(set(labels)) < len(labels):
        raise BobError(f"{where} has two rows of one label: {', '.join(labels)}")
    if claim.x and not all(isinstance(row["label"], int | float) for row in entry["rows"]):
        raise BobError(f"{where} is a curve over {claim.x}: its labels have to be numbers")
    if not common_seeds(claim.arms):
        raise BobError(f"{where}: its settings have no data seed in common")
    return claim


def _arms(
    where: str,
    rows: Iterable[Mapping[str, Any]],
    metric: str,
    settings: Mapping[str, Setting],
) -> tuple[Arm, ...]:
    arms = []
    for row in rows:
        if row["setting"] not in settings:
            raise BobError(
                f"{where} names the setting {row['setting']!r}; there are {', '.join(settings)}"
            )
        arms.append(Arm(str(row["label"]), settings[row["setting"]], row.get("metric", metric)))
    return tuple(arms)


def common_seeds(arms: Iterable[Arm]) -> list[int]:
    """The data seeds that all arms are measured under: what they are compared on."""
    return sorted(set.intersection(*(set(arm.setting.seeds) for arm in arms)))


def overridden(overrides: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`params.yaml` with `overrides` (section.key -> value); raises BobError naming `where`."""
    values = deepcopy(read_yaml(PARAMS))
    for key, value in overrides.items():
        section, _, name = key.partition(".")
        values.setdefault(section, {})[name] = value
    check(Path(where), values, schema())
    return values


def fingerprints(values: Mapping[str, Any], drawn: bool = False) -> tuple[str, str]:
    """Short hashes of the code, and of the params and other files, that decide a run's metrics."""
    stages = read_yaml(PIPELINE)["stages"]
    if drawn:
        stages["generate"] = DRAWN_STAGE
    needed = _needed(stages, TARGETS[:1] if drawn else TARGETS, values)
    deps = {dep for stage in needed.values() for dep in stage["deps"]}
    made = {out for stage in needed.values() for out in stage["outs"]}
    brought = sorted(dep for dep in deps if not any(Path(dep).is_relative_to(out) for out in made))
    code = {dep: _content(dep) for dep in brought if dep.startswith("bob/")}
    files = {dep: _content(dep) for dep in brought if not dep.startswith("bob/")}
    read = {key: _value(values, key) for stage in needed.values() for key in stage["params"]}
    return _short(code), _short([read, files])


def _needed(
    stages: Mapping[str, Any], targets: Sequence[str], values: Mapping[str, Any]
) -> dict[str, Any]:
    """The stages that lead to `targets`, with `${key}` in their dependencies filled in."""
    filled = {
        name: {
            "deps": [
                re.sub(r"\$\{([\w.]+)\}", lambda key: str(_value(values, key[1])), dep)
                for dep in stage["deps"]
            ],
            "outs": [next(iter(out)) if isinstance(out, dict) else out for out in stage["outs"]],
            "params": stage.get("params", []),
        }
        for name, stage in stages.items()
    }
    needed: dict[str, Any] = {}
    waiting = list(targets)
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed[name] = filled[name]
            waiting += [
                other
                for other, stage in filled.items()
                for out in stage["outs"]
                if any(Path(dep).is_relative_to(out) for dep in filled[name]["deps"])
            ]
    return needed


def _value(values: Mapping[str, Any], key: str) -> Any:
    value: Any = values
    for part in key.split("."):
        value = value[part]
    return value


@functools.cache
def _content(dep: str) -> str:
    path = Path(dep)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    if not path.exists():
        raise BobError(f"{path} is missing; `dvc pull` fetches tracked files")
    return _short({file.as_posix(): sha256(file) for file in files})


def _short(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
