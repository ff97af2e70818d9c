"""(Recipe, maker) -> object: the index of the item cache, an SQLite file."""

import json
import os
import sqlite3
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, TypeVar

from bob.cache.recipe import Maker
from bob.errors import UNUSABLE, BobError, tell

T = TypeVar("T")

VERSION = 4  # of what a recipe and a maker are hashes of, and of the tables
_TABLES = {
    "items": "recipe TEXT NOT NULL, maker TEXT NOT NULL, oid TEXT NOT NULL, size INTEGER NOT NULL,"
    " stage TEXT NOT NULL, inode INTEGER, changed INTEGER, remotes INTEGER NOT NULL DEFAULT 0,"
    " here INTEGER NOT NULL DEFAULT 1, PRIMARY KEY (recipe, maker)",  # was its object ever here?
    # What `announced` was before it said by whom; bob of that time goes on with this file.
    "started": "recipe TEXT NOT NULL, maker TEXT NOT NULL, PRIMARY KEY (recipe, maker)",
    "runs": "stage TEXT PRIMARY KEY, reused INTEGER NOT NULL, made INTEGER NOT NULL,"
    " because TEXT NOT NULL DEFAULT ''",
    "makers": "id TEXT PRIMARY KEY, parts TEXT NOT NULL",
    "families": "id TEXT PRIMARY KEY, stage TEXT NOT NULL, parts TEXT NOT NULL,"
    " number INTEGER NOT NULL, remotes INTEGER NOT NULL DEFAULT 0",
    "trials": "family TEXT NOT NULL, one TEXT NOT NULL, other TEXT NOT NULL, equal INTEGER NOT"
    " NULL, compared INTEGER NOT NULL, recipes TEXT NOT NULL, remotes INTEGER NOT NULL DEFAULT 0,"
    " PRIMARY KEY (family, one, other)",
    # DVC's remotes that items were pushed to or pulled from; bit `number` of the columns `remotes`.
    "remotes": "number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE,"
    " read_only INTEGER NOT NULL DEFAULT 0",
    "shards": "remote INTEGER NOT NULL, name TEXT NOT NULL, PRIMARY KEY (remote, name)",
    "damaged": "remote INTEGER NOT NULL, oid TEXT NOT NULL, PRIMARY KEY (remote, oid)",
}
# Later than version 4 and no part of it: earlier bob does without, and must not be kept out.
_ANNOUNCED = (
    "CREATE TABLE IF NOT EXISTS announced (recipe TEXT NOT NULL, maker TEXT NOT NULL,"
    " who TEXT NOT NULL, PRIMARY KEY (recipe, maker)) WITHOUT ROWID"
)
# What a version lacks that the next one has; a recipe and a maker are the same in all of these.
_MIGRATIONS = {
    2: (
        "ALTER TABLE items ADD COLUMN inode INTEGER",
        "ALTER TABLE items ADD COLUMN changed INTEGER",
        "ALTER TABLE runs ADD COLUMN because TEXT NOT NULL DEFAULT ''",
        "CREATE TABLE families (id TEXT PRIMARY KEY, stage TEXT NOT NULL, parts TEXT NOT NULL,"
        " number INTEGER NOT NULL) WITHOUT ROWID",
    ),
    3: (
        *(
            f"ALTER TABLE {table} ADD COLUMN remotes INTEGER NOT NULL DEFAULT 0"
            for table in ("items", "families", "trials")
        ),
        "ALTER TABLE items ADD COLUMN here INTEGER NOT NULL DEFAULT 1",
    ),
}
_AMONG = "IN (SELECT value FROM json_each(?))"  # one parameter, however many recipes
_AT_ONCE = 10_000  # recipes in one query
TRIAL_COLUMNS = "family, one, other, equal, compared, recipes"
COLUMNS = "recipe, maker, oid, size, stage, inode, changed, remotes"


@dataclass(frozen=True, slots=True)
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
    inode: int | None = None
    changed: int | None = None
    """The object's inode and modification time in ns, when it was last hashed and found whole."""
    remotes: int = 0
    """Bit n is set where remote number n has the item, by the shards read from it."""


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


@dataclass(frozen=True)
class LastRun:
    """What the last run of a stage did with its items."""

    stage: str
    reused: int
    made: int
    because: str
    """Why items were made, in words; empty where none was, or nothing is known to compare with."""


class Index:
    """(Recipe, maker) -> object, in an SQLite file that several processes use at once.

    Every method is one transaction on a connection of its own, in SQLite's default journal mode,
    which also works on shared folders. A damaged file is moved aside with a warning. If `shared`,
    users of the same group can write to it.
    """

    def __init__(self, path: Path, *, shared: bool = False) -> None:
        self.path, self.shared = path, shared

    def find(self, recipes: Iterable[str], maker: str | None = None) -> list[Row]:
        """The rows of those recipes that are there, of one maker or of all."""
        query = f"SELECT {COLUMNS} FROM items WHERE recipe {_AMONG}"
        query, values = (query, ()) if maker is None else (f"{query} AND maker = ?", (maker,))
        asked = list(recipes)
        return self._transact(
            lambda db: [
                row
                for start in range(0, len(asked), _AT_ONCE)
                for row in rows_of(
                    db.execute(query, (json.dumps(asked[start : start + _AT_ONCE]), *values))
                )
            ]
        )

    def all(self) -> list[Row]:
        """All rows, by stage, recipe and maker."""
        query = f"SELECT {COLUMNS} FROM items ORDER BY stage, recipe, maker"
        return self._transact(lambda db: list(rows_of(db.execute(query))))

    def found_whole(self, rows: Iterable[Row]) -> None:
        """Keep the rows' inodes and modification times."""
        values = [(row.inode, row.changed, row.recipe, row.maker, row.oid) for row in rows]
        query = (
            "UPDATE items SET inode = ?, changed = ?, here = 1"
            " WHERE recipe = ? AND maker = ? AND oid = ?"
        )
        self._transact(lambda db: db.executemany(query, values))

    def start(
        self, recipes: Sequence[str], maker: str, who: str, gone: Iterable[str] = ()
    ) -> set[str]:
        """Announce that a process, `who`, is about to make these by the code `maker`.

        Returns those that were neither made by it before nor announced, but by processes that are
        `gone`; they are now announced.
        """
        asked, dead = json.dumps(recipes), json.dumps(list(gone))

        def announce(db: sqlite3.Connection) -> set[str]:
            # What a remote has and yet is to be made cannot be had from there.
            taken = db.execute(
                f"SELECT recipe FROM items WHERE maker = ? AND remotes = 0 AND recipe {_AMONG} "
                f"UNION SELECT recipe FROM announced WHERE maker = ? AND recipe {_AMONG} "
                f"AND NOT who {_AMONG}",
                (maker, asked, maker, asked, dead),
            )
            free = set(recipes) - {recipe for (recipe,) in taken}
            db.executemany(
                "INSERT OR REPLACE INTO announced VALUES (?, ?, ?)",
                [(one, maker, who) for one in free],
            )
            return free

        return self._transact(announce)

    def announced(self, recipes: Iterable[str], maker: str) -> dict[str, str]:
        """Recipe -> who has announced it, of those that are announced."""
        query = f"SELECT recipe, who FROM announced WHERE maker = ? AND recipe {_AMONG}"
        values = (maker, json.dumps(list(recipes)))
        return self._transact(lambda db: dict(db.execute(query, values).fetchall()))

    def add(self, rows: Sequence[Row]) -> None:
        """Record items, whose objects must be in place already."""

        def insert(db: sqlite3.Connection) -> None:
            db.executemany(
                f"INSERT INTO items ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, 0)"
                " ON CONFLICT (recipe, maker) DO UPDATE SET"
                # A remote that has the same object still has the item.
                " remotes = CASE oid WHEN excluded.oid THEN remotes ELSE 0 END, oid = excluded.oid,"
                " size = excluded.size, stage = excluded.stage, inode = excluded.inode,"
                " changed = excluded.changed, here = 1",
                [
                    (row.recipe, row.maker, row.oid, row.size, row.stage, row.inode, row.changed)
                    for row in rows
                ],
            )
            db.executemany(
                "DELETE FROM announced WHERE recipe = ? AND maker = ?",
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
        values = (maker.id, json.dumps(maker.parts))
        self._transact(lambda db: db.execute("INSERT OR IGNORE INTO makers VALUES (?, ?)", values))

    def maker(self, id: str) -> Maker | None:
        """The maker of that id, if its parts are known here."""
        query = "SELECT parts FROM makers WHERE id = ?"
        found = self._transact(lambda db: db.execute(query, (id,)).fetchone())
        return None if found is None else Maker(**json.loads(found[0]))

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

    def record_family(self, stage: str, id: str, parts: Mapping[str, Any]) -> None:
        """Remember what a family consists of, as the one that the stage asked for last."""
        query = (
            "INSERT INTO families (id, stage, parts, number) VALUES"
            " (?, ?, ?, (SELECT coalesce(max(number), 0) + 1 FROM families))"
            " ON CONFLICT (id) DO UPDATE SET number = excluded.number"
        )
        values = (id, stage, json.dumps(parts))
        self._transact(lambda db: db.execute(query, values))

    def families(self, stage: str) -> dict[str, dict[str, Any]]:
        """Id -> parts of the families that a stage has asked for, the latest first."""
        query = "SELECT id, parts FROM families WHERE stage = ? ORDER BY number DESC"
        return self._transact(
            lambda db: {id: json.loads(parts) for id, parts in db.execute(query, (stage,))}
        )

    def record_trial(self, family: str, trial: Trial, recipes: Sequence[str]) -> None:
        """Remember how a trial on the items of these `recipes` came out.

        One that has found no difference takes the place of none that has: another process may have
        recorded that meanwhile.
        """
        values = (family, trial.one, trial.other, trial.equal, trial.compared, json.dumps(recipes))
        query = (
            f"INSERT INTO trials ({TRIAL_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (family, one, other) DO UPDATE SET equal = excluded.equal,"
            " compared = excluded.compared, recipes = excluded.recipes, remotes = 0"
            " WHERE equal = compared OR excluded.equal < excluded.compared"
        )
        self._transact(lambda db: db.execute(query, values))

    def trials(self, family: str) -> list[Trial]:
        """All trials in a family."""
        query = "SELECT one, other, equal, compared FROM trials WHERE family = ?"
        return self._transact(lambda db: [Trial(*row) for row in db.execute(query, (family,))])

    def drop_equal_trials(self, family: str, maker: str) -> None:
        """Forget the trials in a family that a maker took part in and that found no difference."""
        query = "DELETE FROM trials WHERE family = ? AND ? IN (one, other) AND equal = compared"
        self._transact(lambda db: db.execute(query, (family, maker)))

    def drop_announced(self, is_alive: Callable[[str], bool]) -> None:
        """Forget what those have announced who are not alive."""

        def drop(db: sqlite3.Connection) -> None:
            names = db.execute("SELECT DISTINCT who FROM announced").fetchall()
            dead = [one for one in names if not is_alive(*one)]
            db.executemany("DELETE FROM announced WHERE who = ?", dead)

        self._transact(drop)

    def remotes(self) -> dict[int, str]:
        """Number -> name of the remotes that items were pushed to or pulled from."""
        query = "SELECT number, name FROM remotes ORDER BY number"
        return self._transact(lambda db: dict(db.execute(query).fetchall()))

    def record_damaged(self, remote: int, oids: Iterable[str]) -> None:
        """Remember objects that are damaged at a remote; who pushes them next replaces them."""
        values = [(remote, oid) for oid in oids]
        query = "INSERT OR IGNORE INTO damaged VALUES (?, ?)"
        self._transact(lambda db: db.executemany(query, values))

    def record_run(self, run: LastRun) -> None:
        """Remember what the last run of a stage reused and made."""
        self._transact(
            lambda db: db.execute("INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?)", astuple(run))
        )

    def last_runs(self) -> dict[str, LastRun]:
        """Stage -> its last run."""
        query = "SELECT stage, reused, made, because FROM runs"
        return self._transact(lambda db: {row[0]: LastRun(*row) for row in db.execute(query)})

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
            raise BobError(f"{path}, the index of the item cache: {error}; {UNUSABLE}") from None

    def _attempt(self, work: Callable[[sqlite3.Connection], T]) -> T:
        if self.shared and not self.path.exists():
            self.path.touch()
            self.path.chmod(0o664)  # SQLite gives its journal the same
        # A minute, because a process may have been put to sleep in its transaction.
        with closing(sqlite3.connect(self.path, timeout=60, isolation_level=None)) as db:
            if db.execute("PRAGMA user_version").fetchone() != (VERSION,):
                self._lay_out(db)
            # At once for writing: two that read first and write then would lock each other out.
            db.execute("BEGIN IMMEDIATE")
            db.execute(_ANNOUNCED)
            result = work(db)
            db.execute("COMMIT")
            return result

    def _lay_out(self, db: sqlite3.Connection) -> None:
        """Make the tables. Versions from 2 on are taken over.

        Version 1 goes: it had one hash of recipe and maker together, which cannot be taken apart.
        Raises BobError where a later version of bob has made them.
        """
        db.execute("BEGIN IMMEDIATE")
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version > VERSION:
            raise BobError(
                f"{os.path.relpath(self.path)}, the index of the item cache, was made by a later "
                "version of bob; use that one"
            )
        if version != VERSION:  # else another has done it meanwhile
            if version not in _MIGRATIONS:
                for table in _TABLES:
                    db.execute(f"DROP TABLE IF EXISTS {table}")
            while version in _MIGRATIONS:
                for statement in _MIGRATIONS[version]:
                    db.execute(statement)
                version += 1
            for table, columns in _TABLES.items():
                db.execute(f"CREATE TABLE IF NOT EXISTS {table} ({columns}) WITHOUT ROWID")
            db.execute(f"PRAGMA user_version = {VERSION}")
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
            "again, but for those that `bob cache pull` finds at a remote, or `bob cache adopt` in "
            "this workspace"
        )


def rows_of(found: Iterable[tuple[Any, ...]]) -> Iterator[Row]:
    """Rows that share the strings which many of them have."""
    for recipe, maker, oid, size, stage, inode, changed, remotes in found:
        yield Row(recipe, sys.intern(maker), oid, size, sys.intern(stage), inode, changed, remotes)


def _damaged(error: sqlite3.DatabaseError) -> bool:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the rest are details
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def warn(message: str) -> None:
    """A line on stderr that a progress bar does not swallow."""
    tell(f"warning: {message}")
