"""DVC's remotes: its objects there, and beside them a folder of bob's own files.

Whatever DVC speaks serves, but for what cannot be listed (HTTP) and for versioned buckets, where
DVC itself keeps no objects.
"""

import re
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bob.dvc.repository import translated
from bob.dvc.store import ObjectStore
from bob.errors import BobError
from bob.formats.files import sha256

_FOLDER = ("bob", "index")  # beside DVC's own `files` and `runs`
_FILE = re.compile(r"[0-9a-f]{64}\.jsonl\.gz")
_ASKED_ONE_BY_ONE = 1000  # more objects than that are looked up in a list of what is there
_AT_ONCE = 5000  # objects that are handed to DVC together


class _DamagedError(Exception):
    pass


class Remote:
    """A remote of the repository, named as in DVC's configuration; its default one, if not named.

    Every method raises BobError, in one line, where the remote cannot be reached or used.
    """

    def __init__(self, store: ObjectStore, name: str | None = None) -> None:
        self.name = name or store.repository.config["core"].get("remote") or ""
        if not self.name:
            raise BobError(
                "DVC has no default remote here; `dvc remote add -d NAME URL` adds one, or name "
                "another with -r"
            )
        self._url = store.repository.config["remote"].get(self.name, {}).get("url", "")
        self._scheme = self._url.partition(":")[0]
        with self._told(), translated():
            found = store.repository.cloud.get_remote(self.name)
            self._url = found.fs.unstrip_protocol(found.path)
            self._fs = found.fs
            if found.worktree or found.fs.version_aware:
                raise BobError(f"remote `{self.name}` is versioned by its cloud: not for objects")
            self._odb, self._local = found.odb, store.repository.cache.local
        self._folder = self._fs.join(found.path, *_FOLDER)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except BobError:
            raise
        except Exception as error:
            from dvc.fs import RemoteMissingDepsError

            # Of any kind: each cloud's library has its own, and is not imported here.
            told = " ".join(str(error).split()) or type(error).__name__
            if isinstance(error, NotImplementedError):
                told = "it cannot be listed, which bob needs"
            elif isinstance(error, ImportError | RemoteMissingDepsError):
                told += f"; `pip install 'dvc[{self._scheme}]'` brings what it needs"
            raise BobError(f"remote `{self.name}` ({self._url}): {told}") from None

    # --- objects ---------------------------------------------------------------------------------

    def lacking(self, sizes: Mapping[str, int], again: Collection[str] = ()) -> set[str]:
        """Those of the objects, given with their bytes, that are not there.

        What is there with other bytes is removed: where a remote has no atomic writes, whoever was
        killed has left half a file. So is what is to be brought `again`.
        """
        with self._told():
            there = self.sizes(sizes)
            wrong = {oid for oid, size in there.items() if size != sizes[oid] or oid in again}
            for oid in wrong:
                self._odb.delete(oid)
            return sizes.keys() - there.keys() | wrong

    def bring(self, oids: Collection[str]) -> None:
        """Bring objects of the local cache there that are not there."""
        with self._told():
            ordered = sorted(oids)
            for start in range(0, len(ordered), _AT_ONCE):
                self._bring(ordered[start : start + _AT_ONCE])

    def _bring(self, oids: list[str]) -> None:
        from dvc.fs.callbacks import TqdmCallback

        failed: dict[str, BaseException] = {}
        with TqdmCallback(desc=f"to {self.name}", unit="object") as bar:
            self._odb.add(
                [self._local.oid_to_path(oid) for oid in oids],
                self._local.fs,
                oids,
                check_exists=False,
                on_error=failed.setdefault,
                batch_size=self._fs.jobs,
                callback=bar,
            )
        if failed:
            raise next(iter(failed.values()))

    def fetch(self, oids: Collection[str]) -> tuple[set[str], set[str]]:
        """Bring objects into the local cache; returns which are gone there, and which damaged.

        An object is hashed before it is put into its place.
        """
        from dvc_objects.executors import ThreadPoolExecutor

        gone, damaged = set(), set()

        def fetch_one(oid: str) -> None:
            try:
                self._fetch(oid)
            except FileNotFoundError:
                gone.add(oid)
            except _DamagedError:
                damaged.add(oid)

        with (
            self._told(),
            tqdm(total=len(oids), desc=f"from {self.name}", unit="object", disable=None) as bar,
            ThreadPoolExecutor(self._fs.jobs, cancel_on_error=True) as pool,
        ):
            for _ in pool.imap_unordered(fetch_one, oids):
                bar.update()
        if gone and not self.files():  # nothing is gone from a disk that is not mounted
            raise BobError(
                f"remote `{self.name}` ({self._url}) has no items (is it the right one?)"
            )
        return gone, damaged

    def _fetch(self, oid: str) -> None:
        from dvc_data.hashfile.hash import file_md5
        from dvc_objects.fs.local import localfs
        from dvc_objects.fs.utils import as_atomic

        target = self._local.oid_to_path(oid)
        self._local.makedirs(str(Path(target).parent))
        with as_atomic(localfs, target) as draft:
            self._fs.get_file(self._odb.oid_to_path(oid), draft)
            if file_md5(draft) != oid:
                raise _DamagedError
        self._local.protect(target)

    def sizes(self, oids: Collection[str]) -> dict[str, int]:
        """Oid -> bytes, of those objects that are there."""
        with self._told():
            if len(oids) >= _ASKED_ONE_BY_ONE:
                wanted = set(oids)
                prefixes = {oid[:2] for oid in wanted}
                return {oid: size for oid, size in self._listed(prefixes) if oid in wanted}
            self._fs.fs.invalidate_cache()  # some clouds' libraries remember what they have listed
            asked = list(oids)
            infos = self._fs.info(
                [self._odb.oid_to_path(oid) for oid in asked],
                batch_size=self._fs.jobs,
                return_exceptions=True,
            )
            there = {}
            for oid, info in zip(asked, infos, strict=True):
                if not isinstance(info, Exception):
                    there[oid] = info["size"]
                elif not isinstance(info, FileNotFoundError):
                    raise info
            return there

    def objects(self) -> Iterator[tuple[str, int]]:
        """Name and bytes of all objects that are there."""
        with self._told():
            yield from self._listed(f"{number:02x}" for number in range(256))

    def _listed(self, prefixes: Iterable[str]) -> Iterator[tuple[str, int]]:
        from dvc_objects.executors import ThreadPoolExecutor

        def list_prefix(prefix: str) -> list[tuple[str, int]]:
            entries = self._list(self._fs.join(self._odb.path, prefix))
            return [(prefix + self._fs.name(entry["name"]), entry["size"]) for entry in entries]

        self._fs.fs.invalidate_cache()
        with ThreadPoolExecutor(self._fs.jobs, cancel_on_error=True) as pool:
            for listed in pool.imap_unordered(list_prefix, prefixes):
                yield from listed

    def _list(self, folder: str) -> list[dict[str, Any]]:
        with suppress(FileNotFoundError):
            return list(self._fs.ls(folder, detail=True))
        return []

    # --- bob's files beside them -----------------------------------------------------------------

    def files(self) -> set[str]:
        """The names of bob's files there; each is the SHA-256 of its bytes, and an ending."""
        with self._told():
            self._fs.fs.invalidate_cache()
            names = {self._fs.name(entry["name"]) for entry in self._list(self._folder)}
            return {name for name in names if _FILE.fullmatch(name)}

    def get(self, names: Iterable[str], folder: Path) -> set[str]:
        """Copy files into a local folder; returns which of them are damaged, and are not there.

        Raises FileNotFoundError where one is gone.
        """
        from dvc_objects.executors import ThreadPoolExecutor

        def get_one(name: str) -> str | None:
            self._fs.get_file(self._fs.join(self._folder, name), str(folder / name))
            if sha256(folder / name) == name.partition(".")[0]:
                return None
            (folder / name).unlink()
            return name

        with self._told():
            try:
                with ThreadPoolExecutor(self._fs.jobs, cancel_on_error=True) as pool:
                    return {name for name in pool.imap_unordered(get_one, names) if name}
            except FileNotFoundError as error:
                gone = error
        raise gone

    def put(self, path: Path) -> None:
        """Copy a local file there, named as here; no one ever sees half of it."""
        from dvc_objects.fs.base import ObjectFileSystem

        target = self._fs.join(self._folder, path.name)
        with self._told():
            if isinstance(self._fs, ObjectFileSystem):  # whose writes are atomic
                self._fs.put_file(str(path), target)
                return
            draft = f"{target}.{secrets.token_hex(8)}.tmp"
            self._fs.put_file(str(path), draft)
            self._fs.move(draft, target)

    def remove(self, names: Iterable[str]) -> None:
        """Remove files, and drafts that someone who was killed has left more than a day ago."""
        with self._told():
            drafts = [
                name
                for entry in self._list(self._folder)
                if (name := self._fs.name(entry["name"])).endswith(".tmp")
            ]
            for name in (*names, *drafts):
                path = self._fs.join(self._folder, name)
                with suppress(FileNotFoundError):
                    if name not in drafts or _is_old(self._fs.modified(path)):
                        self._fs.rm_file(path)


def _is_old(time: datetime) -> bool:
    return datetime.now(UTC) - time > timedelta(days=1)
