"""What `dvc repro` will do with each stage, and what the workspace will hold when it has.

As far as it can be known: DVC decides stage by stage, after the stages before it have run.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvc.dependency.base import DependencyDoesNotExistError
from dvc.dependency.param import ParamsDependency
from dvc.repo import Repo
from dvc.repo.reproduce import plan_repro
from dvc.stage import PipelineStage
from dvc_data.hashfile.hash_info import HashInfo
from dvc_data.hashfile.tree import Tree

from bob.errors import BobError

UP_TO_DATE = "up to date"
RESTORED = "restored"
RUNS = "runs"
MAY_RUN = "may run"
"""What it depends on is being made; where that comes out as it was, DVC skips the stage."""


@dataclass(frozen=True)
class _Out:
    path: Path
    """Absolute."""
    hash_info: HashInfo | None
    """Of the content that it will have; None where the stage makes it anew."""
    in_workspace: bool


class Forecast:
    """What DVC will do, by stage, and where the content that a path will have lies now.

    Hashes what has changed in the workspace since DVC last did, writes nothing and runs nothing.
    """

    def __init__(self, repo: Repo) -> None:
        self._repo = repo
        self._store = repo.cache.local
        self._outs: list[_Out] = []
        self.states: dict[str, str] = {}
        for stage in plan_repro(repo.index.graph):
            if isinstance(stage, PipelineStage):
                self.states[stage.name], hashes = self._look_at(stage)
                self._outs += [
                    _Out(Path(out.fs_path), hashes.get(out.fs_path), self._is_up_to_date(stage))
                    for out in stage.outs
                ]

    def _is_up_to_date(self, stage: PipelineStage) -> bool:
        return self.states[stage.name] == UP_TO_DATE

    def _look_at(self, stage: PipelineStage) -> tuple[str, dict[str, HashInfo]]:
        """What DVC will do with a stage, and the hashes of its outputs, as far as they are known.

        The same decisions as in `Stage.reproduce` and `StageCache.restore`, but by the hashes that
        the dependencies will have, not those they have now.
        """
        recorded = [dep.hash_info for dep in stage.deps]
        coming = [self._coming(dep) for dep in stage.deps]
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
        runs = self._repo.stage_cache
        try:
            # Underscored, but there is no other way to ask the run cache what it would restore.
            run = runs._load(stage)
        except FileNotFoundError:  # a dependency that is to be restored first
            return RUNS, {}
        if run is None:
            return RUNS, {}
        cached = runs._create_stage(run, wdir=stage.wdir)
        if not cached.outs_cached():
            return RUNS, {}
        return RESTORED, {out.fs_path: out.hash_info for out in cached.outs}

    def _coming(self, dep: Any) -> HashInfo | None:
        """The hash a dependency will have; None where a stage makes it anew."""
        if not isinstance(dep, ParamsDependency):
            out = self._out_of(Path(dep.fs_path))
            if out is not None:
                return None if out.hash_info is None else self._hash_in(out, Path(dep.fs_path))
        try:
            return dep.get_hash()
        except (FileNotFoundError, DependencyDoesNotExistError):
            raise BobError(
                f"{dep.def_path} is missing; `dvc pull` or, for a model, `bob fetch` brings it"
            ) from None

    def _out_of(self, path: Path) -> _Out | None:
        return next((out for out in self._outs if path.is_relative_to(out.path)), None)

    def _hash_in(self, out: _Out, path: Path) -> HashInfo | None:
        """The hash of a file or folder in an output whose own hash is known."""
        if path == out.path:
            return out.hash_info
        found = Tree.load(self._store, out.hash_info).get_obj(
            self._store, path.relative_to(out.path).parts
        )
        return None if found is None else found.hash_info

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

    def files(self, folder: Path) -> Tree | None:
        """The files that a folder within an output will have; None: they are to be made."""
        out = self._out_of(folder.absolute())
        if out is None or out.hash_info is None:
            return None
        parts = folder.absolute().relative_to(out.path).parts
        return Tree.load(self._store, out.hash_info).get_obj(self._store, parts)
