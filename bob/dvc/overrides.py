"""Parameters as `dvc exp run -S` would set them, with the file of parameters left alone."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from bob.errors import BobError, first_line

if TYPE_CHECKING:
    from dvc.repo import Repo


@contextmanager
def overridden(params: Path, overrides: Sequence[str]) -> Iterator[Path]:
    """A copy of the file `params` with the `overrides` of DVC's `-S` in it, as long as the block.

    The file itself where there are none. Raises BobError naming an override that DVC would refuse,
    or that stands for several experiments.
    """
    if not overrides:
        yield params
        return
    with TemporaryDirectory() as folder:
        copy = Path(shutil.copy(params, folder))
        for override in overrides:
            _apply(override, copy)
        yield copy


def _apply(override: str, file: Path) -> None:
    from dvc.exceptions import InvalidArgumentError
    from dvc.utils.cli_parse import to_path_overrides
    from dvc.utils.hydra import apply_overrides, to_hydra_overrides
    from hydra.errors import OverrideParseException

    ((path, texts),) = to_path_overrides([override]).items()
    if path != file.name:
        raise BobError(f"-S {override}: parameters of {file.name} can be set, not of {path}")
    try:
        sweeps = any(one.is_sweep_override() for one in to_hydra_overrides(texts))
        if not sweeps:
            apply_overrides(str(file), texts)
    except (InvalidArgumentError, OverrideParseException) as error:
        raise BobError(f"-S {override}: {first_line(error.__cause__ or error)}") from None
    if sweeps:
        raise BobError(
            f"-S {override} stands for several experiments; give one value, or a list as [0,1]"
        )


def read_instead(repository: "Repo", path: Path, other: Path) -> None:
    """Have DVC read the file `other` where it reads the one at `path`."""
    from dvc.fs import LocalFileSystem

    class Overlaid(LocalFileSystem):
        def open(self, file: Any, mode: Any = "r", **kwargs: Any) -> Any:
            same = os.path.abspath(file) == str(path.absolute())  # noqa: PTH100 - resolves nothing
            return super().open(str(other) if same else file, mode, **kwargs)

    repository.fs = Overlaid()
