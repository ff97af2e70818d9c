"""Key -> object: the index of the item cache, an SQLite file that several processes use."""

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

from bob.errors import BobError

T = TypeVar("T")

_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS items (key TEXT PRIMARY KEY, oid TEXT NOT NULL,"
    " size INTEGER NOT NULL, stage TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS started (key TEXT PRIMARY KEY) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS runs (stage TEXT PRIMARY KEY, reused INTEGER NOT NULL,"
    " made INTEGER NOT NULL) WITHOUT ROWID",
)
_AMONG = "IN (SELECT value FROM json_each(?))"  # one parameter, however many keys


@dataclass(frozen=True)
class Row:
    """One item in the index."""

    key: str
    oid: str
    """MD5 of the item's bytes: the name of its object in DVC's cache."""
    size: int
    """Bytes."""
    stage: str


class Index:
    """Key -> object, in an SQLite file that several processes use at once.

    Every method is one transaction on a connection of its own, in SQLite's default journal mode,
    which also works on shared folders. A damaged file is moved aside with a warning. If `shared`,
    users of the same group can write to it.
    """

    def __init__(self, path: Path, *, shared: bool = False) -> None:
        self.path, self._shared = path, shared

    def find(self, keys: Iterable[str]) -> list[Row]:
        """The rows of those keys that are there."""
        asked = json.dumps(list(keys))
        query = f"SELECT key, oid, size, stage FROM items WHERE key {_AMONG}"
        return self._transact(lambda db: [Row(*row) for row in db.execute(query, (asked,))])

    def all(self) -> list[Row]:
        """All rows, by stage and key."""
        query = "SELECT key, oid, size, stage FROM items ORDER BY stage, key"
        return self._transact(lambda db: [Row(*row) for row in db.execute(query)])

    def start(self, keys: Sequence[str]) -> set[str]:
        """Announce that these are about to be made.

        Returns those of them that nobody has made or announced before, which are now announced.
        """
        asked = json.dumps(keys)

        def announce(db: sqlite3.Connection) -> set[str]:
            taken = db.execute(
                f"SELECT key FROM items WHERE key {_AMONG} "
                f"UNION SELECT key FROM started WHERE key {_AMONG}",
                (asked, asked),
            )
            free = set(keys) - {key for (key,) in taken}
            db.executemany("INSERT INTO started VALUES (?)", [(key,) for key in free])
            return free

        return self._transact(announce)

    def add(self, rows: Sequence[Row]) -> None:
        """Record items, whose objects must be in place already."""

        def insert(db: sqlite3.Connection) -> None:
            db.executemany(
                "INSERT OR REPLACE INTO items VALUES (?, ?, ?, ?)",
                [(row.key, row.oid, row.size, row.stage) for row in rows],
            )
            db.executemany("DELETE FROM started WHERE key = ?", [(row.key,) for row in rows])

        self._transact(insert)

    def drop(self, rows: Iterable[Row]) -> None:
        """Forget these rows, unless they have come to name another object since."""
        pairs = [(row.key, row.oid) for row in rows]
        self._transact(
            lambda db: db.executemany("DELETE FROM items WHERE key = ? AND oid = ?", pairs)
        )

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
            for statement in _SCHEMA:
                db.execute(statement)
            # At once for writing: two that read first and write then would lock each other out.
            db.execute("BEGIN IMMEDIATE")
            result = work(db)
            db.execute("COMMIT")
            return result

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
