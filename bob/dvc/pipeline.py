"""The stages of dvc.yaml, and what dvc.lock has recorded of their last runs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bob.dvc.overrides import read_instead
from bob.dvc.repository import OnRepository, translated
from bob.formats.params import PARAMS, PIPELINE, check

if TYPE_CHECKING:
    from dvc.output import Output
    from dvc.stage import PipelineStage

# What bob reads of `meta`, which DVC leaves to its users.
META_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "optional_deps": {
            "type": "array",
            "items": {"type": "string"},
            "description": "a list of paths",
        }
    },
    "description": "a mapping",
}
OUT_META_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"deterministic": {"type": "boolean"}},
    "description": "a mapping",
}
NEW, MISSING, CHANGED, UNCACHED = "new", "missing", "changed", "not in the cache"


@dataclass(frozen=True)
class Parameters:
    """A stage's parameters in one file."""

    file: str
    keys: tuple[str, ...]
    """As declared, dotted; none where the file is declared as a whole."""
    recorded: Mapping[str, Any]
    """Key -> value at the last run, of the keys that are declared now."""
    present: Mapping[str, Any]


class Stage:
    """One stage of dvc.yaml, with the values of the parameters put in."""

    def __init__(self, stage: "PipelineStage") -> None:
        self.dvc = stage
        self.name = stage.name
        self.command = str(stage.cmd)
        self.meta: Mapping[str, Any] = stage.meta or {}
        where = f"{PIPELINE}: stages.{self.name}"
        check(f"{where}.meta", self.meta, META_SCHEMA)
        for out in stage.outs:
            check(f"{where}.outs.{out.def_path}.meta", out.annot.meta or {}, OUT_META_SCHEMA)
        self.folder, self.root = Path(stage.wdir), Path(stage.repo.root_dir)

    @property
    def deps(self) -> tuple[str, ...]:
        """Paths, as declared; without the files of parameters."""
        return tuple(dep.def_path for dep in self.dvc.deps if not is_parameters(dep))

    @property
    def params(self) -> list[Parameters]:
        """The parameters, file by file."""
        return [
            Parameters(dep.def_path, tuple(dep.params), self._recorded(dep), _present(dep))
            for dep in self.dvc.deps
            if is_parameters(dep)
        ]

    def _recorded(self, dep: Any) -> dict[str, Any]:
        recorded = (self.lock or {}).get("params", {}).get(dep.def_path, {})
        return {
            key: value for key, value in recorded.items() if key in dep.params or not dep.params
        }

    @property
    def outs(self) -> tuple[str, ...]:
        """Paths, as declared."""
        return tuple(out.def_path for out in self.dvc.outs)

    @property
    def out_files(self) -> tuple[Path, ...]:
        """Absolute paths of the outputs."""
        return tuple(Path(out.fs_path) for out in self.dvc.outs)

    def meta_of(self, out: str) -> Mapping[str, Any]:
        """What stands under `meta` at an output."""
        return next(one.annot.meta or {} for one in self.dvc.outs if one.def_path == out)

    @property
    def command_changed(self) -> bool:
        """Whether its command is another one than at its last run."""
        return self.dvc.cmd_changed

    @property
    def lock(self) -> Mapping[str, Any] | None:
        """Its entry in dvc.lock; None where it has never run."""
        return self.dvc.dvcfile.lockfile_contents.get("stages", {}).get(self.name)

    def changed_outs(self) -> Iterator[tuple[str, str]]:
        """(Path, NEW, MISSING, CHANGED or UNCACHED) for outputs that are not as they were left."""
        for out in self.dvc.outs:
            condition = _condition(out)
            if condition:
                yield out.def_path, condition


def is_parameters(dep: Any) -> bool:
    """Whether one of DVC's dependencies is a file of parameters."""
    from dvc.dependency.param import ParamsDependency

    return isinstance(dep, ParamsDependency)


def _present(dep: Any) -> Mapping[str, Any]:
    from dvc.dependency.param import MissingParamsError

    try:
        return dep.read_params()
    except MissingParamsError:
        return {}


def _condition(out: "Output") -> str:
    if not out.hash_info:
        return NEW
    if not out.exists:
        return MISSING
    if out.workspace_status():
        return CHANGED
    return UNCACHED if out.status() else ""


class Pipeline(OnRepository):
    """The pipeline of the repository; raises BobError where DVC refuses its dvc.yaml.

    With `params`, a file that is read instead of `params.yaml`.
    """

    def __init__(self, folder: Path | None = None, params: Path | None = None) -> None:
        from dvc.repo.reproduce import plan_repro
        from dvc.stage import PipelineStage

        super().__init__(folder)
        if params is not None:
            read_instead(self.repository, self.root / PARAMS, params)
        with translated():
            self.stages = {
                stage.name: Stage(stage)
                for stage in plan_repro(self.repository.index.graph)
                if isinstance(stage, PipelineStage)
            }
        """By name, in the order in which they run."""

    @property
    def root(self) -> Path:
        """The repository's root."""
        return Path(self.repository.root_dir)

    def is_stale(self, name: str) -> bool:
        """Whether a stage's dependencies or outputs are others than at its last run."""
        with translated():
            return bool(self.repository.status(targets=[name]))
