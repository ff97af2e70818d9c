"""(Recipe, maker) -> object: the index of the item cache, an SQLite file."""

import json
import os
import sqlite3
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from bob.cache.recipe import Maker
from bob.errors import BobError

T = TypeVar("T")

VERSION = 2  # of what a recipe and a maker are hashes of, and of the tables
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS items (recipe TEXT NOT NULL, maker TEXT NOT NULL, oid TEXT NOT"
    " NULL, size INTEGER NOT NULL, stage TEXT NOT NULL, PRIMARY KEY (recipe, maker)) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS started (recipe TEXT NOT NULL, maker TEXT NOT NULL,"
    " PRIMARY KEY (recipe, maker)) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS runs (stage TEXT PRIMARY KEY, reused INTEGER NOT NULL,"
    " made INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS makers (id TEXT PRIMARY KEY, parts TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS trials (family TEXT NOT NULL, one TEXT NOT NULL, other TEXT NOT"
    " NULL, equal INTEGER NOT NULL, compared INTEGER NOT NULL, recipes TEXT NOT NULL,"
    " PRIMARY KEY (family, one, other)) WITHOUT ROWID",
    f"PRAGMA user_version = {VERSION}",
)
_AMONG = "IN (SELECT value FROM json_each(?))"  # one parameter, however many recipes


@dataclass(frozen=True)
class Row:
    """One item in the index."""

    recipe: str
    maker: str
    """Who really made it, also where another maker's run has taken it."""
    oid: str
    """MD5 of the item's bytes: the name of its object in DVC's cache."""
    size: int
    """Bytes."""
    stage: str


@dataclass(frozen=True)
class Trial:
    """How a batch that two makers have made came out."""

    one: str
    other: str
    equal: int
    """Items that came out byte for byte the same."""
    compared: int

    @property
    def same(self) -> bool:
        """Whether the two are taken to make the same in the whole family."""
        return self.equal == self.compared


class Index:
    """(Recipe, maker) -> object, in an SQLite file that several processes use at once.

    Every method is one transaction on a connection of its own, in SQLite's default journal mode,
    which also works on shared folders. A damaged file is moved aside with a warning. If `shared`,
    users of the same group can write to it.
    """

    def __init__(self, path: Path, *, shared: bool = False) -> None:
        self.path, self._shared = path, shared

    def find(self, recipes: Iterable[str], maker: str | None = None) -> list[Row]:
        """The rows of those recipes that are there, of one maker or of all."""
        asked = json.dumps(list(recipes))
        query = f"SELECT recipe, maker, oid, size, stage FROM items WHERE recipe {_AMONG}"
        values: tuple[str, ...] = (asked,)
        if maker is not None:
            query, values = f"{query} AND maker = ?", (asked, maker)
        return self._transact(lambda db: [Row(*row) for row in db.execute(query, values)])

    def all(self) -> list[Row]:
        """All rows, by stage, recipe and maker."""
        query = "SELECT recipe, maker, oid, size, stage FROM items ORDER BY stage, recipe, maker"
        return self._transact(lambda db: [Row(*row) for row in db.execute(query)])

    def start(self, recipes: Sequence[str], maker: str) -> set[str]:
        """Announce that `maker` is about to make these.

        Returns those that it has neither made nor announced before, which are now announced.
        """
        asked = json.dumps(recipes)

        def announce(db: sqlite3.Connection) -> set[str]:
            taken = db.execute(
                f"SELECT recipe FROM items WHERE maker = ? AND recipe {_AMONG} "
                f"UNION SELECT recipe FROM started WHERE maker = ? AND recipe {_AMONG}",
                (maker, asked, maker, asked),
            )
            free = set(recipes) - {recipe for (recipe,) in taken}
            db.executemany("INSERT INTO started VALUES (?, ?)", [(one, maker) for one in free])
            return free

        return self._transact(announce)

    def add(self, rows: Sequence[Row]) -> None:
        """Record items, whose objects must be in place already."""

        def insert(db: sqlite3.Connection) -> None:
            db.executemany(
                "INSERT OR REPLACE INTO items VALUES (?, ?, ?, ?, ?)",
                [(row.recipe, row.maker, row.oid, row.size, row.stage) for row in rows],
            )
            db.executemany(
                "DELETE FROM started WHERE recipe = ? AND maker = ?",
                [(row.recipe, row.maker) for row in rows],
            )

        self._transact(insert)

    def drop(self, rows: Iterable[Row]) -> None:
        """Forget these rows, unless they have come to name another object since."""
        named = [(row.recipe, row.maker, row.oid) for row in rows]
        self._transact(
            lambda db: db.executemany(
                "DELETE FROM items WHERE recipe = ? AND maker = ? AND oid = ?", named
            )
        )

    def record_maker(self, maker: Maker) -> None:
        """Remember what a maker consists of."""
        parts = json.dumps({"code": dict(maker.code), "libraries": dict(maker.libraries)})
        self._transact(
            lambda db: db.execute("INSERT OR IGNORE INTO makers VALUES (?, ?)", (maker.id, parts))
        )

    def makers(self) -> dict[str, list[Maker]]:
        """Stage -> the makers of its items, those whose parts are known here."""
        query = (
            "SELECT DISTINCT stage, parts FROM items JOIN makers ON maker = id ORDER BY stage, id"
        )

        def read(db: sqlite3.Connection) -> dict[str, list[Maker]]:
            makers: dict[str, list[Maker]] = {}
            for stage, parts in db.execute(query):
                makers.setdefault(stage, []).append(Maker(**json.loads(parts)))
            return makers

        return self._transact(read)

    def record_trial(self, family: str, trial: Trial, recipes: Sequence[str]) -> None:
        """Remember how a trial on the items of these `recipes` came out."""
        values = (family, trial.one, trial.other, trial.equal, trial.compared, json.dumps(recipes))
        self._transact(
            lambda db: db.execute("INSERT OR REPLACE INTO trials VALUES (?, ?, ?, ?, ?, ?)", values)
        )

    def trials(self, family: str) -> list[Trial]:
        """All trials in a family."""
        query = "SELECT one, other, equal, compared FROM trials WHERE family = ?"
        return self._transact(lambda db: [Trial(*row) for row in db.execute(query, (family,))])

    def drop_started(self) -> None:
        """Forget what was announced: who is alive announces again, batch by batch."""
        self._transact(lambda db: db.execute("DELETE FROM started"))

    def record_run(self, stage: str, reused: int, made: int) -> None:
        """Remember what the last run of a stage reused and made."""
        self._transact(
            lambda db: db.execute(
                "INSERT OR REPLACE INTO runs VALUES (?, ?, ?)", (stage, reused, made)
            )
        )

    def last_runs(self) -> dict[str, tuple[int, int]]:
        """Stage -> how many items its last run reused and made."""
        query = "SELECT stage, reused, made FROM runs"
        return self._transact(
            lambda db: {stage: (reused, made) for stage, reused, made in db.execute(query)}
        )

    def _transact(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do `work` in one transaction; raises BobError where the file cannot be used."""
        try:
            try:
                return self._attempt(work)
            except sqlite3.DatabaseError as error:
                if not _damaged(error):
                    raise
                self._move_aside()
                return self._attempt(work)
        except sqlite3.Error as error:
            path = os.path.relpath(self.path)
            raise BobError(f"{path}, the index of the item cache: {error}") from None

    def _attempt(self, work: Callable[[sqlite3.Connection], T]) -> T:
        if self._shared and not self.path.exists():
            self.path.touch()
            self.path.chmod(0o664)  # SQLite gives its journal the same
        # A minute, because a process may have been put to sleep in its transaction.
        with closing(sqlite3.connect(self.path, timeout=60, isolation_level=None)) as db:
            if db.execute("PRAGMA user_version").fetchone() != (VERSION,):
                self._lay_out(db)
            # At once for writing: two that read first and write then would lock each other out.
            db.execute("BEGIN IMMEDIATE")
            result = work(db)
            db.execute("COMMIT")
            return result

    def _lay_out(self, db: sqlite3.Connection) -> None:
        """Make the tables; those of another version go, since its keys mean something else.

        Version 1 had one hash of recipe and maker together, which cannot be taken apart.
        """
        db.execute("BEGIN IMMEDIATE")
        if db.execute("PRAGMA user_version").fetchone() != (VERSION,):  # by another meanwhile
            for table in ("items", "started", "runs", "makers", "trials"):
                db.execute(f"DROP TABLE IF EXISTS {table}")
            for statement in _SCHEMA:
                db.execute(statement)
        db.execute("COMMIT")

    def _move_aside(self) -> None:
        try:
            # Another process may have moved it aside in the meantime, and this be the new one.
            healthy = self._attempt(lambda db: db.execute("PRAGMA quick_check").fetchall())
            if healthy == [("ok",)]:
                return
        except sqlite3.DatabaseError as error:
            if not _damaged(error):
                raise
        damaged = self.path.with_suffix(".damaged")
        self.path.with_name(f"{self.path.name}-journal").unlink(missing_ok=True)
        self.path.replace(damaged)
        warn(
            f"{os.path.relpath(self.path)} was damaged and is now {damaged.name}; items are made "
            "again, but for those of this workspace after `bob cache adopt`"
        )


def _damaged(error: sqlite3.DatabaseError) -> bool:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the rest are details
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def warn(message: str) -> None:
    """A line on stderr that a progress bar does not swallow."""
    tqdm.write(f"warning: {message}", file=sys.stderr)
