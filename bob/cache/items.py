"""The item cache: an action cache, over DVC's own object store, for what stages make one by one.

DVC reuses whole stages. Inside a stage that must run, most items (an image, an answer) may have
been made before: on another branch, in another experiment, in a run that was killed. This module
maps an item's recipe (the hash of what it is) and its maker (the hash of the code that made it) to
the content hash of its bytes. The bytes are an object in DVC's local cache, which every experiment
of a repository shares; the map is an SQLite file beside it.

An object is written before its row in the index, so a process that is killed leaves at worst an
object without a row, and loses at most the batch it was making, with what of the one before was
still on its way to the disk. An object is hashed when it is first taken, and again when its file
has changed since: DVC itself does not notice an altered object.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import TracebackType
from typing import Self

from tqdm import tqdm

from bob.cache.executors.chosen import LOCAL, executor
from bob.cache.index import Index, LastRun, Row, warn
from bob.cache.lists import Item, read_items
from bob.cache.making import ANNOUNCERS, Making, is_alive
from bob.cache.recipe import item_key
from bob.cache.trials import Trials
from bob.cache.wanted import Wanted
from bob.cache.work import Executor, Work
from bob.dvc.remote import Remote
from bob.dvc.store import ObjectStore
from bob.errors import BobError, tell

_FOLDER = "bob"  # in DVC's cache
_WRITERS = 4  # threads that hash and write objects
_TABLE = "{:<10}{:>10}{:>16}{:>10}{:>8}{:>18}{:>8}"


TRIALS = "BOB_TRIALS"
"""Environment variable; `strict` takes nothing that other code has made."""
MAKE = "BOB_MAKE"
"""Environment variable; `nothing` raises an error at the first item that is not cached."""
FETCH = "BOB_FETCH"
"""Environment variable; `nothing` takes no object from a remote: what lies there is made."""


class ItemCache:
    """The items of this repository; to be used in a `with` block.

    `stage` names whose items are taken and made. Raises BobError outside a DVC repository.
    """

    def __init__(self, stage: str = "") -> None:
        self._store = ObjectStore()
        index = self._store.folder(_FOLDER) / "items.sqlite"
        self.index = Index(index, shared=self._store.shared)
        self.stage = stage
        self._executor = LOCAL
        self._trials = Trials(self.index, stage)
        self.reused, self.made = 0, 0
        self._by_others, self._tried = 0, 0
        self._because: dict[str, None] = {}  # a set in the order of its making

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self._ended()
        self._executor.close()
        self._store.close()

    def _ended(self) -> None:
        if self.stage:
            because = "; ".join(self._because) if self.made else ""
            self.index.record_run(LastRun(self.stage, self.reused, self.made, because))

    def folder(self, name: str) -> Path:
        """A folder in DVC's cache for what is no object; it is made where it is missing."""
        return self._store.folder(f"{_FOLDER}/{name}")

    @property
    def account(self) -> str:
        """What was reused and made, in words, and what that rests on."""
        basis = ""
        if self._by_others:
            some = "" if self._by_others == self.reused else f"{self._by_others} "
            trial = f"a trial of {self._tried}" if self._tried else "an earlier trial"
            basis = f" ({some}made by earlier code, same bytes in {trial})"
        return f"{self.reused} reused{basis}, {self.made} made"

    def take(self, wanted: Wanted, work: Work, batch_size: int, progress: str = "") -> list[Row]:
        """The wanted items, in order; what is missing is made, `batch_size` of them at a time.

        Nothing of `work` is called where all items are cached. Of items with the same recipe one is
        made. Where other code has made some, a trial decides whether they are reused
        (bob/cache/trials.py). Several processes help each other (bob/cache/making.py).
        """
        recipes, maker = wanted.recipes, wanted.maker.id
        position = {recipe: number for number, recipe in reversed(list(enumerate(recipes)))}
        rows = self.found(position, maker)
        self.reused += len(rows)
        if len(rows) < len(position):
            rows |= self._by_other_makers(wanted, position, rows, work, batch_size)
        if missing := sorted(position[recipe] for recipe in position.keys() - rows.keys()):
            self._check_may_make(len(missing), len(position))
            with tqdm(total=len(missing), desc=progress, disable=None) as bar:
                rows |= Making(self, wanted, work, batch_size, bar).made(missing)
        return [rows[recipe] for recipe in recipes]

    def executor(self, work: Work) -> Executor:
        """Who makes the items; they are let go of with the cache."""
        self._executor = executor() if work.elsewhere else LOCAL
        return self._executor

    def _check_may_make(self, missing: int, total: int) -> None:
        if os.environ.get(MAKE) == "nothing":
            raise BobError(
                f"{MAKE} is `nothing`, and {missing:,} of {total:,} items of {self.stage} are not "
                "in the item cache"
            )

    def keep(self, wanted: Wanted, items: Mapping[str, bytes]) -> dict[str, Row]:
        """Recipe -> row of items that were made; they are taken in as the present maker's."""
        with ThreadPoolExecutor(_WRITERS) as writers:
            oids = writers.map(self._put, items.values())
            rows = [
                Row(recipe, wanted.maker.id, oid, len(item), self.stage)
                for (recipe, item), oid in zip(items.items(), oids, strict=True)
            ]
        self.index.add(rows)
        self.made += len(rows)
        return {row.recipe: row for row in rows}

    # --- what other code has made --------------------------------------------------------------

    def _by_other_makers(
        self,
        wanted: Wanted,
        position: Mapping[str, int],
        present: Mapping[str, Row],
        work: Work,
        batch_size: int,
    ) -> dict[str, Row]:
        """What may be reused of other makers' items, and what trials have made to know that."""
        missing = {recipe for recipe in position if recipe not in present}
        made_by: dict[str, dict[str, Row]] = {}
        for row in self.index.find(missing):
            made_by.setdefault(row.maker, {})[row.recipe] = row
        if reason := self._trials.explain(wanted, made_by):
            self._because[reason] = None
        self.index.record_maker(wanted.maker)
        if os.environ.get(TRIALS) == "strict":
            return {}
        taken: dict[str, Row] = {}
        made: dict[str, Row] = {}  # by trials, each of which speaks of all who have made the same
        same, different = self._trials.judged(wanted)
        # Those known to make the same first, then those that have made the most.
        for maker in sorted(made_by, key=lambda one: (one not in same, -len(made_by[one]), one)):
            if maker in different or (maker not in same and not wanted.on_trial):
                continue  # before anything is hashed
            rows = self._whole(
                (
                    row
                    for recipe, row in made_by[maker].items()
                    if recipe not in taken or (recipe in made and maker not in same)
                ),
                fetch=maker in same,  # a trial compares names of objects, and may fail
            )
            if rows.keys() <= taken.keys():
                continue
            if maker not in same:
                places = [position[recipe] for recipe in rows]
                chosen = self._trials.chosen(wanted, places, batch_size, made)
                if any(wanted.recipes[place] not in made for place in chosen):
                    self._check_may_make(len(missing) - len(taken), len(position))
                    new = Making(self, wanted, work, batch_size).of([chosen])
                    self._tried += len(new)
                    made |= new
                    taken |= new
                tried = {recipe: made[recipe] for recipe in rows if recipe in made}
                if unequal := self._trials.record(wanted, rows, tried):
                    self._report(wanted, rows, tried, unequal)
                    continue
                same, different = self._trials.judged(wanted)
                if maker not in same:  # one of others, recorded meanwhile, speaks against it
                    continue
                rows = self._whole(row for recipe, row in rows.items() if recipe not in taken)
            taken |= rows
            self.reused += len(rows)
            self._by_others += len(rows)
        return taken

    def _report(
        self,
        wanted: Wanted,
        theirs: Mapping[str, Row],
        ours: Mapping[str, Row],
        unequal: Sequence[str],
    ) -> None:
        one = theirs[unequal[0]]
        how = ""
        with suppress(BobError):  # where a remote is away, the line goes without
            if wanted.differing and self._whole([one]):
                how = f" ({wanted.differing(self.read(one.oid), self.read(ours[one.recipe].oid))})"
        changes = ", ".join(self._trials.code_changes(one.maker, wanted.maker))
        tell(
            f"{self.stage}: the code has changed ({changes}); {len(unequal)} of {len(ours)} items "
            f"on trial came out otherwise{how}, so none of the {len(theirs)} that the earlier code "
            "has made is reused"
        )

    # --- which objects are whole ---------------------------------------------------------------

    def found(self, recipes: Iterable[str], maker: str) -> dict[str, Row]:
        """Recipe -> row of what this maker has made; see `_whole`."""
        return self._whole(self.index.find(recipes, maker))

    def _whole(self, rows: Iterable[Row], *, fetch: bool = True) -> dict[str, Row]:
        """Recipe -> row of those whose objects are there and whole.

        What only a remote has is fetched, all of it at once, or else, without `fetch`, taken to be
        there. What is nowhere is forgotten.
        """
        rows = list(rows)
        found = self.look(rows)
        far = [n for n, row in enumerate(rows) if found[n] is None and row.remotes]
        may_fetch = _may_fetch()
        if far and may_fetch:
            asked = [rows[n] for n in far]
            if fetch:
                self._fetch(asked)
            for n, row in zip(far, self.look(asked) if fetch else asked, strict=True):
                found[n] = row
        nowhere = (
            row
            for row, whole in zip(rows, found, strict=True)
            if whole is None and (may_fetch or not row.remotes)
        )
        self.index.drop(nowhere)
        return {row.recipe: row for row in found if row}

    def look(self, rows: Iterable[Row]) -> list[Row | None]:
        """The rows, in order, None in place of those whose objects are not here, or not whole.

        An object is hashed when it is first taken, and again when it was changed since: as DVC does
        it, by inode, size and modification time. One that is damaged is named and removed.
        """
        found: list[Row | None] = []
        hashed = []
        for row in rows:
            try:
                whole = self._hashed(row)
            except (FileNotFoundError, NotADirectoryError):
                found.append(None)
                continue
            found.append(whole)
            if whole is None:
                then = "fetched from a remote" if row.remotes else "made"
                warn(
                    f"object {row.oid} of the DVC cache, {row.stage} item {row.recipe[:12]}, is "
                    f"damaged; the item is {then} again"
                )
                # As DVC does with an object that it finds damaged: no one must be given it.
                self._store.path(row.oid).unlink(missing_ok=True)
            elif whole is not row:
                hashed.append(whole)
        self.index.found_whole(hashed)
        return found

    def _fetch(self, rows: Sequence[Row]) -> None:
        """Bring these objects from the remotes that have them, if one does.

        Raises BobError where some could not be had because a remote could not be reached.
        """
        missing = {row.oid for row in rows}
        unreachable = None
        for number, name in self.index.remotes().items():
            there = missing & {row.oid for row in rows if row.remotes >> number & 1}
            if not there:
                continue
            try:
                gone, damaged = self.remote(name).fetch(there)
            except BobError as error:
                unreachable = error
                continue
            missing -= there - gone - damaged
            self.index.record_damaged(number, damaged)
            if gone or damaged:
                warn(
                    f"remote `{name}`: of {len(there):,} objects {len(gone):,} are gone and "
                    f"{len(damaged):,} damaged; what no remote has is made again"
                )
        if missing and unreachable:
            raise BobError(f"{unreachable}; with {FETCH}=nothing, what lies there is made again")

    def remote(self, name: str | None = None) -> Remote:
        """A remote of the repository, by its name in DVC's configuration, or the default one."""
        return Remote(self._store, name)

    def _hashed(self, row: Row) -> Row | None:
        """The row, with its object's new inode and time where it had to be hashed; None: damaged.

        Raises FileNotFoundError or NotADirectoryError where there is no object.
        """
        found = self._store.stat(row.oid)
        if (row.inode, row.changed, row.size) == (found.st_ino, found.st_mtime_ns, found.st_size):
            return row
        if not self._is_whole(row.oid):
            return None
        return replace(row, inode=found.st_ino, changed=found.st_mtime_ns)

    def _is_whole(self, oid: str) -> bool:
        try:
            with self._store.path(oid).open("rb") as file:
                return hashlib.file_digest(file, _md5).hexdigest() == oid
        except OSError:
            return False

    def _put(self, item: bytes) -> str:
        oid = md5_of(item)
        if not self._is_whole(oid):
            self._store.add(oid, item)
        return oid

    def read(self, oid: str) -> bytes:
        """The bytes of an object that `take` has returned."""
        return self._store.path(oid).read_bytes()

    def place(self, oids: Sequence[str], paths: Sequence[Path]) -> None:
        """Put objects into the workspace, linked as DVC's `cache.type` says or else copied.

        So DVC finds the object of every such file in its cache when it comes to commit them.
        """
        self._store.place(oids, paths)

    def copy(self, copies: Mapping[Path, Path]) -> None:
        """Write files to other places: what is a link to an object is linked again, else copied.

        Raises BobError where an object that a file is linked to was written to.
        """
        self._store.copy(copies)

    def stores_once(self) -> bool:
        """Whether what DVC takes in from the workspace then lies on the disk once, not twice."""
        return self._store.stores_once()

    def new_bytes(self, files: Iterable[Path]) -> int:
        """What copies of these files add on the disk, once DVC has taken them in."""
        return self._store.new_bytes(files)

    def content_hash(self, path: Path) -> str:
        """Hash of a folder's files, but for Markdown: a model's card decides nothing.

        Files that did not change since DVC or this function read them are not read again. Raises
        BobError where there is no such folder.
        """
        if not path.is_dir():
            raise BobError(f"{path} is missing; `dvc pull` or `bob fetch` brings it")
        return tree_hash(self._store.hashes(path))

    def reading(self, *folders: Path) -> Callable[[list[int]], dict[Path, str]]:
        """`Work.files` of what reads these folders: path and MD5 of each file in them.

        They are looked at when it is first called.
        """

        @cache
        def found() -> dict[Path, str]:
            return {
                folder / name: md5
                for folder in folders
                for name, md5 in self._store.hashes(folder).items()
            }

        return lambda numbers: found()

    def known(self, wanted: Wanted) -> dict[str, str]:
        """Recipe -> object id of what is cached, by its name: no object is read.

        Of other makers that which is known to be the same; what a trial would tell is not known.
        """
        return {row.recipe: row.oid for row in self._same(wanted) if self._is_had(row)}

    def _is_had(self, row: Row) -> bool:
        return bool(row.remotes and _may_fetch()) or self.exists(row.oid)

    def exists(self, oid: str) -> bool:
        """Whether an object is in the local cache."""
        return self._store.exists(oid)

    def present(self, wanted: Wanted) -> dict[str, Row]:
        """Recipe -> row of what `take` would reuse without a trial; damaged objects are removed."""
        return self._whole(self._same(wanted))

    def _same(self, wanted: Wanted) -> list[Row]:
        """Rows by the present maker, last, and by those known to make the same."""
        same, _ = self._trials.judged(wanted)
        rows = [row for row in self.index.find(wanted.recipes) if row.maker in same]
        return sorted(rows, key=lambda row: row.maker == wanted.maker.id)

    # --- what `bob cache` does -----------------------------------------------------------------

    def summary(self) -> list[str]:
        """Lines of a table: items and their bytes by stage, and what the last runs reused.

        `remote` are those of the items that are fetched when they are taken.
        """
        runs = self.index.last_runs()
        by_stage: dict[str, list[Row]] = {stage: [] for stage in sorted(runs)}
        for row in self.index.all():
            by_stage.setdefault(row.stage, []).append(row)
        head = ("stage", "items", "bytes", "remote", "gone", "last run reused", "made")
        lines = [_TABLE.format(*head)]
        for stage, rows in by_stage.items():
            here = [row for row in rows if self.exists(row.oid)]
            remote = sum(bool(row.remotes) for row in rows) - sum(bool(row.remotes) for row in here)
            kept = len(here) + remote
            run = runs.get(stage)
            last = (run.reused, run.made) if run else ("-", "-")
            size = sum(row.size for row in here)
            lines.append(_TABLE.format(stage, kept, size, remote, len(rows) - kept, *last))
        return [*lines, f"index: {os.path.relpath(self.index.path)}"]

    def gone(self) -> list[Row]:
        """The items whose object is no longer there, nor at a remote."""
        return [row for row in self.index.all() if not row.remotes and not self.exists(row.oid)]

    def prune(self) -> int:
        """Forget the items that `gone` returns; returns how many."""
        gone = self.gone()
        self.index.drop(gone)
        announcers = self.folder(ANNOUNCERS)
        self.index.drop_announced(lambda who: is_alive(announcers / who))
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
                rows.append(Row(item.recipe, item.maker, item.oid, size, path.stem))
        self.index.add(rows)
        return len(rows), len(listed) - len(rows)

    def _brought(self, item: Item) -> int | None:
        """Size of the item in bytes, its object now being in place; None where it is nowhere."""
        location = self._store.path(item.oid)
        if self._is_whole(item.oid):
            return location.stat().st_size
        if item.text is not None:
            content = item.text.encode()
        elif item.file is not None:
            try:
                content = Path(item.file).read_bytes()
            except (OSError, ValueError):  # ValueError: of a name that no file can have
                return None
        else:
            return None
        if md5_of(content) != item.oid:
            return None
        self._put(content)
        return len(content)


def _may_fetch() -> bool:
    return os.environ.get(FETCH) != "nothing"


_md5 = partial(hashlib.md5, usedforsecurity=False)


def md5_of(item: bytes) -> str:
    """The name of the object that holds an item."""
    return _md5(item).hexdigest()


def tree_hash(files: Mapping[str, str]) -> str:
    """`ItemCache.content_hash` of a folder with these files and their MD5s."""
    return item_key(files=sorted(one for one in files.items() if not one[0].endswith(".md")))
