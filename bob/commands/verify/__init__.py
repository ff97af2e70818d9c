"""`bob verify`: does a stage touch what `dvc.yaml` declares, and nothing else?

DVC believes `dvc.yaml`: where a dependency is forgotten, a stale result looks fresh. So each stage
is run once more in a sandbox, a folder outside the project that holds its declared dependencies,
its declared params, and nothing else. What it needs beyond these is missing there. Its outputs must
be the bytes that the workspace has; where they are not, a second run tells whether the stage is
deterministic. A dependency that Python did not see it open is taken away, since libraries in C++ or
Rust read files unseen by Python: where the outputs stay the same bytes, it is not needed.

Two declarations for this stand in `dvc.yaml` under the key `meta`, which DVC leaves to its users: a
stage's `optional_deps` are read under some params only and never called unneeded, and an output
that is `deterministic: false` (timings) is not compared.

The sandbox is a folder and no jail: a native library that opens a file by an absolute path is not
noticed (Python's own opening of the project's files by absolute paths is).
"""

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from ruamel.yaml import YAML

from bob.commands.verify import observe
from bob.dvc import pipeline
from bob.dvc.store import copy_file
from bob.errors import LINE, BobError, shown
from bob.formats.files import read_json, sha256
from bob.formats.params import PARAMS, PIPELINE, read_yaml, select

SCHEMA = "bob/formats/params.schema.json"
# They check and dispatch, and are no stage's dependencies.
EXEMPT = (
    *("bob/__main__.py", "bob/cli.py", "bob/failures.py", "bob/formats/params.py", SCHEMA),
    "bob/formats/schemas.py",
    *("bob/__init__.py", "bob/cache/__init__.py", "bob/dvc/__init__.py"),
    "bob/formats/__init__.py",
    *("bob/miniature/__init__.py", "bob/models/__init__.py", "bob/stages/__init__.py"),
)
_OF_A_SHELL = frozenset(";&|<>$`*?(){}#~\n")
# Where libraries look for caches and settings, which are nothing that a stage declares; and what
# says where a stage has its items made, and whether.
HIDDEN_VARIABLES = ("BOB_", "DVC", "HF_", "RAY_", "TORCH_HOME", "TRANSFORMERS_", "XDG_")


@dataclass(frozen=True)
class Stage:
    """What `dvc.yaml` says of one stage; paths are relative to the project's root."""

    name: str
    arguments: tuple[str, ...]
    """Of the command line, after `python -m bob`."""
    deps: tuple[str, ...]
    optional_deps: tuple[str, ...]
    params: tuple[str, ...]
    outs: tuple[str, ...]
    varying: tuple[str, ...]
    """Outputs that are not deterministic."""

    @classmethod
    def of(cls, stage: pipeline.Stage) -> "Stage":
        """Take it from DVC, which has put in the values of the parameters.

        Raises BobError where it could not be run in a sandbox, or would reach out of that.
        """
        where = f"{PIPELINE}: stages.{stage.name}"
        if stage.folder != stage.root:
            raise BobError(
                f"{where} has a wdir; a stage that is verified runs in the project's root"
            )
        for path in (*stage.deps, *stage.outs):
            if not _is_inside(path):
                raise BobError(
                    f"{where} names {path}, which is not a path in the project, relative to its "
                    "root; nothing outside is copied or written"
                )
        others = [one.file for one in stage.params if one.file != str(PARAMS)]
        if others:
            raise BobError(f"{where}.params names {others[0]}; bob reads {PARAMS} alone")
        return cls(
            stage.name,
            _arguments(stage.command, where),
            stage.deps,
            tuple(stage.meta.get("optional_deps", ())),
            tuple(key for parameters in stage.params for key in parameters.keys),
            stage.outs,
            tuple(out for out in stage.outs if not stage.meta_of(out).get("deterministic", True)),
        )

    def output_of(self, path: str) -> str:
        """The output that the file at `path` belongs to."""
        return next(out for out in self.outs if _within_any(path, (out,)))


@dataclass(frozen=True)
class Run:
    """What came of one run of a stage in its sandbox."""

    status: int
    errors: str
    """What it wrote to stderr."""
    opened: frozenset[str]
    """Absolute paths of files that Python opened, or tried to, and of folders that it listed."""
    params: frozenset[str]
    """Keys that were read, with the sections on the way to them."""
    outputs: Mapping[str, str]
    """SHA-256 of every file in an output that is to be deterministic."""

    def reason(self) -> str:
        """The last line that it wrote to stderr."""
        lines = [line.strip() for line in self.errors.splitlines() if line.strip()]
        return lines[-1].removeprefix("Error: ") if lines else f"exit status {self.status}"


def verify(names: Sequence[str] = ()) -> bool:
    """Check the stages named, or all, and print a line for each finding; True if there is none.

    Works on the workspace as it is and changes nothing in it. Raises BobError for a stage that
    does not exist, a dependency that is not there yet, or a `dvc.yaml` that DVC refuses.
    """
    root = Path.cwd()
    stages = read_pipeline(names)
    findings = 0
    for stage in stages:
        found = check(stage, root)
        for finding in found or [f"clean ({len(stage.deps)} dependencies)"]:
            click.echo(shown(f"{stage.name}: {finding}", LINE))
        findings += len(found)
    click.echo(f"stages: {len(stages)}, findings: {findings}")
    return findings == 0


def read_pipeline(names: Sequence[str] = ()) -> list[Stage]:
    """The stages of `dvc.yaml` in the order in which they run, or those of them in `names`."""
    read_yaml(PIPELINE)  # says in one line where there is none
    with pipeline.Pipeline() as found:
        stages = [Stage.of(stage) for stage in found.stages.values()]
    known = [stage.name for stage in stages]
    for name in names:
        if name not in known:
            raise BobError(f"{PIPELINE} has no stage {name}; it has {', '.join(known)}")
    return [stage for stage in stages if not names or stage.name in names]


def check(stage: Stage, root: Path) -> list[str]:
    """Run `stage` of the project at `root` in a sandbox; what that found, a line each."""
    with tempfile.TemporaryDirectory(prefix="bob-verify-") as scratch:
        sandbox = Sandbox(stage, root, Path(scratch).resolve())
        before = sandbox.listing()
        run = sandbox.run()
        found = [
            f"needs {path}, which is not declared; add it to stages.{stage.name}.deps"
            for path in needed(stage, run, root, sandbox.folder)
        ]
        found += [
            f"opens {path} by an absolute path; open it relative to the project's root"
            for path in _project_files(run.opened, root, root)
        ]
        if run.status:
            return found or [f"fails with only what it declares: {run.reason()}"]
        written = _difference(before, sandbox.listing())
        found += [
            f"changes {paths}, which it depends on; write to outputs only"
            for paths in _grouped(path for path in written if path in before)
        ]
        found += [
            f"writes {paths}, which is not declared; add it to stages.{stage.name}.outs"
            for paths in _grouped(path for path in written if path not in before)
        ]
        found += differing(stage, run, root, sandbox)
        found += [
            f"never reads the parameter {key}; remove it from stages.{stage.name}.params"
            for key in stage.params
            if key not in run.params
        ]
        found += [
            f"does not need {dep}, without it come the same bytes; "
            f"remove it from stages.{stage.name}.deps"
            for dep in unneeded(stage, run, sandbox)
        ]
        return found


class Sandbox:
    """A folder with what one stage declares, as a DVC repository of its own with an empty cache."""

    def __init__(self, stage: Stage, root: Path, scratch: Path) -> None:
        """Fill `scratch`; raises BobError where a dependency is not in the project at `root`."""
        self.stage = stage
        self.folder = scratch / "project"
        self._home = scratch / "home"
        # A copy, so that nothing in the run is of the project itself.
        self._observe = Path(shutil.copy(observe.__file__, scratch))
        self._report = scratch / "report.json"
        self._aside = scratch / "aside"
        for folder in (self.folder, self._home):
            folder.mkdir()
        for path in (*EXEMPT, str(PIPELINE), *stage.deps):
            if not (root / path).exists():
                raise BobError(f"{path} is missing; `dvc repro` makes what {stage.name} depends on")
            _copy(root / path, self.folder / path, path)
        self._reduce_params(root)
        # Its own cache, lest a stage takes from the user's what it is to compute here.
        (self.folder / ".dvc").mkdir(exist_ok=True)
        (self.folder / ".dvc/config").write_text(
            f"[core]\nno_scm = true\nsite_cache_dir = {self._home}\n[cache]\ndir = cache\n"
        )

    def _reduce_params(self, root: Path) -> None:
        """Write `params.yaml` with the declared keys only, and a schema that requires no key."""
        reduced = select(read_yaml(root / PARAMS), self.stage.params, self.stage.name)
        with (self.folder / PARAMS).open("w", encoding="utf-8") as file:
            YAML(typ="safe").dump(reduced, file)
        schema = read_json(root / SCHEMA)
        (self.folder / SCHEMA).write_text(json.dumps(_without_required(schema)), encoding="utf-8")

    def run(self) -> Run:
        """Run the stage anew: without its outputs, as DVC does, and without what it has cached."""
        for path in (*self.stage.outs, ".dvc/cache"):
            _remove(self.folder / path)
        self._report.unlink(missing_ok=True)
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(HIDDEN_VARIABLES)
        } | {
            "HOME": str(self._home),
            "TMPDIR": str(self._home),
            "BOB_DEBUG": "1",  # a traceback's last line is the reason, and no file is kept
            "PYTHONDONTWRITEBYTECODE": "1",  # so that every import opens the module's source
            "PYTHONHASHSEED": "random",
        }
        done = subprocess.run(
            [sys.executable, "-P", str(self._observe), str(self._report), *self.stage.arguments],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        report: dict[str, list[str]] = {"opened": [], "params": []}  # of a stage that was killed
        if self._report.exists():
            report = json.loads(self._report.read_text(encoding="utf-8"))
        return Run(
            done.returncode,
            done.stderr,
            frozenset(report["opened"]),
            frozenset(report["params"]),
            hashes(self.folder, self.stage),
        )

    def run_without(self, dep: str) -> Run:
        """Run the stage with one of its dependencies taken away."""
        (self.folder / dep).rename(self._aside)
        try:
            return self.run()
        finally:
            self._aside.rename(self.folder / dep)

    def listing(self) -> dict[str, tuple[int, int]]:
        """Every file that is no output, with the time of its last change and its size."""
        found = {}
        for path in _files(self.folder):
            name = _relative(path, self.folder)
            if not _within_any(name, (".dvc", *self.stage.outs)):
                found[name] = (path.stat().st_mtime_ns, path.stat().st_size)
        return found


def needed(stage: Stage, run: Run, root: Path, folder: Path) -> list[str]:
    """Files of the project that the stage asked for in its sandbox without declaring them.

    Those that Python opened or tried to and, where the stage failed, those that its last words
    name.
    """
    asked = _project_files(run.opened, folder, root)
    if run.status:
        # Libraries that read natively: `No such file or directory: models/a/model.safetensors`.
        words = re.findall(r"[\w./+-]+", run.errors.replace(f"{folder}{os.sep}", ""))
        asked += [
            word
            for word in (word.strip("./") for word in words)
            if ("/" in word or (root / word).is_file())
            and (root / word).exists()
            and not (folder / word).exists()
        ]
    free = (*EXEMPT, str(PARAMS), str(PIPELINE))
    return sorted(
        path for path in set(asked) if not _within_any(path, (*stage.deps, *stage.outs, *free))
    )


def differing(stage: Stage, run: Run, root: Path, sandbox: Sandbox) -> list[str]:
    """What is to be said of outputs that are not the workspace's bytes.

    The workspace's outputs are those of another run, with all of the project in reach.
    """
    different = _difference(hashes(root, stage), run.outputs)
    if not different:
        return []
    changing = _difference(sandbox.run().outputs, run.outputs)
    if changing:
        return [
            f"writes other bytes to {paths} in every run; make it deterministic, or declare the "
            "output with `meta: {deterministic: false}`"
            for paths in _grouped(changing, stage.output_of)
        ]
    with pipeline.Pipeline(root) as found:
        stale = found.is_stale(stage.name)
    return [
        f"the workspace's {paths} is of other dependencies; run `dvc repro` and verify again"
        if stale
        else f"makes another {paths} than the workspace has: it reads what is not declared, or "
        f"that was made elsewhere; run `dvc repro -f -s {stage.name}` and verify again"
        for paths in _grouped(different, stage.output_of)
    ]


def unneeded(stage: Stage, run: Run, sandbox: Sandbox) -> list[str]:
    """Dependencies without which the stage makes the same outputs."""
    opened = {_relative(Path(path), sandbox.folder) for path in run.opened}
    found = []
    for dep in stage.deps:
        if dep in stage.optional_deps or any(_within_any(path, (dep,)) for path in opened):
            continue
        other = sandbox.run_without(dep)
        if other.status == 0 and other.outputs == run.outputs:
            found.append(dep)
    return found


def hashes(root: Path, stage: Stage) -> dict[str, str]:
    """SHA-256 of every file in the outputs of `stage` that are to be deterministic."""
    return {
        _relative(path, root): sha256(path)
        for out in stage.outs
        if out not in stage.varying
        for path in _files(root / out)
    }


def _difference(one: Mapping[str, object], other: Mapping[str, object]) -> list[str]:
    """The paths that only one has or that the two have different content for."""
    return sorted(path for path in one.keys() | other.keys() if one.get(path) != other.get(path))


def _grouped(paths: Iterable[str], group: Callable[[str], str] = os.path.dirname) -> Iterator[str]:
    """The first path of each group and how many there are besides: a line is enough for them."""
    for _, members in itertools.groupby(sorted(paths, key=lambda path: (group(path), path)), group):
        first, *others = members
        yield f"{first} (and {len(others)} more)" if others else first


def _project_files(opened: Iterable[str], folder: Path, root: Path) -> list[str]:
    """Of the absolute paths in `opened` those under `folder` that the project at `root` has too.

    Relative to `folder`; without what no stage declares: .git, .dvc, the environment and the
    bytecode that Python keeps beside the modules.
    """
    names = (
        _relative(Path(path), folder)
        for path in opened
        if not _within_any(path, (sys.prefix,)) and Path(path).parent.name != "__pycache__"
    )
    return [name for name in names if not name.startswith(".") and (root / name).is_file()]


def _files(path: Path) -> list[Path]:
    """The file at `path`, or all files under the folder at `path`."""
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def _relative(path: Path, folder: Path) -> str:
    """`path` relative to `folder`; outside of it, it starts with `..`."""
    return os.path.relpath(path, folder)


def _within_any(path: str, folders: Iterable[str]) -> bool:
    return any(Path(path).is_relative_to(folder) for folder in folders)


def _is_inside(path: str) -> bool:
    """Whether a path as declared leads to something in the project."""
    normal = os.path.normpath(path)
    return not (
        os.path.isabs(path)  # noqa: PTH117  a text, as DVC has it
        or "://" in path
        or normal == os.curdir
        or Path(normal).parts[0] == os.pardir
    )


def _arguments(command: str, where: str) -> tuple[str, ...]:
    """What follows `python -m bob`; raises BobError for what only a shell understands."""
    try:
        words = shlex.split(command)
    except ValueError:  # a quotation that does not end
        words = []
    if words[:3] != ["python", "-m", "bob"] or _OF_A_SHELL.intersection(command):
        raise BobError(
            f"{where}.cmd is not one `python -m bob ...`, which is all that can be verified; give "
            "each command a stage"
        )
    return tuple(words[3:])


def _copy(source: Path, target: Path, name: str) -> None:
    """Copy a file or a folder, for free where the file system can: never a link to the project.

    Raises BobError for what is neither: a pipe, a link that leads nowhere.
    """

    def copy(one: str, to: str) -> None:
        if not Path(one).is_file():
            raise BobError(f"{one}, in {name}, is no file and no folder; remove it")
        copy_file(str(one), str(to))

    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        # Bytecode would be read in the place of the sources.
        bytecode = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, target, copy_function=copy, ignore=bytecode, dirs_exist_ok=True)
    else:
        copy(str(source), str(target))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _without_required(rules: Any) -> Any:
    """A JSON schema without its demands for keys."""
    if not isinstance(rules, dict):
        return rules
    return {key: _without_required(rule) for key, rule in rules.items() if key != "required"}
