"""The item cache: an action cache, over DVC's own object store, for what stages make one by one.

DVC reuses whole stages. Inside a stage that must run, most items (an image, an answer) may have
been made before: on another branch, in another experiment, in a run that was killed. This module
maps an item's key, the hash of everything that decides it, to the content hash of the item's bytes.
The bytes are an object in DVC's local cache, which every experiment of a repository shares; the map
is an SQLite file beside it.

An object is written before its row in the index, so a process that is killed leaves at worst an
object without a row, and loses at most the batch it was making, with what of the one before was
still on its way to the disk. Whatever is taken is hashed first: DVC itself does not notice an
altered object.
"""

import hashlib
import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from bob.cache.index import Index, Row, warn
from bob.cache.lists import Item, read_items
from bob.cache.recipe import item_key
from bob.errors import BobError

PATIENCE = 2.0
_TABLE = "{:<10}{:>10}{:>16}{:>8}{:>18}{:>8}"


class ItemCache:
    """The items of this repository; to be used in a `with` block.

    `stage` names whose items are taken and made. Raises BobError outside a DVC repository.
    """

    def __init__(self, stage: str = "") -> None:
        # Late: a stage's module must not wait for DVC when only its functions are wanted.
        from dvc.exceptions import DvcException
        from dvc.repo import Repo

        try:
            self._repo = Repo()
        except DvcException as error:
            raise BobError(
                f"the item cache needs a DVC repository around {Path.cwd()}: "
                f"{' '.join(str(error).split())}"
            ) from None
        self._store = self._repo.cache.local
        shared = self._repo.config["cache"].get("shared") == "group"
        self.index = Index(self.folder() / "items.sqlite", shared=shared)
        self._stage = stage
        self.reused, self.made = 0, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None and self._stage:
            self.index.record_run(self._stage, self.reused, self.made)
        self._repo.close()

    def folder(self, name: str = "") -> Path:
        """A folder in DVC's cache for what is no object; it is made where it is missing."""
        path = Path(self._repo.cache.local_cache_dir, "bob", name)
        self._store.makedirs(str(path))  # the store's own, so that a shared cache stays shared
        return path

    def take(
        self,
        keys: Sequence[str],
        make: Callable[[list[int]], list[Any]],
        batch_size: int,
        progress: str = "",
        encode: Callable[[Any], bytes] = bytes,
    ) -> list[str]:
        """The object ids of the items with these keys, in order; what is missing is made.

        `make` gets positions in `keys`, at most `batch_size` of them, and returns the items; it is
        not called where all items are there. Of items with the same key one is made. `encode` turns
        an item into its bytes. A batch is encoded and kept in threads while the next one is made.

        Several processes help each other: each announces a batch before it makes it and goes round
        what another has announced. What is still missing in the end it waits for, but no longer
        than PATIENCE of its own slowest batches, and then makes it: the other may have died.
        """
        position = {key: number for number, key in reversed(list(enumerate(keys)))}
        oids = self._present(position)
        self.reused += len(oids)
        waiting = deque(key for key in dict.fromkeys(keys) if key not in oids)
        left_to_others: list[str] = []
        slowest, give_up = 0.0, None
        kept: Future[dict[str, str]] | None = None
        with (
            tqdm(total=len(waiting), desc=progress, disable=None if waiting else True) as bar,
            ThreadPoolExecutor() as encoders,
            ThreadPoolExecutor(1) as keeper,
        ):
            while waiting or left_to_others:
                batch: list[str] = []
                while waiting and len(batch) < batch_size:
                    candidates = [
                        waiting.popleft() for _ in range(min(batch_size - len(batch), len(waiting)))
                    ]
                    ours = self.index.start(candidates)
                    batch += [key for key in candidates if key in ours]
                    left_to_others += [key for key in candidates if key not in ours]
                if not batch:
                    found = self._present(left_to_others)
                    self.reused += len(found)
                    oids |= found
                    bar.update(len(found))
                    left_to_others = [key for key in left_to_others if key not in found]
                    if found or give_up is None:
                        give_up = time.monotonic() + PATIENCE * slowest
                    if left_to_others and time.monotonic() < give_up:
                        time.sleep(slowest / 10)
                        continue
                    # Whoever comes here finds the same few: they must not all take the same.
                    random.shuffle(left_to_others)
                    batch, left_to_others = left_to_others[:batch_size], left_to_others[batch_size:]
                if batch:
                    began = time.monotonic()
                    items = make([position[key] for key in batch])
                    encoded = [encoders.submit(encode, item) for item in items]
                    if kept:  # before the next, so that no more than two are in memory
                        oids |= kept.result()
                    kept = keeper.submit(self._keep, batch, encoded)
                    slowest = max(slowest, time.monotonic() - began)
                    bar.update(len(batch))
            if kept:
                oids |= kept.result()
        return [oids[key] for key in keys]

    def _keep(self, batch: Sequence[str], encoded: Sequence[Future[bytes]]) -> dict[str, str]:
        items = [future.result() for future in encoded]
        rows = [
            Row(key, self._put(item), len(item), self._stage)
            for key, item in zip(batch, items, strict=True)
        ]
        self.index.add(rows)
        self.made += len(rows)
        return {row.key: row.oid for row in rows}

    def _present(self, keys: Iterable[str]) -> dict[str, str]:
        """Key -> object id of the items whose objects are there and whole; the others' rows go."""
        present, lost = {}, []
        for row in self.index.find(keys):
            state = self._state(row.oid)
            if state == "whole":
                present[row.key] = row.oid
                continue
            lost.append(row)
            if state == "damaged":
                warn(
                    f"object {row.oid} of the DVC cache, {row.stage} item {row.key[:12]}, is "
                    "damaged; the item is made again"
                )
                # As DVC does with an object that it finds damaged: no one must be given it.
                Path(self._store.oid_to_path(row.oid)).unlink(missing_ok=True)
        if lost:
            self.index.drop(lost)
        return present

    def _state(self, oid: str) -> str:
        """whole, damaged or missing."""
        from dvc_data.hashfile.hash import file_md5

        try:
            actual = file_md5(self._store.oid_to_path(oid), self._store.fs)
        except (FileNotFoundError, NotADirectoryError):
            return "missing"
        except OSError:
            return "damaged"
        return "whole" if actual == oid else "damaged"

    def _put(self, item: bytes) -> str:
        oid = hashlib.md5(item, usedforsecurity=False).hexdigest()
        if self._state(oid) != "whole":
            self._store.add_bytes(oid, item)
            self._store.protect(self._store.oid_to_path(oid))
        return oid

    def read(self, oid: str) -> bytes:
        """The bytes of an object that `take` has returned."""
        return Path(self._store.oid_to_path(oid)).read_bytes()

    def place(self, oids: Sequence[str], paths: Sequence[Path]) -> None:
        """Put objects into the workspace, linked as DVC's `cache.type` says or else copied.

        So DVC finds the object of every such file in its cache when it comes to commit them.
        """
        from dvc_objects.fs.generic import transfer

        for folder in {path.parent for path in paths}:
            folder.mkdir(parents=True, exist_ok=True)
        try:
            transfer(
                self._store.fs,
                [self._store.oid_to_path(oid) for oid in oids],
                self._store.fs,
                [str(path.absolute()) for path in paths],
                links=list(dict.fromkeys([*self._store.cache_types, "copy"])),
            )
        except FileNotFoundError as error:
            raise BobError(
                f"{error.filename} went from the DVC cache while the stage ran; run it again"
            ) from None

    def content_hash(self, path: Path) -> str:
        """Hash of a folder's files, but for Markdown: a model's card decides nothing.

        Files that did not change since DVC or this function read them are not read again. Raises
        BobError where there is no such folder.
        """
        from dvc_data.hashfile.build import build

        if not path.is_dir():
            raise BobError(f"{path} is missing; `dvc pull` or `bob fetch` brings it")
        _, _, tree = build(
            self._store,
            str(path.absolute()),
            self._store.fs,
            "md5",
            dry_run=True,
            ignore=self._repo.dvcignore,
        )
        return tree_hash(tree)

    def known(self, keys: Iterable[str]) -> dict[str, str]:
        """Key -> object id of the items that are there, by their names: none is read."""
        return {row.key: row.oid for row in self.index.find(keys) if self._store.exists(row.oid)}

    # --- what `bob cache` does -----------------------------------------------------------------

    def summary(self) -> list[str]:
        """Lines of a table: items and their bytes by stage, and what the last runs reused."""
        gone = {row.key for row in self.gone()}
        runs = self.index.last_runs()
        by_stage: dict[str, list[Row]] = {stage: [] for stage in sorted(runs)}
        for row in self.index.all():
            by_stage.setdefault(row.stage, []).append(row)
        lines = [_TABLE.format("stage", "items", "bytes", "gone", "last run reused", "made")]
        for stage, rows in by_stage.items():
            kept = [row for row in rows if row.key not in gone]
            reused, made = runs.get(stage, ("-", "-"))
            size = sum(row.size for row in kept)
            lines.append(_TABLE.format(stage, len(kept), size, len(rows) - len(kept), reused, made))
        return [*lines, f"index: {os.path.relpath(self.index.path)}"]

    def gone(self) -> list[Row]:
        """The items whose object is no longer there."""
        return [row for row in self.index.all() if not self._store.exists(row.oid)]

    def prune(self) -> int:
        """Forget the items whose object is no longer there; returns how many."""
        gone = self.gone()
        self.index.drop(gone)
        self.index.drop_started()
        return len(gone)

    def adopt(self, path: Path) -> tuple[int, int]:
        """Take the items that a stage's file of items lists into the index.

        Where an object is missing, it is made from the text or the file that the list names.
        Returns how many were taken and how many have no bytes to be found. Raises BobError where
        the file is no such list.
        """
        listed = read_items(path)
        rows = []
        for item in listed:
            size = self._brought(item)
            if size is not None:
                rows.append(Row(item.key, item.oid, size, path.stem))
        self.index.add(rows)
        return len(rows), len(listed) - len(rows)

    def _brought(self, item: Item) -> int | None:
        """Size of the item in bytes, its object now being in place; None where it is nowhere."""
        location = Path(self._store.oid_to_path(item.oid))
        if self._state(item.oid) == "whole":
            return location.stat().st_size
        if item.text is not None:
            content = item.text.encode()
        elif item.file is not None and Path(item.file).is_file():
            content = Path(item.file).read_bytes()
        else:
            return None
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != item.oid:
            return None
        self._put(content)
        return len(content)


def tree_hash(tree: Any) -> str:
    """`ItemCache.content_hash` of a folder that DVC has hashed: `dvc_data`'s Tree."""
    files = sorted(
        ("/".join(name), hash_info.value)
        for name, _, hash_info in tree
        if not name[-1].endswith(".md")
    )
    return item_key(files=files)
