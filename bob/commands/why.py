"""`bob why`: what makes a stage run, down to the parameter, the file or the function.

`dvc status` names the dependencies that changed; this says what it is in them that did. Everything
is compared with what dvc.lock recorded of the last run. Nothing is run.
"""

import ast
import hashlib
import io
import itertools
import json
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import click

from bob.cache.items import ItemCache
from bob.cache.recipe import Maker, bare, maker_of
from bob.dvc.forecast import MAY_RUN, RUNS, UP_TO_DATE, Dependency, Forecast
from bob.dvc.pipeline import CHANGED, MISSING, NEW, UNCACHED, Parameters, Pipeline
from bob.errors import LINE, BobError, shown
from bob.formats.params import PARAMS

T = TypeVar("T")

LOCK = "dvc.lock"
MODULE_LEVEL = "module level"
CONDITIONS = {
    NEW: "now makes {}",
    MISSING: "{} is missing",
    CHANGED: "{} was changed by hand",
    UNCACHED: "{} is not in DVC's cache",
}
MOST = 3  # files, or parts of a module, that are named; the others are counted


def why(names: Sequence[str] = ()) -> None:
    """Print the causes for the stages named, or for all, and what their last runs reused.

    Raises BobError where a stage is unknown, or something is missing without which DVC knows none.
    """
    with Pipeline() as pipeline:
        for name in names:
            if name not in pipeline.stages:
                raise BobError(f"{name}: no such stage; there are {', '.join(pipeline.stages)}")
        causes, notes = Causes(pipeline, Forecast(pipeline)), _item_notes()
        for name in dict.fromkeys(names or pipeline.stages):
            found, idle = causes.of(name)
            causes_of_it = [cause.text for cause in found] or [UP_TO_DATE]
            for line in (*causes_of_it, *idle, *notes(name)):
                click.echo(shown(f"{name}: {line}", LINE))


# --- the pipeline --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cause:
    """One thing that makes a stage run."""

    text: str
    short: str
    """Without details."""
    stage: str = ""
    """The stage before it that makes what has changed; empty where it is no stage."""


def _cause(text: str) -> Cause:
    return Cause(text, text)


class Causes:
    """Why the stages of a pipeline run."""

    def __init__(self, pipeline: Pipeline, forecast: Forecast) -> None:
        self._stages, self._forecast = pipeline.stages, forecast
        self._makers = {
            out: name for name, stage in self._stages.items() for out in stage.out_files
        }
        self._git = _History(pipeline.root)

    def of(self, name: str) -> tuple[list[Cause], list[str]]:
        """What makes a stage run, and in words what has changed and makes nothing run."""
        stage = self._stages[name]
        if stage.lock is None:
            return [_cause("has never run here")], []
        found = [_cause("cmd changed")] if stage.command_changed else []
        gone = _undeclared(stage.deps, stage.lock)
        for dep in self._forecast.dependencies.get(name, ()):
            found += self._of_dep(name, dep, gone)
        parameters = stage.params
        found += [_cause(text) for one in parameters for text in _of_params(one)]
        found += [_cause(CONDITIONS[how].format(path)) for path, how in stage.changed_outs()]
        idle = [f"no longer depends on {path}, which makes nothing run" for path in gone]
        return found, idle + _undeclared_params(parameters, stage.lock)

    def _of_dep(self, name: str, dep: Dependency, gone: dict[str, str | None]) -> list[Cause]:
        """Takes out of `gone`, dependencies no longer declared, what has only moved."""
        path = dep.path
        if dep.missing:
            return [_cause(f"{path} is missing")]
        if not dep.recorded:
            return [Cause(self._of_new(path, dep.file, gone), path)]
        if dep.coming == dep.recorded:
            return []
        maker = self._maker_of(dep.file)
        if maker is not None:
            text = self._of_upstream(name, path, maker, known=dep.coming is not None)
            return [Cause(text, path, maker)]
        if path.startswith("bob/") and path.endswith(".py"):
            return [Cause(f"{path}{self._of_module(path, dep.file, dep.md5)}", path)]
        return [Cause(self._of_files(dep), path)]

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

    def _of_module(self, path: str, file: Path, recorded: str | None) -> str:
        old = self._git.version(path, recorded) if recorded else None
        if old is None:
            return " changed (its earlier version is not in git)"
        try:
            return f": {module_changes(old, file.read_text('utf-8'))}"
        except (SyntaxError, UnicodeDecodeError):
            return " changed (one of its versions is not Python)"

    def _of_files(self, dep: Dependency) -> str:
        old, new = self._forecast.recorded_files(dep), self._forecast.present_files(dep)
        if old is None and dep.recorded.isdir:  # only git tracks it
            versions = itertools.chain([{}], self._git.folders(dep.path))
            old = self._forecast.recorded_among(dep, versions)
        if old is None or new is None:
            return f"{dep.path} changed"
        return f"{dep.path}: {listed(sorted(compare(old, new)))}"


def _undeclared(declared: Sequence[str], lock: Mapping[str, Any]) -> dict[str, str | None]:
    """Path -> MD5 of what dvc.lock has as a dependency and dvc.yaml has not."""
    return {
        one["path"]: one.get("md5") for one in lock.get("deps", ()) if one["path"] not in declared
    }


def _undeclared_params(parameters: Sequence[Parameters], lock: Mapping[str, Any]) -> list[str]:
    declared = {one.file: one.keys for one in parameters}
    return [
        f"no longer depends on parameter {_named(file, key)}, which makes nothing run"
        for file, values in lock.get("params", {}).items()
        if declared.get(file) != ()  # a file without names is declared as a whole
        for key in values
        if key not in declared.get(file, ())
    ]


# --- parameters ----------------------------------------------------------------------------------


def _of_params(of: Parameters) -> Iterator[str]:
    """The parameters that changed, each with its value then and now."""
    for key in dict.fromkeys((*of.keys, *of.present, *of.recorded)):
        if key not in of.recorded:
            yield f"now depends on parameter {_named(of.file, key)}"
            continue
        if key not in of.present:
            yield f"parameter {_named(of.file, key)} is missing"
            continue
        old, new = dict(_leaves(key, of.recorded[key])), dict(_leaves(key, of.present[key]))
        for leaf in dict.fromkeys((*old, *new)):
            if leaf not in old or leaf not in new or old[leaf] != new[leaf]:
                values = [_shown(side[leaf]) if leaf in side else "none" for side in (old, new)]
                yield f"parameter {_named(of.file, leaf)} {' -> '.join(values)}"


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

    def folders(self, path: str) -> Iterator[dict[str, str]]:
        """The versions of a folder, file -> MD5 each."""
        for commit in dict.fromkeys(self._commits(path)):
            packed = self._run("archive", "--format=tar", commit, "--", f"./{path}")
            if packed is None:  # it was not there
                continue
            with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
                yield {
                    PurePosixPath(member.name).relative_to(path).as_posix(): _md5(archive, member)
                    for member in archive.getmembers()
                    if member.isfile()
                }

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


def _md5(archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = archive.extractfile(member)
    return hashlib.md5(file.read() if file else b"", usedforsecurity=False).hexdigest()


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
            run = runs[stage]
            because = f", because: {run.because}" if run.because else ""
            yield f"(last run: {run.reused:,} items reused, {run.made:,} made{because})"
        differences = [maker.changes(present_maker(maker)) for maker in makers.get(stage, [])]
        nearest = min(differences, key=len, default=[])
        if nearest:
            yield f"(its items were made by other code: {', '.join(nearest)})"

    return notes


def present_maker(then: Maker) -> Maker:
    """The modules and libraries of a maker as they are now; without those that are gone."""
    return Maker(
        dict(_present(then.code, lambda name: maker_of((name,), ()).code)),
        dict(_present(then.libraries, lambda name: maker_of((), (name,)).libraries)),
    )


def _present(
    names: Iterable[str], of: Callable[[str], Mapping[str, str]]
) -> Iterator[tuple[str, str]]:
    for name in names:
        with suppress(FileNotFoundError, ModuleNotFoundError):  # PackageNotFoundError is one
            yield name, of(name)[name]
