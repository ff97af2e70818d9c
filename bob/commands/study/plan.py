"""A study's file: settings, data seeds, claims and tables; and the runs that they ask for."""

import fnmatch
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from bob.cache.recipe import bare
from bob.commands.study.settings import Setting, read_settings
from bob.errors import BobError
from bob.formats.files import sha256
from bob.formats.layout import CONTEXTS, REVIEW
from bob.formats.params import PARAMS, PIPELINE, read_yaml
from bob.formats.presets import nearest, overridden
from bob.formats.review import rejected
from bob.formats.schemas import check

TARGETS = ("evaluate", "audit")  # the stages whose metrics a study reads
# What takes the place of generate where the synthetic set is drawn by the true renderer.
DRAWN_STAGE = {
    "deps": ["bob/miniature/world.py", "bob/commands/study/drawn.py", "results/split/classes.json"],
    "outs": ["results/generate"],
    "params": ["data.seed", "generate.images_per_class"],
}
DOCS = Path("docs")
MEAN = "mean"  # the label of a table's last column


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
    absent: tuple[str, ...]
    """Those of the files and folders that are not here."""
    strict: bool = False
    """Whether nothing that other code has made may be reused for it."""

    @property
    def key(self) -> tuple[str, int]:
        """What makes two runs the same measurement, whatever their settings are called."""
        return self.setting.key(self.data_seed)

    @property
    def name(self) -> str:
        """Of the DVC experiment; runs of other code or inputs have other names."""
        decided = hashlib.sha256(repr((self.key, self.code, self.inputs)).encode()).hexdigest()
        name = f"study-{self.setting.name}-{self.data_seed}-{decided[:8]}"
        return f"{name}-strict" if self.strict else name


@dataclass(frozen=True)
class Arm:
    """One line of a table: a metric of a setting."""

    label: str
    setting: Setting
    metric: str

    @property
    def chosen_by(self) -> str | None:
        """The metric on validation that chooses among the runs of a sweep; None where none can."""
        variant, _, name = self.metric.partition(".")
        return f"{variant}.val_top1" if name.startswith("top1") else None


@dataclass(frozen=True)
class Sheet:
    """A run whose contact sheet the page shows."""

    label: str
    setting: Setting
    data_seed: int

    @property
    def file(self) -> str:
        """Its name among the page's plots."""
        return f"{self.setting.name}-{self.data_seed}.jpg"


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
    expect_zero: Mapping[str, float]
    """Row that must be no more than noise -> what its mean's interval must lie below, with zero in
    it."""
    show: tuple[Mapping[str, str], ...]
    share: Mapping[str, str] | None
    """`{of: A, from: B, to: C}`: (A - B) / (C - B)."""
    sheets: tuple[Sheet, ...]

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
class Line:
    """One line of a published table: what is measured in each column, and what was published."""

    label: str
    arms: tuple[Arm, ...]
    published: Mapping[str, float]
    """By column, where it is known."""


@dataclass(frozen=True)
class Published:
    """A table of the paper, to be filled."""

    title: str
    about: str
    unit: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    mean: bool
    """Whether it ends with a column of means over the others."""


@dataclass(frozen=True)
class Study:
    """The content of a study's file."""

    path: Path
    title: str
    about: str
    settings: Mapping[str, Setting]
    claims: tuple[Claim, ...]
    tables: tuple[Published, ...]
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

    @property
    def sheets(self) -> list[Sheet]:
        """The contact sheets that the page shows."""
        return [sheet for claim in self.claims for sheet in claim.sheets]

    def part(self, patterns: Sequence[str]) -> "Study":
        """The study of those settings alone whose name fits one of `patterns` (`clip-*`).

        Raises BobError naming a pattern that fits none.
        """
        for pattern in patterns:
            if not fnmatch.filter(self.settings, pattern):
                raise BobError(
                    f"{self.path} has no setting {pattern!r}; there are {', '.join(self.settings)}"
                )
        fitting = {
            name: setting
            for name, setting in self.settings.items()
            if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
        }
        return replace(self, settings=fitting)

    def runs(self) -> list[Run]:
        """The runs, in the file's order, each once, however many settings and claims share it.

        All data seeds of a setting stand together, and the other points of a sweep come after the
        first points of all settings: neighbours in the queue, which may run at the same time, then
        share nothing that one of them could take from the other.
        """
        params, stages = read_yaml(PARAMS), read_yaml(PIPELINE)["stages"]
        first = [setting.points[0] for setting in self.settings.values()]
        other = [point for setting in self.settings.values() for point in setting.points[1:]]
        runs: dict[tuple[str, int], Run] = {}
        for setting in first + other:
            for seed in setting.seeds:
                values = overridden(
                    {**setting.overrides, "data.seed": seed},
                    f"{self.path}, setting {setting.name}",
                    params,
                )
                run = Run(setting, seed, values, *fingerprints(values, stages, setting.drawn))
                runs.setdefault(run.key, run)
        return list(runs.values())


def read_study(path: Path) -> Study:
    """Read and check a study's file.

    Raises BobError with one line for what does not fit the schema, an override that `params.yaml`
    does not allow, or a name that stands for nothing.
    """
    content = read_yaml(path)
    text = resources.files("bob.commands.study").joinpath("study.schema.json").read_text("utf-8")
    rules = json.loads(text)
    check(path, content, rules)
    settings = read_settings(path, content)
    figure = content.get("figure")
    return Study(
        path,
        content["title"],
        content.get("about", ""),
        settings,
        tuple(_claim(path, entry, settings) for entry in content.get("claims", [])),
        tuple(_published(path, entry, settings) for entry in content.get("tables", [])),
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
        entry.get("expect_zero", {}),
        tuple(entry.get("show", [])),
        entry.get("share"),
        _sheets(where, entry.get("contact_sheets", []), settings),
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
    if not common_seeds(arm.setting for arm in claim.arms):
        raise BobError(f"{where}: its settings have no data seed in common")
    return claim


def _sheets(
    where: str, entries: Sequence[Mapping[str, str]], settings: Mapping[str, Setting]
) -> tuple[Sheet, ...]:
    """The contact sheets of a claim, all of the first data seed that their settings share."""
    if not entries:
        return ()
    named = [(entry["label"], _setting(where, entry["setting"], settings)) for entry in entries]
    for _, setting in named:
        if setting.drawn or setting.swept:
            raise BobError(f"{where}: {setting.name}, drawn or a sweep, has no contact sheet")
    seeds = common_seeds(setting for _, setting in named)
    if not seeds:
        raise BobError(f"{where}: the settings of its contact sheets have no data seed in common")
    return tuple(Sheet(label, setting, seeds[0]) for label, setting in named)


def _published(path: Path, entry: Mapping[str, Any], settings: Mapping[str, Setting]) -> Published:
    where = f"{path}: table {entry['title']!r}"
    columns, mean = entry["columns"], entry.get("mean", False)
    lines = []
    for row in entry["rows"]:
        arms = tuple(
            _arm(
                where,
                label,
                row["setting"].replace("{column}", column),
                row.get("metric", entry["metric"]).replace("{column}", column),
                settings,
            )
            for label, column in columns.items()
        )
        paper = row.get("paper", {})
        known = [*columns, *([MEAN] if mean else [])]
        for label in paper:
            if label not in known:
                raise BobError(f"{where} has no column {label!r}; there are {', '.join(known)}")
        if mean and len({arm.setting.seeds for arm in arms}) > 1:
            raise BobError(f"{where} has a mean over settings of different data seeds")
        lines.append(Line(row["label"], arms, paper))
    return Published(
        entry["title"],
        entry.get("about", ""),
        entry.get("unit", ""),
        tuple(columns),
        tuple(lines),
        mean,
    )


def _arms(
    where: str,
    rows: Iterable[Mapping[str, Any]],
    metric: str,
    settings: Mapping[str, Setting],
) -> tuple[Arm, ...]:
    return tuple(
        _arm(where, str(row["label"]), row["setting"], row.get("metric", metric), settings)
        for row in rows
    )


def _arm(where: str, label: str, name: str, metric: str, settings: Mapping[str, Setting]) -> Arm:
    arm = Arm(label, _setting(where, name, settings), metric)
    if arm.setting.swept and not arm.chosen_by:
        raise BobError(
            f"{where}: {metric} of {name}, a sweep, has no counterpart on validation to choose by; "
            "real_only.top1 and real_and_synthetic.top1 have one"
        )
    return arm


def _setting(where: str, name: str, settings: Mapping[str, Setting]) -> Setting:
    if name not in settings:
        raise BobError(f"{where} names the setting {name!r}; {nearest(name, settings)}")
    return settings[name]


def common_seeds(settings: Iterable[Setting]) -> list[int]:
    """The data seeds that all settings are measured under: what they are compared on."""
    return sorted(set.intersection(*(set(setting.seeds) for setting in settings)))


def fingerprints(
    values: Mapping[str, Any], stages: Mapping[str, Any], drawn: bool = False
) -> tuple[str, str, tuple[str, ...]]:
    """Short hashes of the code, and of the params and other files, that decide a run's metrics.

    `stages` are those of `dvc.yaml`. Third come the files and folders that are not here.
    """
    if drawn:
        stages = {**stages, "generate": DRAWN_STAGE}
    needed = _needed(stages, TARGETS[:1] if drawn else TARGETS, values)
    deps = {dep for stage in needed.values() for dep in stage["deps"]}
    made = {out for stage in needed.values() for out in stage["outs"]}
    brought = sorted(dep for dep in deps if not any(_lies_in(dep, out) for out in made))
    code = {dep: _code(dep) for dep in brought if dep.startswith("bob/")}
    contexts = (values["caption"]["bank"], values["generate"]["context"])
    named = [name for name in contexts if name.startswith(f"{CONTEXTS}/")]
    # The stages depend on the whole folder of contexts, and read those files of it that are named.
    others = [dep for dep in brought if not dep.startswith("bob/") and Path(dep) != CONTEXTS]
    files = {dep: content for dep in (*others, *named) if (content := _content(dep))}
    read = {key: _value(values, key) for stage in needed.values() for key in stage["params"]}
    absent = (name for name in (*brought, *named) if not Path(name).exists())
    return _short(code), _short([read, files]), tuple(absent)


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
                if any(_lies_in(dep, out) for dep in filled[name]["deps"])
            ]
    return needed


def _lies_in(path: str, out: str) -> bool:
    # On text: with some hundred runs, Path.is_relative_to would take a minute here.
    return f"{path}/".startswith(f"{out}/")


def _value(values: Mapping[str, Any], key: str) -> Any:
    value: Any = values
    for part in key.split("."):
        value = value[part]
    return value


@functools.cache
def _code(dep: str) -> str:
    """Hash of what a module does, so that a comment makes no measurement outdated."""
    return _short(bare(Path(dep).read_text("utf-8")))


@functools.cache
def _content(dep: str) -> str:
    path = Path(dep)
    if path == REVIEW:  # nothing where no image is rejected: it is the measurement that it was
        return _short(rejections) if (rejections := sorted(rejected())) else ""
    files = [path]
    if path.is_dir():  # without what .dvcignore leaves out: locks and drafts
        files = sorted(file for file in path.rglob("[!.]*") if file.is_file())
    return _short({file.as_posix(): sha256(file) for file in files if file.exists()})


def _short(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
