"""The part of the index that a team shares: what which remote has, and what has come from there."""

import json
import sqlite3
from collections.abc import Iterable, Sequence

from bob.cache.index import (
    COLUMNS,
    TRIAL_COLUMNS,
    Index,
    Row,
    Trial,
    rows_of,
)
from bob.cache.shards import Basis, Evidence, Family, Shard
from bob.errors import BobError

_MOST = 63  # bits of an integer in SQLite, but for its sign
_SHARED = ("items", "families", "trials")


class TeamIndex(Index):
    """The index, and what it has in common with remotes, each of which is known by a number."""

    def number_of(self, remote: str) -> int:
        """The number of a remote, by its name in DVC's configuration; raises BobError at the 64th.

        A remote that was not known before gets one.
        """

        def number(db: sqlite3.Connection) -> int:
            numbers = {name: one for one, name in db.execute("SELECT number, name FROM remotes")}
            if remote not in numbers:
                if len(numbers) == _MOST:
                    raise BobError(f"items of {_MOST} remotes are known here, and no more can be")
                numbers[remote] = len(numbers)
                db.execute(
                    "INSERT INTO remotes (number, name) VALUES (?, ?)", (numbers[remote], remote)
                )
            return numbers[remote]

        return self._transact(number)

    def set_read_only(self, remote: int, read_only: bool) -> None:
        """Say whether this repository may write to a remote."""
        query = "UPDATE remotes SET read_only = ? WHERE number = ?"
        self._transact(lambda db: db.execute(query, (read_only, remote)))

    def is_read_only(self, remote: int) -> bool:
        """Whether this repository may only read from a remote."""
        query = "SELECT read_only FROM remotes WHERE number = ?"
        return self._transact(lambda db: bool(db.execute(query, (remote,)).fetchone()[0]))

    def shards(self, remote: int) -> set[str]:
        """The shards of a remote that were merged."""
        query = "SELECT name FROM shards WHERE remote = ?"
        return self._transact(lambda db: {name for (name,) in db.execute(query, (remote,))})

    def merge(self, remote: int, shards: Iterable[tuple[str, Shard]], *, anew: bool = False) -> int:
        """Take in a remote's shards, by their names; returns how many items they have.

        Of an item with two objects the one that was here stays, or else one that a remote has. A
        trial that has found a difference overrules one of the same makers in the same family that
        has found none. With `anew`, what was merged of this remote before is first forgotten.
        """

        def take_in(db: sqlite3.Connection) -> int:
            if anew:
                _forget(db, remote)
            count = 0
            for name, shard in shards:
                count += _merge(db, 1 << remote, shard)
                db.execute("INSERT OR IGNORE INTO shards VALUES (?, ?)", (remote, name))
            return count

        return self._transact(take_in)

    def forget(self, remote: int) -> None:
        """Forget what a remote has; items that are nowhere else are then nowhere."""
        self._transact(lambda db: _forget(db, remote))

    def page(self, remote: int, after: Row | None, size: int, *, shared: bool = False) -> list[Row]:
        """The next `size` rows that a remote does not have, or, if `shared`, has.

        By recipe, so that whoever merges a shard of them writes to one part of the index.
        """
        query = (
            f"SELECT {COLUMNS} FROM items WHERE (remotes & ? != 0) = ?"
            " AND (recipe, maker) > (?, ?) ORDER BY recipe, maker LIMIT ?"
        )
        last = (after.recipe, after.maker) if after else ("", "")
        values = (1 << remote, shared, *last, size)
        return self._transact(lambda db: list(rows_of(db.execute(query, values))))

    def drop_gone(self, there: Iterable[tuple[str, int]]) -> int:
        """Forget the items whose objects are not `there`, named with their bytes; how many."""

        def drop(db: sqlite3.Connection) -> int:
            db.execute("CREATE TEMP TABLE there (oid PRIMARY KEY, size) WITHOUT ROWID")
            db.executemany("INSERT OR REPLACE INTO there VALUES (?, ?)", there)
            return db.execute(
                "DELETE FROM items WHERE NOT EXISTS (SELECT 1 FROM there"
                " WHERE there.oid = items.oid AND there.size = items.size)"
            ).rowcount

        return self._transact(drop)

    def families_and_trials(
        self, remote: int, *, shared: bool = False
    ) -> tuple[list[Family], list[Evidence]]:
        """Those that a remote does not have, or, if `shared`, has."""
        values = (1 << remote, shared)

        def read(db: sqlite3.Connection) -> tuple[list[Family], list[Evidence]]:
            among = "WHERE (remotes & ? != 0) = ?"
            families = db.execute(f"SELECT id, stage, parts FROM families {among}", values)
            trials = db.execute(f"SELECT {TRIAL_COLUMNS} FROM trials {among}", values)
            return (
                [Family(id, stage, json.loads(parts)) for id, stage, parts in families],
                [
                    Evidence(family, Trial(*judged), json.loads(recipes))
                    for family, *judged, recipes in trials
                ],
            )

        return self._transact(read)

    def basis(
        self, rows: Iterable[Row], families: Sequence[Family], trials: Sequence[Evidence]
    ) -> Basis:
        """What rows rest on: their makers, and these families and trials."""
        ids = {row.maker for row in rows}
        ids |= {id for one in trials for id in (one.trial.one, one.trial.other)}
        return Basis({id: self.maker(id) for id in ids}, families, trials)

    def damaged(self, remote: int) -> set[str]:
        """The objects that were found damaged at a remote."""
        query = "SELECT oid FROM damaged WHERE remote = ?"
        return self._transact(lambda db: {oid for (oid,) in db.execute(query, (remote,))})

    def mended(self, remote: int, oids: Iterable[str]) -> None:
        """Forget that these objects were damaged at a remote."""
        values = [(remote, oid) for oid in oids]
        query = "DELETE FROM damaged WHERE remote = ? AND oid = ?"
        self._transact(lambda db: db.executemany(query, values))


def _forget(db: sqlite3.Connection, remote: int) -> None:
    bit = 1 << remote
    for table in _SHARED:
        db.execute(f"UPDATE {table} SET remotes = remotes & ~? WHERE remotes & ?", (bit, bit))
    db.execute("DELETE FROM shards WHERE remote = ?", (remote,))


def _merge(db: sqlite3.Connection, bit: int, shard: Shard) -> int:
    basis = shard.basis
    db.executemany(
        "INSERT OR IGNORE INTO makers VALUES (?, ?)",
        [(id, json.dumps(maker.parts)) for id, maker in basis.makers.items() if maker],
    )
    db.executemany(
        "INSERT INTO families VALUES (?, ?, ?, 0, ?)"
        " ON CONFLICT (id) DO UPDATE SET remotes = remotes | excluded.remotes",
        [(one.id, one.stage, json.dumps(one.parts), bit) for one in basis.families],
    )
    for evidence in basis.trials:
        _merge_trial(db, bit, evidence)
    return db.executemany(
        "INSERT INTO items (recipe, maker, oid, size, stage, remotes, here)"
        " VALUES (?, ?, ?, ?, ?, ?, 0) ON CONFLICT (recipe, maker) DO UPDATE SET"
        " remotes = remotes | excluded.remotes, oid = excluded.oid, size = excluded.size"
        " WHERE oid = excluded.oid OR (remotes = 0 AND NOT here)",
        ((row.recipe, row.maker, row.oid, row.size, row.stage, bit) for row in shard.rows),
    ).rowcount


def _merge_trial(db: sqlite3.Connection, bit: int, evidence: Evidence) -> None:
    family, trial = evidence.family, evidence.trial
    pair = json.dumps([trial.one, trial.other])
    among = (
        "family = ? AND one IN (SELECT value FROM json_each(?))"
        " AND other IN (SELECT value FROM json_each(?))"
    )
    if trial.same:
        query = f"SELECT 1 FROM trials WHERE {among} AND equal < compared"
        if db.execute(query, (family, pair, pair)).fetchone():
            return
    else:
        query = f"DELETE FROM trials WHERE {among} AND equal = compared"
        db.execute(query, (family, pair, pair))
    recipes = json.dumps(evidence.recipes)
    db.execute(
        f"INSERT INTO trials ({TRIAL_COLUMNS}, remotes) VALUES (?, ?, ?, ?, ?, ?, ?)"
        " ON CONFLICT (family, one, other) DO UPDATE SET remotes = remotes | excluded.remotes"
        " WHERE (equal, compared, recipes) = (excluded.equal, excluded.compared, excluded.recipes)",
        (family, trial.one, trial.other, trial.equal, trial.compared, recipes, bit),
    )
