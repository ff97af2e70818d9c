"""`bob why`: what makes a stage run, down to the parameter, the file or the function.

`dvc status` names the dependencies that changed; this says what it is in them that did. Everything
is compared with what dvc.lock recorded of the last run. Nothing is run.
"""

import ast
import hashlib
import json
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import click
from dvc.dependency.param import MissingParamsError, ParamsDependency
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.repo.reproduce import plan_repro
from dvc.stage import PipelineStage
from dvc_data.hashfile.build import build
from dvc_data.hashfile.hash_info import HashInfo
from dvc_data.hashfile.tree import Tree
from dvc_objects.errors import ObjectFormatError

from bob.cache.items import ItemCache
from bob.cache.recipe import Maker, bare, maker_of
from bob.commands.plan.forecast import MAY_RUN, RUNS, UP_TO_DATE, Forecast
from bob.errors import BobError
from bob.formats.params import PARAMS

T = TypeVar("T")

LOCK = "dvc.lock"
MODULE_LEVEL = "module level"
MOST = 3  # files, or parts of a module, that are named; the others are counted


def why(names: Sequence[str] = ()) -> None:
    """Print the causes for the stages named, or for all, and what their last runs reused.

    Raises BobError where a stage is unknown, or something is missing without which DVC knows none.
    """
    try:
        with Repo() as repo:
            for line in lines(repo, names):
                click.echo(line)
    except DvcException as error:
        raise BobError(f"DVC: {' '.join(str(error).split())}") from None


def lines(repo: Repo, names: Sequence[str] = ()) -> Iterator[str]:
    """The lines that `why` prints."""
    pipeline = _Pipeline(repo)
    for name in names:
        if name not in pipeline.stages:
            raise BobError(f"{name}: no such stage; there are {', '.join(pipeline.stages)}")
    notes = _item_notes()
    for name in dict.fromkeys(names or pipeline.stages):
        for line in (*pipeline.causes(name), *notes(name)):
            yield f"{name}: {line}"


# --- the pipeline --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Dep:
    """A dependency as the forecast has seen it."""

    of: Any
    recorded: HashInfo
    """In dvc.lock; empty where it was not declared then."""
    coming: HashInfo | None
    missing: bool = False


class _Watched(Forecast):
    """Keeps what the forecast was made of, and goes on where a dependency is missing."""

    def __init__(self, repo: Repo) -> None:
        self.deps: dict[str, list[_Dep]] = {}
        super().__init__(repo)

    def _coming(self, dep: Any) -> HashInfo | None:
        coming, missing = None, False
        try:
            coming = super()._coming(dep)
        except (BobError, MissingParamsError):
            missing = True
        # Kept now: the forecast writes into the dependencies when it asks the run cache.
        seen = _Dep(dep, dep.hash_info, coming, missing)
        self.deps.setdefault(dep.stage.name, []).append(seen)
        return coming


class _Pipeline:
    """The stages of a repository, and why they run."""

    def __init__(self, repo: Repo) -> None:
        self._repo = repo
        self.stages = {
            stage.name: stage
            for stage in plan_repro(repo.index.graph)
            if isinstance(stage, PipelineStage)
        }
        self._makers = {
            Path(out.fs_path): name for name, stage in self.stages.items() for out in stage.outs
        }
        self._git = _History(Path(repo.root_dir))

    @cached_property
    def _forecast(self) -> _Watched:
        return _Watched(self._repo)

    def causes(self, name: str) -> list[str]:
        """One line a cause; a single one where there is none."""
        stage = self.stages[name]
        lock = stage.dvcfile.lockfile_contents.get("stages", {}).get(name)
        if lock is None:
            return ["has never run here"]
        found = ["cmd changed"] if stage.cmd_changed else []
        gone = _undeclared(stage, lock)
        for dep in self._forecast.deps.get(name, ()):
            if isinstance(dep.of, ParamsDependency):
                found += _of_params(dep.of, dep.recorded.value or {})
            else:
                found += self._of_dep(name, dep, gone)
        found += self._of_outs(stage)
        # DVC pays no heed to these.
        found = found or [UP_TO_DATE]
        found += [f"no longer depends on {path}, which makes nothing run" for path in gone]
        return found + _undeclared_params(stage, lock)

    def _of_dep(self, name: str, dep: _Dep, gone: dict[str, str | None]) -> list[str]:
        """Takes out of `gone`, dependencies no longer declared, what has only moved."""
        path = dep.of.def_path
        if dep.missing:
            return [f"{path} is missing"]
        if not dep.recorded:
            return [self._of_new(path, Path(dep.of.fs_path), gone)]
        if dep.coming == dep.recorded:
            return []
        maker = self._maker_of(Path(dep.of.fs_path))
        if maker is not None:
            return [self._of_upstream(name, path, maker, known=dep.coming is not None)]
        if path.startswith("bob/") and path.endswith(".py"):
            return [f"{path}{self._of_module(path, Path(dep.of.fs_path), dep.recorded.value)}"]
        return [self._of_files(dep)]

    def _of_new(self, path: str, file: Path, gone: dict[str, str | None]) -> str:
        moved = [one for one in gone if one.endswith(".py") and Path(one).name == file.name]
        if len(moved) != 1 or not (md5 := gone[moved[0]]):
            return f"now depends on {path}"
        del gone[moved[0]]
        return f"{path}, which was {moved[0]}{self._of_module(moved[0], file, md5)}"

    def _maker_of(self, path: Path) -> str | None:
        return next((name for out, name in self._makers.items() if path.is_relative_to(out)), None)

    def _of_upstream(self, name: str, path: str, maker: str, *, known: bool) -> str:
        states = self._forecast.states
        if states[maker] == UP_TO_DATE:
            return f"{path}, made anew by {maker} since"
        if known:
            return f"{path}, made by {maker} (see there)"
        runs = states[maker] == RUNS
        if states[name] == MAY_RUN:  # what is made may come out as it was
            return f"may run: {path} {'is' if runs else 'may be'} made again by {maker}"
        return f"{path}, {'made' if runs else 'which may be made'} by {maker} (see there)"

    def _of_module(self, path: str, file: Path, recorded: str) -> str:
        old = self._git.version(path, recorded)
        if old is None:
            return " changed (its earlier version is not in git)"
        try:
            return f": {module_changes(old, file.read_text('utf-8'))}"
        except (SyntaxError, UnicodeDecodeError):
            return " changed (one of its versions is not Python)"

    def _of_files(self, dep: _Dep) -> str:
        path, old, new = dep.of.def_path, self._recorded_tree(dep), _present_tree(dep.of)
        if old is None or new is None:
            return f"{path} changed"
        changes = compare(
            {"/".join(parts): hash_info for parts, _, hash_info in old},
            {"/".join(parts): hash_info for parts, _, hash_info in new},
        )
        return f"{path}: {listed(sorted(changes))}"

    def _recorded_tree(self, dep: _Dep) -> Tree | None:
        if not dep.recorded.isdir:
            return None
        try:
            return Tree.load(dep.of.local_cache, dep.recorded)
        except (FileNotFoundError, ObjectFormatError):
            return None  # of a folder that only git tracks, DVC keeps no list of files

    def _of_outs(self, stage: Any) -> Iterator[str]:
        for out in stage.outs:
            if not out.hash_info:
                yield f"now makes {out.def_path}"
            elif not out.exists:
                yield f"{out.def_path} is missing"
            elif out.workspace_status():
                yield f"{out.def_path} was changed by hand"
            elif out.status():
                yield f"{out.def_path} is not in DVC's cache"


def _undeclared(stage: Any, lock: Mapping[str, Any]) -> dict[str, str | None]:
    """Path -> MD5 of what dvc.lock has as a dependency and dvc.yaml has not."""
    declared = {dep.def_path for dep in stage.deps}
    return {
        one["path"]: one.get("md5") for one in lock.get("deps", ()) if one["path"] not in declared
    }


def _undeclared_params(stage: Any, lock: Mapping[str, Any]) -> list[str]:
    declared = {dep.def_path: dep.params for dep in stage.deps if isinstance(dep, ParamsDependency)}
    return [
        f"no longer depends on parameter {_named(file, key)}, which makes nothing run"
        for file, values in lock.get("params", {}).items()
        if declared.get(file) != []  # a file without names is declared as a whole
        for key in values
        if key not in declared.get(file, ())
    ]


def _present_tree(dep: Any) -> Tree | None:
    if not Path(dep.fs_path).is_dir():
        return None
    _, _, tree = build(
        dep.local_cache, dep.fs_path, dep.fs, dep.hash_name, ignore=dep.dvcignore, dry_run=True
    )
    return tree


# --- parameters ----------------------------------------------------------------------------------


def _of_params(dep: ParamsDependency, recorded: Mapping[str, Any]) -> Iterator[str]:
    """The parameters that changed, each with its value then and now."""
    now = dep.read_params()
    for key in dict.fromkeys((*dep.params, *now, *recorded)):
        if key not in recorded:
            yield f"now depends on parameter {_named(dep.def_path, key)}"
            continue
        if key not in now:
            yield f"parameter {_named(dep.def_path, key)} is missing"
            continue
        old, new = dict(_leaves(key, recorded[key])), dict(_leaves(key, now[key]))
        for leaf in dict.fromkeys((*old, *new)):
            if leaf not in old or leaf not in new or old[leaf] != new[leaf]:
                values = [_shown(side[leaf]) if leaf in side else "none" for side in (old, new)]
                yield f"parameter {_named(dep.def_path, leaf)} {' -> '.join(values)}"


def _named(file: str, key: str) -> str:
    return key if file == PARAMS.name else f"{file}:{key}"


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(f"{key}.{name}", inner)
    else:
        yield key, value


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


# --- modules -------------------------------------------------------------------------------------


class _History:
    """Earlier versions of files, in the git repository around a folder, if there is one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._found: dict[tuple[str, str], str | None] = {}

    def version(self, path: str, md5: str) -> str | None:
        """The text of the version with this MD5; None where git has none."""
        if (path, md5) not in self._found:
            texts = (self._run("show", f"{commit}:./{path}") for commit in self._commits(path))
            self._found[path, md5] = next(
                (
                    text.decode("utf-8", "replace")
                    for text in texts
                    if text is not None and hashlib.md5(text).hexdigest() == md5
                ),
                None,
            )
        return self._found[path, md5]

    def _commits(self, path: str) -> Iterator[str]:
        """Where to look: what was committed together with dvc.lock is mostly what ran."""
        yield from self._lock_commit
        # On all branches and in experiments: a stage may have run there, or have been restored.
        yield from (self._run("log", "--all", "--format=%H", "--", path) or b"").decode().split()

    @cached_property
    def _lock_commit(self) -> list[str]:
        return (self._run("log", "-1", "--format=%H", "--", LOCK) or b"").decode().split()

    def _run(self, *arguments: str) -> bytes | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=self._folder, capture_output=True, check=False
            )
        except FileNotFoundError:  # no git on this machine
            return None
        return done.stdout if done.returncode == 0 else None


def module_changes(old: str, new: str) -> str:
    """What changed from one version of a module to another, by function; comments do not count.

    Raises SyntaxError where one of them is not Python.
    """
    if bare(old) == bare(new):
        return "comments or layout only"
    changes = compare(_definitions(old), _definitions(new))
    # The methods of a class that came or went as a whole go without saying.
    whole = {name for name, how in changes if how != "changed"}
    changes = [(name, how) for name, how in changes if _class_of(name) not in whole]
    return listed(changes) if changes else "its definitions are in another order"


def _class_of(name: str) -> str:
    return name.rpartition(".")[0]


def _definitions(source: str) -> dict[str, str]:
    """Name -> bare code: functions, methods, classes without their methods, and the rest."""
    found: dict[str, list[str]] = {}
    rest: list[ast.stmt] = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            methods = [one for one in node.body if isinstance(one, _FUNCTIONS)]
            node.body = [one for one in node.body if one not in methods] or [ast.Pass()]
            found.setdefault(node.name, []).append(ast.unparse(node))
            for method in methods:
                found.setdefault(f"{node.name}.{method.name}", []).append(ast.unparse(method))
        elif isinstance(node, _FUNCTIONS):
            found.setdefault(node.name, []).append(ast.unparse(node))
        else:
            rest.append(node)
    found[MODULE_LEVEL] = [ast.unparse(ast.Module(rest, []))]
    # Several of a name: a property's getter and setter, or overloads.
    return {name: "\n".join(map(bare, texts)) for name, texts in found.items()}


_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


# --- lists of changes ----------------------------------------------------------------------------


def compare(old: Mapping[str, T], new: Mapping[str, T]) -> list[tuple[str, str]]:
    """(Name, what happened to it), in the order of the new, then of what is gone."""
    return [
        (name, "added" if name not in old else "changed" if name in new else "removed")
        for name in dict.fromkeys((*new, *old))
        if name not in old or name not in new or old[name] != new[name]
    ]


def listed(changes: Sequence[tuple[str, str]]) -> str:
    """The first few of them in words, and how many more there are."""
    words = ", ".join(f"{name} {how}" for name, how in changes[:MOST])
    return words if len(changes) <= MOST else f"{words} and {len(changes) - MOST:,} more"


# --- items ---------------------------------------------------------------------------------------


def _item_notes() -> Callable[[str], Iterator[str]]:
    """What there is to say of a stage's items."""
    with ItemCache() as cache:
        runs, makers = cache.index.last_runs(), cache.index.makers()

    def notes(stage: str) -> Iterator[str]:
        if stage in runs:
            reused, made = runs[stage]
            yield f"(last run: {reused:,} items reused, {made:,} made)"
        differences = [maker_changes(maker) for maker in makers.get(stage, [])]
        nearest = min(differences, key=len, default=[])
        if nearest:
            yield f"(its items were made by other code: {', '.join(nearest)})"

    return notes


def maker_changes(then: Maker) -> list[str]:
    """What of a maker of items is no longer what is here: libraries and modules."""
    libraries = _parts_changed(then.libraries, lambda name: maker_of((), (name,)).libraries)
    modules = _parts_changed(then.code, lambda name: maker_of((name,), ()).code)
    return [
        *(f"{name} {old} -> {new}" for name, old, new in libraries),
        *(f"bob/{name.replace('.', '/')}.py" for name, _, _ in modules),
    ]


def _parts_changed(
    then: Mapping[str, str], present: Callable[[str], Mapping[str, str]]
) -> Iterator[tuple[str, str, str]]:
    for name, old in then.items():
        try:
            new = present(name)[name]
        except (FileNotFoundError, ModuleNotFoundError):  # PackageNotFoundError is one
            new = "none"
        if new != old:
            yield name, old, new
