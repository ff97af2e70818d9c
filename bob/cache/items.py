"""The item cache: an action cache, over DVC's own object store, for what stages make one by one.

DVC reuses whole stages. Inside a stage that must run, most items (an image, an answer) may have
been made before: on another branch, in another experiment, in a run that was killed. This module
maps an item's recipe (the hash of what it is) and its maker (the hash of the code that made it) to
the content hash of its bytes. The bytes are an object in DVC's local cache, which every experiment
of a repository shares; the map is an SQLite file beside it.

An object is written before its row in the index, so a process that is killed leaves at worst an
object without a row, and loses at most the batch it was making, with what of the one before was
still on its way to the disk. Whatever is taken is hashed first: DVC itself does not notice an
altered object.
"""

import hashlib
import os
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from bob.cache.index import Index, Row, Trial, warn
from bob.cache.lists import Item, read_items
from bob.cache.recipe import Maker, item_key
from bob.errors import BobError

PATIENCE = 2.0
_TABLE = "{:<10}{:>10}{:>16}{:>8}{:>18}{:>8}"


TRIALS = "BOB_TRIALS"
"""Environment variable; `strict` takes nothing that other code has made."""


def _nothing(_: Sequence[int]) -> Iterable[int]:
    return ()


@dataclass(frozen=True)
class Wanted:
    """Items of one family, and what would make them now."""

    recipes: Sequence[str]
    family: str
    maker: Maker
    covering: Callable[[Sequence[int]], Iterable[int]] = _nothing
    """Of these positions in `recipes`, those that a trial should not leave out."""
    differing: Callable[[bytes, bytes], str] | None = None
    """How far two items are apart, in words."""
    on_trial: bool = True
    """Whether a trial may be made; not where it costs as much as what it could save."""


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
        self._by_others, self._tried = 0, 0

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

    @property
    def account(self) -> str:
        """What was reused and made, in words, and what that rests on."""
        basis = ""
        if self._by_others:
            basis = f"{self._by_others} of them made by earlier code, same bytes"
            basis += f" in a trial of {self._tried}" if self._tried else " in an earlier trial"
        return f"{self.reused} reused{f' ({basis})' if basis else ''}, {self.made} made"

    def take(
        self,
        wanted: Wanted,
        make: Callable[[list[int]], list[Any]],
        batch_size: int,
        progress: str = "",
        encode: Callable[[Any], bytes] = bytes,
    ) -> list[Row]:
        """The wanted items, in order; what is missing is made.

        `make` gets positions in `wanted.recipes`, at most `batch_size` of them, and returns the
        items; it is not called where all items are cached. Of items with the same recipe one is
        made. `encode` turns an item into its bytes. A batch is encoded and kept in threads while
        the next one is made.

        Where other code has made items of these recipes, one full batch of them is made again and
        compared byte for byte. If all are equal, the two makers are taken to make the same in the
        whole family, now and later, and its other items are reused; if one is not, none is.

        Several processes help each other: each announces a batch before it makes it and goes round
        what another has announced. What is still missing in the end it waits for, but no longer
        than PATIENCE of its own slowest batches, and then makes it: the other may have died.
        """
        recipes, maker = wanted.recipes, wanted.maker.id
        position = {recipe: number for number, recipe in reversed(list(enumerate(recipes)))}
        rows = self._present(position, maker)
        self.reused += len(rows)
        if len(rows) < len(position):
            self.index.record_maker(wanted.maker)
            rows |= self._by_other_makers(wanted, position, rows, make, batch_size, encode)
        waiting = deque(recipe for recipe in dict.fromkeys(recipes) if recipe not in rows)
        left_to_others: list[str] = []
        slowest, give_up = 0.0, None
        kept: Future[dict[str, Row]] | None = None
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
                    ours = self.index.start(candidates, maker)
                    batch += [recipe for recipe in candidates if recipe in ours]
                    left_to_others += [recipe for recipe in candidates if recipe not in ours]
                if not batch:
                    found = self._present(left_to_others, maker)
                    self.reused += len(found)
                    rows |= found
                    bar.update(len(found))
                    left_to_others = [recipe for recipe in left_to_others if recipe not in found]
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
                    items = make([position[recipe] for recipe in batch])
                    encoded = [encoders.submit(encode, item) for item in items]
                    if kept:  # before the next, so that no more than two are in memory
                        rows |= kept.result()
                    kept = keeper.submit(self._keep, batch, maker, encoded)
                    slowest = max(slowest, time.monotonic() - began)
                    bar.update(len(batch))
            if kept:
                rows |= kept.result()
        return [rows[recipe] for recipe in recipes]

    def _keep(
        self, batch: Sequence[str], maker: str, encoded: Sequence[Future[bytes]]
    ) -> dict[str, Row]:
        return self._keep_bytes(batch, maker, [future.result() for future in encoded])

    def _keep_bytes(
        self, batch: Sequence[str], maker: str, items: Sequence[bytes]
    ) -> dict[str, Row]:
        rows = [
            Row(recipe, maker, self._put(item), len(item), self._stage)
            for recipe, item in zip(batch, items, strict=True)
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
        make: Callable[[list[int]], list[Any]],
        batch_size: int,
        encode: Callable[[Any], bytes],
    ) -> dict[str, Row]:
        """What may be reused of other makers' items, and what trials have made to know that."""
        if os.environ.get(TRIALS) == "strict":
            return {}
        missing = {recipe for recipe in position if recipe not in present}
        made_by: dict[str, dict[str, Row]] = {}
        for row in self.index.find(missing):
            made_by.setdefault(row.maker, {})[row.recipe] = row
        taken: dict[str, Row] = {}
        same, different = self._judged(wanted)
        # Those known to make the same first, then those that have made the most.
        for maker in sorted(made_by, key=lambda one: (one not in same, -len(made_by[one]), one)):
            if maker in different or (maker not in same and not wanted.on_trial):
                continue  # before anything is hashed
            rows = self._whole(row for recipe, row in made_by[maker].items() if recipe not in taken)
            if not rows:
                continue
            if maker not in same:
                tried = self._try(wanted, position, rows, make, batch_size, encode)
                taken |= tried
                same, different = self._judged(wanted)
                if maker not in same:
                    continue
                rows = {recipe: row for recipe, row in rows.items() if recipe not in tried}
            taken |= rows
            self.reused += len(rows)
            self._by_others += len(rows)
        return taken

    def _judged(self, wanted: Wanted) -> tuple[set[str], set[str]]:
        """The makers that make the same in this family as the present one, and those that do not.

        To make the same bytes is transitive: what is the same as a maker that is the same, is.
        """
        trials = self.index.trials(wanted.family)
        same = {wanted.maker.id}
        while more := {
            maker
            for trial in trials
            if trial.same and len({trial.one, trial.other} & same) == 1
            for maker in {trial.one, trial.other} - same
        }:
            same |= more
        different = {
            maker
            for trial in trials
            if not trial.same and {trial.one, trial.other} & same
            for maker in {trial.one, trial.other} - same
        }
        return same, different

    def _try(
        self,
        wanted: Wanted,
        position: Mapping[str, int],
        rows: Mapping[str, Row],
        make: Callable[[list[int]], list[Any]],
        batch_size: int,
        encode: Callable[[Any], bytes],
    ) -> dict[str, Row]:
        """Make a batch of another maker's items, compare, and record what came of it."""
        places = sorted(position[recipe] for recipe in rows)
        by_hash = sorted(places, key=lambda place: wanted.recipes[place])
        chosen = list(dict.fromkeys([places[0], places[-1], *wanted.covering(places), *by_hash]))[
            :batch_size
        ]
        batch = [wanted.recipes[place] for place in chosen]
        items = [encode(item) for item in make(chosen)]
        made = self._keep_bytes(batch, wanted.maker.id, items)
        unequal = [recipe for recipe in batch if made[recipe].oid != rows[recipe].oid]
        other = rows[batch[0]].maker
        trial = Trial(wanted.maker.id, other, len(batch) - len(unequal), len(batch))
        self.index.record_trial(wanted.family, trial, batch)
        self._tried += len(batch)
        if unequal:
            how = ""
            if wanted.differing:
                new = items[batch.index(unequal[0])]
                how = f" ({wanted.differing(self.read(rows[unequal[0]].oid), new)})"
            tqdm.write(
                f"{self._stage}: the code has changed, and {len(unequal)} of {len(batch)} items "
                f"on trial came out otherwise{how}; none of the {len(rows)} that the earlier code "
                "has made is reused",
                file=sys.stderr,
            )
        return made

    def _present(self, recipes: Iterable[str], maker: str) -> dict[str, Row]:
        """Recipe -> row of what this maker has made; see `_whole`."""
        return self._whole(self.index.find(recipes, maker))

    def _whole(self, rows: Iterable[Row]) -> dict[str, Row]:
        """Recipe -> row of those whose objects are there and whole; the others are forgotten."""
        present, lost = {}, []
        for row in rows:
            state = self._state(row.oid)
            if state == "whole":
                present[row.recipe] = row
                continue
            lost.append(row)
            if state == "damaged":
                warn(
                    f"object {row.oid} of the DVC cache, {row.stage} item {row.recipe[:12]}, is "
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

    def known(self, wanted: Wanted) -> dict[str, str]:
        """Recipe -> object id of what is cached, by its name: no object is read.

        Of other makers that which is known to be the same; what a trial would tell is not known.
        """
        same, _ = self._judged(wanted)
        return {
            row.recipe: row.oid
            for row in self.index.find(wanted.recipes)
            if row.maker in same and self._store.exists(row.oid)
        }

    # --- what `bob cache` does -----------------------------------------------------------------

    def summary(self) -> list[str]:
        """Lines of a table: items and their bytes by stage, and what the last runs reused."""
        gone = {(row.recipe, row.maker) for row in self.gone()}
        runs = self.index.last_runs()
        by_stage: dict[str, list[Row]] = {stage: [] for stage in sorted(runs)}
        for row in self.index.all():
            by_stage.setdefault(row.stage, []).append(row)
        lines = [_TABLE.format("stage", "items", "bytes", "gone", "last run reused", "made")]
        for stage, rows in by_stage.items():
            kept = [row for row in rows if (row.recipe, row.maker) not in gone]
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
                rows.append(Row(item.recipe, item.maker, item.oid, size, path.stem))
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
