"""Run one stage and note what Python sees it touch: what `bob verify` starts in its sandbox.

Started by its path, not imported: whatever it imported of bob, the stage would seem to import.
"""

import json
import os
import runpy
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

READS = {"open", "os.listdir", "os.scandir"}


class OnlyHere(PathFinder):
    """Finds bob in the current folder or not at all.

    Python would go on to look where bob is installed, which is the project itself where that is an
    editable installation, and a module missing here would be found there.
    """

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: Any = None
    ) -> ModuleSpec | None:
        """The spec of a module of bob, None for others; raises ModuleNotFoundError."""
        if fullname.partition(".")[0] != "bob":
            return None
        spec = super().find_spec(fullname, path, target)
        if spec is None:
            # An import is a read of the module's file, also one that fails.
            sys.audit("open", f"{fullname.replace('.', '/')}.py", "r", 0)
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
        return spec


def main(report: Path, arguments: Sequence[str]) -> None:
    """Run `python -m bob ARGUMENTS` here; write which files and parameters it asked for."""
    opened: set[str] = set()
    read: set[str] = set()
    here = Path.cwd()

    def hook(event: str, details: tuple[Any, ...]) -> None:
        if event in READS and isinstance(details[0], str | bytes | os.PathLike):
            opened.add(os.path.abspath(os.fsdecode(details[0])))  # noqa: PTH100  resolves no link

    sys.path.insert(0, str(here))
    sys.meta_path.insert(0, OnlyHere)
    sys.addaudithook(hook)
    _record_params(read)
    sys.argv = ["bob", *arguments]
    try:
        runpy.run_module("bob", run_name="__main__")
    finally:
        content = {"opened": sorted(opened.copy()), "params": sorted(read)}
        report.write_text(json.dumps(content), encoding="utf-8")


def _record_params(read: set[str]) -> None:
    from bob.formats.params import Params

    get = Params.__getattr__

    def recording(self: Params, name: str) -> Any:
        value = get(self, name)
        read.add(f"{self._path}{name}")
        return value

    Params.__getattr__ = recording  # type: ignore[method-assign]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
