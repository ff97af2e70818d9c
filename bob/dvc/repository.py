"""Opening the DVC repository around a folder."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from bob.dvc import locks
from bob.errors import UNUSABLE, BobError

if TYPE_CHECKING:
    from dvc.repo import Repo


@contextmanager
def translated(prefix: str = "") -> Iterator[None]:
    """Raise DVC's own errors, and those of its databases, as a BobError of one line."""
    from dvc.dirs import site_cache_dir
    from dvc.exceptions import DvcException
    from dvc.utils.strictyaml import YAMLSyntaxError, YAMLValidationError
    from scmrepo.exceptions import SCMError

    try:
        yield
    except (YAMLSyntaxError, YAMLValidationError) as error:
        said = " ".join(str(error).split())
        raise BobError(f"{prefix}{said}; `dvc status` shows where") from None
    except (DvcException, SCMError) as error:
        raise BobError(f"{prefix}{' '.join(str(error).split())}") from None
    except sqlite3.Error as error:
        raise BobError(f"a database of DVC's in {site_cache_dir()}: {error}; {UNUSABLE}") from None


class OnRepository:
    """What works on the repository around `folder`, or the current one; for a `with` block.

    Raises BobError where there is none.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.repository = open_repository(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the repository."""
        self.repository.close()


def open_repository(folder: Path | None = None) -> "Repo":
    """The repository around `folder`, or the current one; to be closed, or used in a `with` block.

    Frees it from what killed processes have left in its locks. Raises BobError where there is none.
    """
    # Late: a stage's module must not wait for DVC when only its functions are wanted.
    from dvc.repo import Repo

    folder = folder or Path.cwd()
    with translated(f"a DVC repository around {folder} is needed: "):
        repository = Repo(str(folder))
    locks.release_dead(repository)
    return repository
