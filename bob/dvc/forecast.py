"""What `dvc repro` will do with each stage, and what the workspace will hold when it has.

As far as it can be known: DVC decides stage by stage, after the stages before it have run.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from bob.dvc.pipeline import Pipeline, Stage, is_parameters
from bob.dvc.repository import translated

if TYPE_CHECKING:
    from dvc_data.hashfile.hash_info import HashInfo

UP_TO_DATE = "up to date"
RESTORED = "restored"
RUNS = "runs"
MAY_RUN = "may run"
"""What it depends on is being made; where that comes out as it was, DVC skips the stage."""


@dataclass(frozen=True)
class Dependency:
    """A file or folder that a stage depends on; hashes are DVC's."""

    path: str
    """As declared."""
    file: Path
    """Absolute."""
    recorded: "HashInfo"
    """At the last run, empty where it was not declared then."""
    coming: "HashInfo | None"
    """That it will have; None where a stage makes it anew, or it is missing."""
    missing: bool
    dvc: Any
    """As DVC has it."""

    @property
    def md5(self) -> str | None:
        """Of its content at the last run."""
        return self.recorded.value


@dataclass(frozen=True)
class _Out:
    path: Path
    """Absolute."""
    hash_info: "HashInfo | None"
    """Of the content that it will have; None where the stage makes it anew."""
    in_workspace: bool


class Forecast:
    """What DVC will do, by stage, and where the content that a path will have lies now.

    Hashes what has changed in the workspace since DVC last did, writes nothing and runs nothing.
    Raises BobError where DVC cannot read what a stage depends on.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._repository = pipeline.repository
        self._store = pipeline.repository.cache.local
        self._outs: list[_Out] = []
        self.states: dict[str, str] = {}
        """UP_TO_DATE, RESTORED, RUNS or MAY_RUN, by stage, in the order in which they run."""
        self.dependencies: dict[str, list[Dependency]] = {}
        """By stage; without parameters."""
        with translated("DVC: "):
            stages = tqdm(pipeline.stages.values(), "asking DVC", leave=False, disable=None)
            for stage in stages:
                self.states[stage.name], hashes = self._look_at(stage)
                in_workspace = self.states[stage.name] == UP_TO_DATE
                self._outs += [
                    _Out(Path(out.fs_path), hashes.get(out.fs_path), in_workspace)
                    for out in stage.dvc.outs
                ]

    @property
    def missing(self) -> list[str]:
        """Dependencies that are not there and that no stage makes."""
        return list(
            dict.fromkeys(
                dep.path for deps in self.dependencies.values() for dep in deps if dep.missing
            )
        )

    def _look_at(self, named: Stage) -> tuple[str, dict[str, "HashInfo"]]:
        """What DVC will do with a stage, and the hashes of its outputs, as far as they are known.

        The same decisions as in `Stage.reproduce` and `StageCache.restore`, but by the hashes that
        the dependencies will have, not those they have now.
        """
        stage = named.dvc
        recorded = [dep.hash_info for dep in stage.deps]
        coming = [self._coming(named.name, dep) for dep in stage.deps]
        changed = stage.changed_stage() or any(
            new is not None and new != old for new, old in zip(coming, recorded, strict=True)
        )
        if None in coming:
            return (RUNS if changed else MAY_RUN), {}
        if not changed and all(out.hash_info for out in stage.outs):
            hashes = {out.fs_path: out.hash_info for out in stage.outs}
            if not any(out.status() for out in stage.outs):
                return UP_TO_DATE, hashes
            return (RESTORED, hashes) if stage.outs_cached() else (RUNS, {})
        for dep, hash_info in zip(stage.deps, coming, strict=True):
            dep.hash_info = hash_info  # what the key of a run in DVC's run cache is made of
            if dep.meta is not None:
                dep.meta.md5 = None  # as dvc.lock had it, which would go before
        runs = self._repository.stage_cache
        try:
            # Underscored, but there is no other way to ask the run cache what it would restore.
            run = runs._load(stage)
        except (FileNotFoundError, AssertionError):
            # A dependency that is to be restored first; a stage that the run cache never takes.
            return RUNS, {}
        if run is None:
            return RUNS, {}
        cached = runs._create_stage(run, wdir=stage.wdir)
        if not cached.outs_cached():
            return RUNS, {}
        return RESTORED, {out.fs_path: out.hash_info for out in cached.outs}

    def _coming(self, stage: str, dep: Any) -> "HashInfo | None":
        """The hash a dependency will have; None where a stage makes it anew, or it is missing."""
        from dvc.dependency.base import DependencyDoesNotExistError
        from dvc.dependency.param import MissingParamsError

        coming, missing = None, False
        parameters = is_parameters(dep)
        out = None if parameters else self._out_of(Path(dep.fs_path))
        if out is not None:
            if out.hash_info is not None:
                coming = self._hash_in(out, Path(dep.fs_path))
        else:
            try:
                coming = dep.get_hash()
            except (FileNotFoundError, DependencyDoesNotExistError, MissingParamsError):
                missing = True
        if not parameters:
            self.dependencies.setdefault(stage, []).append(
                Dependency(dep.def_path, Path(dep.fs_path), dep.hash_info, coming, missing, dep)
            )
        return coming

    def _out_of(self, path: Path) -> _Out | None:
        return next((out for out in self._outs if path.is_relative_to(out.path)), None)

    def _hash_in(self, out: _Out, path: Path) -> "HashInfo | None":
        """The hash of a file or folder in an output whose own hash is known."""
        if path == out.path:
            return out.hash_info
        found = self._tree(out.hash_info).get_obj(self._store, path.relative_to(out.path).parts)
        return None if found is None else found.hash_info

    def _tree(self, hash_info: "HashInfo | None") -> Any:
        from dvc_data.hashfile.tree import Tree

        return Tree.load(self._store, hash_info)

    # --- what stages read ------------------------------------------------------------------------

    def file(self, path: Path) -> Path | None:
        """Where the content lies now that the file at `path` will have; None: it is to be made."""
        out = self._out_of(path.absolute())
        if out is None or out.in_workspace:
            return path
        if out.hash_info is None:
            return None
        hash_info = self._hash_in(out, path.absolute())
        return None if hash_info is None else Path(self._store.oid_to_path(hash_info.value))

    def files(self, folder: Path) -> dict[str, str] | None:
        """File -> MD5 of what a folder within an output will have; None: it is to be made."""
        out = self._out_of(folder.absolute())
        if out is None or out.hash_info is None:
            return None
        parts = folder.absolute().relative_to(out.path).parts
        return _files(self._tree(out.hash_info).get_obj(self._store, parts))

    # --- what has changed in a dependency --------------------------------------------------------

    def recorded_files(self, dep: Dependency) -> dict[str, str] | None:
        """File -> MD5 at the last run; None where it is no folder, or only git tracks it."""
        from dvc_objects.errors import ObjectFormatError

        if not dep.recorded.isdir:
            return None
        try:
            return _files(self._tree(dep.recorded))
        except (FileNotFoundError, ObjectFormatError):
            return None  # of a folder that only git tracks, DVC keeps no list of files

    def recorded_among(
        self, dep: Dependency, versions: Iterable[Mapping[str, str]]
    ) -> dict[str, str] | None:
        """That of these versions of a folder, file -> MD5 each, which the last run had, if any.

        What .dvcignore leaves out is no file of it.
        """
        from dvc_data.hashfile.hash_info import HashInfo
        from dvc_data.hashfile.tree import Tree

        ignored = self._repository.dvcignore.is_ignored_file
        for version in versions:
            tree = Tree()
            for name, md5 in version.items():
                if not ignored(str(dep.file / name)):
                    tree.add(tuple(name.split("/")), None, HashInfo("md5", md5))
            tree.digest()
            if tree.hash_info == dep.recorded:
                return _files(tree)
        return None

    def present_files(self, dep: Dependency) -> dict[str, str] | None:
        """File -> MD5 as they are; None where it is no folder."""
        from dvc_data.hashfile.build import build

        if not dep.file.is_dir():
            return None
        of = dep.dvc
        _, _, tree = build(
            self._store, of.fs_path, of.fs, of.hash_name, ignore=of.dvcignore, dry_run=True
        )
        return _files(tree)


def _files(tree: Any) -> dict[str, str]:
    return {"/".join(parts): hash_info.value for parts, _, hash_info in tree}
