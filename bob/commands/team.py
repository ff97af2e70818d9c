"""`bob cache push`, `pull` and `gc --remote`: one cache for a team, in a remote of DVC.

The remote holds DVC's own objects, and in `bob/index` shards of the index (`bob.cache.shards`). An
object is there before a shard names it, a shard never changes, and none is removed before what it
says stands in another: so whoever is killed, or works at the same time, loses nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import click

from bob.cache.index import Row, warn
from bob.cache.items import ItemCache
from bob.cache.shards import ROWS, Shard, read_shard, write_shard
from bob.cache.team import TeamIndex
from bob.dvc.remote import Remote
from bob.errors import BobError
from bob.formats.photos import batches

T = TypeVar("T")

_PUSHED = 10_000  # items of a new shard: others can take them when their objects are there
_AT_ONCE = 16  # shards that are brought together
_ATTEMPTS = 5


def push(name: str | None) -> None:
    """Bring to a remote the items that it does not have, and their objects; prints what it did.

    What others have pushed meanwhile is taken into the index first. Raises BobError where the
    remote is read-only here, or something cannot be brought.
    """
    with ItemCache() as cache:
        remote, team, number = _opened(cache, name, writing=True)
        if not remote.files():
            team.forget(number)  # it is another one now, or was emptied
        _take_in(remote, team, number)
        items = objects = 0
        with TemporaryDirectory() as folder:
            for rows in _pages(lambda after: team.page(number, after, ROWS)):
                here = [row for row in cache.look(rows) if row]
                sizes = {row.oid: row.size for row in here}
                lacking = remote.lacking(sizes, team.damaged(number))
                for part in batches(here, _PUSHED):
                    brought = lacking & {row.oid for row in part}
                    remote.bring(brought)
                    team.mended(number, brought)
                    _push_shard(Path(folder), remote, team, number, part)
                    lacking -= brought
                    items, objects = items + len(part), objects + len(brought)
            if team.families_and_trials(number)[1]:  # without items: those of `bob cache check`
                _push_shard(Path(folder), remote, team, number, [])
        click.echo(f"{remote.name}: {items:,} items pushed, {objects:,} objects brought")


def _push_shard(
    folder: Path, remote: Remote, team: TeamIndex, number: int, rows: Sequence[Row]
) -> None:
    basis = team.basis(rows, *team.families_and_trials(number))
    path = write_shard(folder, basis, rows)
    remote.put(path)
    team.merge(number, [(path.name, read_shard(path))])
    path.unlink()


def pull(name: str | None, *, read_only: bool) -> None:
    """Take the index of a remote in; prints how many items it had that were not known.

    Objects are brought when they are taken. With `read_only` nothing is pushed to this remote from
    here, until it is pulled without.
    """
    with ItemCache() as cache:
        remote, team, number = _opened(cache, name)
        team.set_read_only(number, read_only)
        shards, items = _take_in(remote, team, number)
        if team.shards(number):
            click.echo(f"{remote.name}: {items:,} items in {shards:,} new shards")
        else:
            click.echo(f"{remote.name}: has no items yet; `bob cache push` brings them")


def gc(name: str | None) -> None:
    """Pack a remote's shards, without the items whose objects are gone; prints what it did.

    Objects are DVC's to remove: `dvc gc --cloud` does.
    """
    with ItemCache() as cache:
        remote, *_ = _opened(cache, name, writing=True)
        listed, written, gone = _again_if_packed(remote, lambda: _pack(remote))
        remote.remove(listed - written)
        click.echo(
            f"{remote.name}: {len(listed):,} shards packed into {len(written):,}, "
            f"{gone:,} items forgotten whose objects are gone"
        )


def _pack(remote: Remote) -> tuple[set[str], set[str], int]:
    """Shards that were there, those that have all they say, and how many items were left out."""
    with TemporaryDirectory() as folder:
        # One of its own: the index here may have other objects for the same items.
        scratch = TeamIndex(Path(folder) / "items.sqlite")
        number = scratch.number_of(remote.name)
        listed = remote.files()  # before the objects: those of a shard were there before it
        if not listed:
            raise BobError(f"remote `{remote.name}` has no items")
        for names in batches(sorted(listed), _AT_ONCE):
            with _brought(remote, names) as shards:
                for shard in shards:
                    scratch.merge(number, [shard])
        written: set[str] = set()
        gone = scratch.drop_gone(remote.objects())
        families_and_trials = scratch.families_and_trials(number, shared=True)

        def put(rows: Sequence[Row]) -> None:
            once = ([], []) if written else families_and_trials
            path = write_shard(Path(folder), scratch.basis(rows, *once), rows)
            if path.name not in listed:
                remote.put(path)
            written.add(path.name)
            path.unlink()

        for rows in _pages(lambda after: scratch.page(number, after, ROWS, shared=True)):
            put(rows)
        if not written:  # without any, the remote would seem to be another
            put([])
        return listed, written, gone


def _opened(
    cache: ItemCache, name: str | None, *, writing: bool = False
) -> tuple[Remote, TeamIndex, int]:
    remote = cache.remote(name)
    team = TeamIndex(cache.index.path, shared=cache.index.shared)
    number = team.number_of(remote.name)
    if writing and team.is_read_only(number):
        raise BobError(
            f"remote `{remote.name}` is read-only here since `bob cache pull --read-only`; "
            "`bob cache pull` ends that"
        )
    return remote, team, number


def _take_in(remote: Remote, team: TeamIndex, number: int) -> tuple[int, int]:
    """Merge the remote's shards that are not known here; returns how many, and items in them."""
    return _again_if_packed(remote, lambda: _merge_new(remote, team, number))


def _merge_new(remote: Remote, team: TeamIndex, number: int) -> tuple[int, int]:
    # In this order: a push beside this one adds to the remote first, and then to what is known.
    known, listed = team.shards(number), remote.files()
    if known and not listed:
        raise BobError(
            f"remote `{remote.name}` had {len(known):,} shards of items and has none now (is "
            "it the right one?); `bob cache push` begins anew there"
        )
    if known - listed:  # packed: what stands in none of the new ones is no longer there
        with _brought(remote, listed) as shards:
            return len(listed), team.merge(number, shards, anew=True)
    items = 0
    for names in batches(sorted(listed - known), _AT_ONCE):
        with _brought(remote, names) as shards:
            for shard in shards:
                items += team.merge(number, [shard])
    return len(listed - known), items


@contextmanager
def _brought(remote: Remote, names: Iterable[str]) -> Iterator[Iterator[tuple[str, Shard]]]:
    """A remote's shards, copied here; those that are damaged are named and left out."""
    with TemporaryDirectory() as folder:
        for name in remote.get(names, Path(folder)):
            warn(f"remote `{remote.name}`: shard {name} is damaged; what it has is not known here")
        yield ((path.name, read_shard(path)) for path in sorted(Path(folder).iterdir()))


def _pages(page: Callable[[Row | None], list[Row]]) -> Iterator[list[Row]]:
    last = None
    while rows := page(last):
        yield rows
        last = rows[-1]


def _again_if_packed(remote: Remote, work: Callable[[], T]) -> T:
    """Do `work`, again where another packs the shards meanwhile, so that some are gone."""
    for _ in range(_ATTEMPTS):
        with suppress(FileNotFoundError):
            return work()
    raise BobError(f"remote `{remote.name}` lists shards that it does not have; try again")
