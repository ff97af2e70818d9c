"""The item cache: what it reuses, what it does not trust, and what survives."""

import hashlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner
from dvc.repo import Repo

from bob.cache import gpu_locks, making, recipe
from bob.cache.check import CheckingCache
from bob.cache.index import Index, Row, Trial
from bob.cache.items import MAKE, TRIALS, ItemCache
from bob.cache.lists import Item, read_items, write_items
from bob.cache.making import announcing
from bob.cache.recipe import Maker as Code
from bob.cache.recipe import code_hashes, item_key
from bob.cache.trials import Trials
from bob.cache.wanted import Wanted
from bob.cache.work import Work
from bob.cli import cli
from bob.dvc.repository import translated
from bob.errors import UNUSABLE, BobError
from bob.models import captioner, endpoint, sampling, vlm
from bob.stages import split
from tests.conftest import ROOT
from tests.test_pipeline import imported_modules

KEYS = [item_key(number=number) for number in range(10)]
CODE_NOW = Code({"models.sampling": "now"}, {"torch": "2"})
CODE_BEFORE = Code({"models.sampling": "before"}, {"torch": "2"})
INDEX = Path(".dvc/cache/bob/items.sqlite")


class Maker:
    """Makes items of their positions, and remembers which."""

    def __init__(self):
        self.batches = []

    def __call__(self, positions):
        self.batches.append(positions)
        return [f"item {position}".encode() for position in positions]

    @property
    def made(self):
        return sorted(position for batch in self.batches for position in batch)


def wanted(recipes=KEYS, code=CODE_NOW, **more):
    return Wanted(recipes, {"item": "test"}, code, **more)


def oids_of(rows):
    return [row.oid for row in rows]


def take(keys=KEYS, batch_size=4, make=None):
    """Take items in a process's way; returns their bytes and the positions that were made."""
    make = make or Maker()
    with ItemCache("test") as cache:
        found = [cache.read(row.oid) for row in cache.take(wanted(keys), Work(make), batch_size)]
        assert (cache.reused, cache.made) == (len(set(keys)) - len(make.made), len(make.made))
    return found, make.made


def object_path(key):
    (row,) = Index(INDEX).find([key])
    return Path(".dvc/cache/files/md5") / row.oid[:2] / row.oid[2:]


def invoke(*arguments):
    result = CliRunner().invoke(cli, arguments)
    return result.exit_code, result.output


# --- reuse -----------------------------------------------------------------------------------


def test_items_come_in_order_and_are_made_once(repository):
    everything = [f"item {number}".encode() for number in range(10)]
    assert take() == (everything, list(range(10)))
    assert take() == (everything, [])
    assert take(KEYS[::-1]) == (everything[::-1], [])


def test_only_what_is_missing_is_made(repository):
    take(KEYS[:5])
    assert take()[1] == [5, 6, 7, 8, 9]


def test_batches_are_full_but_for_the_last(repository):
    take([KEYS[1], KEYS[4]])
    make = Maker()
    take(make=make)
    assert [len(batch) for batch in make.batches] == [4, 4]


def test_of_items_with_the_same_key_one_is_made(repository):
    found, made = take([KEYS[0], KEYS[1], KEYS[0]])
    assert made == [0, 1]
    assert found == [b"item 0", b"item 1", b"item 0"]


def test_a_run_that_fails_loses_no_more_than_the_batch_in_flight(repository):
    make = Maker()

    def failing(positions):
        if len(make.batches) == 2:
            raise KeyboardInterrupt
        return make(positions)

    with pytest.raises(KeyboardInterrupt), ItemCache("test") as cache:
        cache.take(wanted(), Work(failing), 4)
    assert take()[1] == [8, 9]


def test_a_batch_is_encoded_and_kept_while_the_next_one_is_made(repository):
    kept_meanwhile = []

    def make(positions):
        if positions[0] == 4:
            patience = time.monotonic() + 20
            while len(Index(INDEX).find(KEYS[:4])) < 4 and time.monotonic() < patience:
                time.sleep(0.01)
            kept_meanwhile.extend(Index(INDEX).find(KEYS[:4]))
        return positions

    with ItemCache("test") as cache:
        rows = cache.take(wanted(), Work(make, encode=lambda number: f"item {number}".encode()), 4)
        assert [cache.read(row.oid) for row in rows] == [f"item {n}".encode() for n in range(10)]
    assert len(kept_meanwhile) == 4


def test_what_cannot_be_encoded_ends_the_run_and_keeps_the_batches_before(repository):
    def encode(position):
        if position == 5:
            raise BobError("no room for 5")
        return b"item"

    with pytest.raises(BobError, match="no room for 5"), ItemCache("test") as cache:
        cache.take(wanted(), Work(list, encode=encode), 4)
    assert len(Index(INDEX).all()) == 4


# --- a change of code ------------------------------------------------------------------------


class Otherwise(Maker):
    """Code that makes some items otherwise."""

    def __init__(self, *positions):
        super().__init__()
        self._positions = positions

    def __call__(self, positions):
        return [
            item + b"!" if position in self._positions else item
            for position, item in zip(positions, super().__call__(positions), strict=True)
        ]


def before(recipes=KEYS):
    """Other code has made all."""
    with ItemCache("test") as cache:
        cache.take(wanted(recipes, CODE_BEFORE), Work(Maker()), 4)


def now(make=None, **more):
    """The account of the present code's run, and what was made."""
    make = make or Maker()
    with ItemCache("test") as cache:
        rows = cache.take(wanted(**more), Work(make), 4)
        return cache.account, make.made, [cache.read(row.oid) for row in rows]


def test_of_a_change_that_changes_nothing_one_batch_is_made(repository):
    before()
    account, made, items = now()
    assert len(made) == 4 and {0, 9} < set(made)
    assert account == ("6 reused (made by earlier code, same bytes in a trial of 4), 4 made")
    assert items == [f"item {n}".encode() for n in range(10)]
    # Each item keeps its true maker.
    makers = {row.recipe: row.maker for row in Index(INDEX).all() if row.maker == CODE_NOW.id}
    assert set(makers) == {KEYS[n] for n in made}


def test_what_a_trial_has_shown_holds_for_all_runs_after_it(repository):
    before()
    now()
    more = [*KEYS, *(item_key(number=number) for number in range(10, 14))]
    before(more)
    account, made, _ = now(recipes=more)
    assert made == []
    assert account == (
        "14 reused (10 made by earlier code, same bytes in an earlier trial), 0 made"
    )


def test_of_a_change_that_changes_one_item_on_trial_all_are_made_anew(repository, capsys):
    before()
    account, made, items = now(
        Otherwise(9), differing=lambda one, other: f"{one.decode()} and {other.decode()}"
    )
    assert made == list(range(10))
    assert account == "0 reused, 10 made"
    assert items[9] == b"item 9!"
    told = capsys.readouterr().err
    assert "1 of 4 items on trial came out otherwise (item 9 and item 9!)" in told
    assert "none of the 10" in told
    assert "the code has changed (bob/models/sampling.py)" in told


def test_a_trial_covers_what_the_stage_says_can_differ(repository):
    """A change of code that acts on one kind of item alone: position 5 is the only one."""
    before()
    assert now(Otherwise(5), covering=lambda _: [5])[1] == list(range(10))


def test_a_maker_found_different_is_not_tried_again_and_one_found_the_same_stays_the_same(
    repository,
):
    before()
    now(Otherwise(0))
    later = [item_key(number=number) for number in range(20, 24)]
    before(later)
    assert now(recipes=later)[1] == [0, 1, 2, 3]
    third = Code({"models.sampling": "third"}, {"torch": "2"})
    account, made, _ = now(Otherwise(0), code=third, recipes=KEYS)
    # One batch, whichever of the two it is held against first.
    assert len(made) == 4
    assert account.startswith("6 reused")


def judged(trials, maker="now"):
    """Which makers are taken to be the same as this one, and which not; `trials`: "a=b a!c"."""
    makers = {name: Code({"models.sampling": name}, {"torch": "2"}) for name in NAMES}
    names = {code.id: name for name, code in makers.items()}
    index = Index(Path("judged.sqlite"))
    for trial in trials.split():
        one, how, other = re.split("([=!])", trial)
        index.record_trial(
            wanted().family_id, Trial(makers[one].id, makers[other].id, how == "=", 1), KEYS[:1]
        )
    same, different = Trials(index, "test").judged(wanted(code=makers[maker]))
    index.path.unlink(missing_ok=True)
    return {names[one] for one in same}, {names[one] for one in different}


NAMES = ("now", "b", "c", "d", "e")


@pytest.mark.parametrize(
    ("trials", "same", "different"),
    [
        ("now=b b=c", "now b c", ""),
        ("now=b b=c now!c", "now b", "c"),
        ("now!c c=b b=now", "now b", "c"),
        # Round a longer chain, and where one of the chain is proved different from another of it.
        ("now=b b=c c=d now!d", "now b c", "d"),
        ("now=b b=c c=d b!d", "now b c", "d"),
        # What was the same as the different one alone is unknown, and tried.
        ("now=b b=c now!c c=d", "now b", "c"),
        # The nearer of two wins: the present one was tried against it itself.
        ("now=b b=c now=d c!d", "now b d", "c"),
        ("now=d c!d now=b b=c", "now b d", "c"),
        # Of two that are equally near neither is taken.
        ("now=b now=c b!c", "now", "b c"),
        ("now=b b=c b=d c!d", "now b", "c d"),
        # But to be different from what is different is nothing against one.
        ("now=b b=c b=d c!d now!c", "now b d", "c"),
        # The same two, once tried from each side.
        ("now=b b!now", "now", "b"),
        ("now!b now=b", "now", "b"),
    ],
)
def test_a_found_difference_is_never_led_round_by_a_chain_of_equal_trials(
    workspace, trials, same, different
):
    assert judged(trials) == (set(same.split()), set(different.split()))


def test_items_of_a_maker_proved_different_are_not_taken_by_way_of_a_third(repository):
    before()
    account, made, _ = now()
    assert len(made) == 4 and account.startswith("6 reused")
    third = Code({"models.sampling": "third"}, {"torch": "2"})
    index, family = Index(INDEX), wanted().family_id
    index.record_trial(family, Trial(third.id, CODE_NOW.id, 4, 4), [])
    index.record_trial(family, Trial(third.id, CODE_BEFORE.id, 3, 4), [])
    make = Otherwise(*range(10))
    account, remade, _ = now(make, code=third)
    assert remade == sorted(set(range(10)) - set(made))
    assert account == "4 reused (made by earlier code, same bytes in an earlier trial), 6 made"


def test_what_a_check_has_found_of_two_makers_outlasts_one_of_a_third(repository):
    """What is different from a maker stays so when a third finds that maker different, too."""
    before()
    third = Code({"models.sampling": "third"}, {"torch": "2"})
    index, family = Index(INDEX), wanted().family_id
    index.record_trial(family, Trial(third.id, CODE_BEFORE.id, 0, 1), [])
    index.record_trial(family, Trial(CODE_NOW.id, CODE_BEFORE.id, 4, 4), [])
    assert check(Otherwise(3))[0] == [KEYS[3]]
    assert Trials(index, "test").judged(wanted(code=third)) == ({third.id}, {CODE_BEFORE.id})


def test_what_an_earlier_trial_has_made_speaks_also_where_a_new_one_is_made(
    repository, monkeypatch, capsys
):
    """The first maker's trial has made item 0, which the second makes otherwise."""
    second = Code({"models.sampling": "second"}, {"torch": "2"})
    items = {0: b"item 0!", 5: b"item 5", 6: b"item 6"}
    monkeypatch.setenv(TRIALS, "strict")
    with ItemCache("test") as cache:
        recipes = [KEYS[number] for number in items]
        cache.take(wanted(recipes, second), Work(lambda places: list(items.values())), 4)
    before(KEYS[:5])
    monkeypatch.delenv(TRIALS)
    account, made, _ = now()
    assert "1 of 3 items on trial came out otherwise" in capsys.readouterr().err
    assert {5, 6} < set(made)
    assert account.startswith("1 reused")


def test_no_trial_is_made_where_it_would_cost_what_it_saves_or_where_it_is_forbidden(
    repository, monkeypatch
):
    before()
    monkeypatch.setenv(TRIALS, "strict")
    assert now(recipes=KEYS[:5])[1] == list(range(5))
    monkeypatch.delenv(TRIALS)
    assert now(recipes=KEYS[5:], on_trial=False)[1] == list(range(5))


def test_an_older_items_object_that_is_damaged_is_no_evidence(repository, capsys):
    before()
    path = object_path(KEYS[0])
    path.chmod(0o644)
    path.write_bytes(b"damaged")
    _, made, items = now()
    assert items[0] == b"item 0"
    assert 0 in made and len(made) == 5
    assert "is damaged" in capsys.readouterr().err


def test_an_index_of_an_older_layout_is_begun_anew(repository):
    with ItemCache("test") as cache:
        path = cache.index.path
    path.unlink()
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE items (key TEXT PRIMARY KEY, oid TEXT)")
        db.execute("INSERT INTO items VALUES ('a', 'b')")
        db.commit()
    assert take()[1] == list(range(10))
    assert len(Index(INDEX).all()) == 10


def test_an_index_of_version_2_is_taken_over(repository):
    take()
    with closing(sqlite3.connect(INDEX)) as db:
        for statement in (
            *TO_3,
            "ALTER TABLE items DROP COLUMN inode",
            "ALTER TABLE items DROP COLUMN changed",
            "ALTER TABLE runs DROP COLUMN because",
            "DROP TABLE families",
            "PRAGMA user_version = 2",
        ):
            db.execute(statement)
        db.commit()
    assert take()[1] == []
    assert Index(INDEX).last_runs()["test"].reused == 10


# What version 4 added: to which remotes items, families and trials were pushed.
TO_3 = (
    "ALTER TABLE items DROP COLUMN remotes",
    "ALTER TABLE items DROP COLUMN here",
    "ALTER TABLE families DROP COLUMN remotes",
    "ALTER TABLE trials DROP COLUMN remotes",
    "DROP TABLE remotes",
    "DROP TABLE shards",
    "DROP TABLE damaged",
    "PRAGMA user_version = 3",
)


def test_an_index_of_version_3_is_taken_over(repository):
    before()
    now()
    with closing(sqlite3.connect(INDEX)) as db:
        for statement in TO_3:
            db.execute(statement)
        db.commit()
    index = Index(INDEX)
    assert len(index.all()) == 14 and not any(row.remotes for row in index.all())
    account, made, _ = now()
    assert (
        made == []
        and account == "10 reused (6 made by earlier code, same bytes in an earlier trial), 0 made"
    )
    assert len(index.families("test")) == 1


def test_an_index_of_a_later_version_is_left_alone(repository):
    take()
    with closing(sqlite3.connect(INDEX)) as db:
        db.execute("PRAGMA user_version = 5")
    with pytest.raises(BobError, match=r"items\.sqlite.*made by a later version of bob"):
        take()
    with closing(sqlite3.connect(INDEX)) as db:
        assert db.execute("SELECT count(*) FROM items").fetchone() == (10,)


def test_why_items_were_made_is_kept(repository):
    def made_because(family, code=CODE_NOW, number=0):
        recipes = [item_key(**family, number=number)]
        with ItemCache("test") as cache:
            cache.take(Wanted(recipes, family, code, on_trial=False), Work(Maker()), 4)
        return Index(INDEX).last_runs()["test"].because

    family = {"item": "image", "steps": 20, "lora": "a" * 64, "size": 64}
    assert made_because(family) == ""
    assert made_because(family) == ""  # all reused
    assert made_because(family, number=1) == "not asked for before with these settings"
    assert made_because(family | {"steps": 25, "lora": "b" * 64}) == "steps 20 -> 25, lora"
    assert made_because(family | {"steps": 25, "lora": "b" * 64, "eta": 1}) == "eta none -> 1"
    assert made_because(family, CODE_BEFORE) == "other code: bob/models/sampling.py"


def test_nothing_is_made_where_that_is_forbidden(repository, monkeypatch):
    take(KEYS[:4])
    monkeypatch.setenv(MAKE, "nothing")
    assert take(KEYS[:4])[1] == []
    with pytest.raises(BobError, match="6 of 10 items of test are not in the item cache"):
        take()
    monkeypatch.delenv(MAKE)
    before(KEYS[4:])
    monkeypatch.setenv(MAKE, "nothing")  # nor for a trial
    with pytest.raises(BobError, match="6 of 10 items of test are not in the item cache"):
        take()


# --- made again, to check --------------------------------------------------------------------


def check(make, code=CODE_NOW, share=1.0, **more):
    with CheckingCache("test", share) as cache:
        rows = cache.take(wanted(code=code, **more), Work(make), 4)
        return [one.row.recipe for one in cache.differences], cache.checked, oids_of(rows)


def test_a_check_makes_a_share_again_and_changes_nothing_where_it_is_the_same(repository):
    take()
    rows, runs = Index(INDEX).all(), Index(INDEX).last_runs()
    make = Maker()
    assert check(make)[:2] == ([], 10)
    assert make.made == list(range(10)) and max(map(len, make.batches)) == 4
    make = Maker()
    assert check(make, share=0.25)[1] == len(make.made) == 3
    assert [row.recipe for row in Index(INDEX).all()] == [row.recipe for row in rows]
    assert Index(INDEX).last_runs() == runs


def test_what_differs_in_a_check_is_forgotten_and_made_anew(repository):
    take()
    assert check(Otherwise(3))[:2] == ([KEYS[3]], 10)
    make = Maker()
    assert take(make=make)[1] == [3]


def test_a_check_overrules_a_trial_that_was_wrong(repository):
    """Position 5 was not on trial: the items of the earlier code were all taken."""
    before()
    assert len(now()[1]) == 4
    on_trial = {row.recipe for row in Index(INDEX).all() if row.maker == CODE_NOW.id}
    number = next(number for number, recipe in enumerate(KEYS) if recipe not in on_trial)
    assert check(Otherwise(number))[0] == [KEYS[number]]
    # Now what the earlier code has made is not taken, but for what was made again on trial.
    assert now()[1] == [n for n, recipe in enumerate(KEYS) if recipe not in on_trial]


def test_a_check_needs_everything_in_the_cache(repository):
    take(KEYS[:7])
    make = Maker()
    with pytest.raises(BobError, match="3 of 10 items are not in the item cache; `dvc repro test`"):
        check(make)
    assert not make.made


# --- what is not trusted ---------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"item", b"item 9"])
def test_a_damaged_object_is_named_and_made_again(repository, capsys, content):
    take()
    path = object_path(KEYS[3])
    path.chmod(0o644)
    path.write_bytes(content)
    found, made = take()
    assert found[3] == b"item 3"
    assert made == [3]
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert path.parent.name + path.name in warning
    assert KEYS[3][:12] in warning
    assert take()[1] == []
    assert not capsys.readouterr().err


def test_an_object_is_hashed_once_and_again_when_it_was_changed(repository, monkeypatch, capsys):
    take()
    hashed = []

    def counting(cache, oid):
        hashed.append(oid)
        return is_whole(cache, oid)

    is_whole = ItemCache._is_whole
    monkeypatch.setattr(ItemCache, "_is_whole", counting)
    take()
    assert len(hashed) == 10
    take()
    assert len(hashed) == 10
    path = object_path(KEYS[3])
    path.chmod(0o644)
    path.write_bytes(b"item 9")  # as long as it was
    assert take()[1] == [3]
    assert "is damaged" in capsys.readouterr().err


def test_an_object_that_is_gone_is_made_again(repository, capsys):
    take()
    object_path(KEYS[3]).unlink()
    assert take()[1] == [3]
    assert not capsys.readouterr().err


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 - 100])


def scribble(path):
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xa5" * (len(content) - 4096)
    path.write_bytes(content)


def replace(path):
    path.write_text("not a database, but long enough to be taken for one" * 100)


@pytest.mark.parametrize("damage", [cut, scribble, replace])
def test_a_damaged_index_is_moved_aside_and_a_new_one_begun(repository, capsys, damage):
    take()
    damage(INDEX)
    found, made = take()
    assert found[3] == b"item 3"
    assert made == list(range(10))
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert "bob cache adopt" in warning
    assert INDEX.with_suffix(".damaged").exists()
    assert take()[1] == []


def test_a_healthy_index_is_not_moved_by_one_who_met_the_damaged_one(repository):
    take()
    Index(INDEX)._move_aside()
    assert take()[1] == []


def test_outside_a_dvc_repository_one_line_says_so(workspace):
    code, output = invoke("cache")
    assert code == 1
    assert output.startswith("Error: a DVC repository around")
    assert output.count("\n") == 1


def test_an_index_that_cannot_be_opened_is_told_in_one_line(repository):
    INDEX.mkdir(parents=True)
    with pytest.raises(BobError, match=r"items\.sqlite, the index of the item cache") as caught:
        take()
    assert "\n" not in str(caught.value)


def test_a_database_of_dvcs_that_cannot_be_used_is_told_in_one_line(repository, monkeypatch):
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(repository / "site"))
    with pytest.raises(BobError) as caught, translated():
        raise sqlite3.OperationalError("disk I/O error")
    assert str(caught.value) == (
        f"a database of DVC's in {repository / 'site'}: disk I/O error; {UNUSABLE}"
    )


# --- several processes -----------------------------------------------------------------------

WORKER = """
import sys, time
from bob.cache.items import ItemCache
from bob.cache.wanted import Wanted
from bob.cache.work import Work
from bob.cache.recipe import Maker, item_key

def make(positions):
    time.sleep(0.05)
    print(len(positions))
    return [str(numbers[position]).encode() for position in positions]

numbers = range(*map(int, sys.argv[1:]))
with ItemCache("test") as cache:
    keys = [item_key(number=number) for number in numbers]
    wanted = Wanted(keys, {"item": "test"}, Maker({}, {}))
    rows = cache.take(wanted, Work(make), 8)
    assert [cache.read(row.oid) for row in rows] == [str(number).encode() for number in numbers]
"""


def work(first, last):
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(first), str(last)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_processes_that_want_the_same_items_share_the_work(repository):
    wanted = [(0, 400), (0, 400), (0, 300), (100, 400)]
    processes = [work(*numbers) for numbers in wanted]
    made = 0
    for process in processes:
        output, _ = process.communicate()
        assert process.returncode == 0
        made += sum(map(int, output.split()))
    # No entry is lost: everything is there, for someone who makes nothing.
    assert len(Index(INDEX).all()) == 400
    assert 400 <= made <= 500


SLOW = """
import sys, time
from pathlib import Path
from bob.cache.items import ItemCache
from bob.cache.wanted import Wanted
from bob.cache.work import Work
from bob.cache.recipe import Maker, item_key

def make(positions):
    with Path("begun").open("a") as log:
        log.write(f"{sys.argv[1]}\\n")
    while not Path("go").exists():
        time.sleep(0.02)
    return [str(position).encode() for position in positions]

with ItemCache("test") as cache:
    keys = [item_key(number=number) for number in range(2)]
    wanted = Wanted(keys, {"item": "test"}, Maker({}, {}))
    Path(f"asks {sys.argv[1]}").touch()
    rows = cache.take(wanted, Work(make), 2)
    assert [cache.read(row.oid) for row in rows] == [b"0", b"1"]
"""


def ask(name):
    """A process that asks for what takes until there is a file `go`."""
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, name], env=os.environ | {"PYTHONPATH": str(ROOT)}
    )


def begun(count):
    """Who has begun to make it, once so many have."""
    while len(names := Path("begun").read_text().split() if Path("begun").exists() else []) < count:
        time.sleep(0.02)
    return names


def all_ask(names):
    while not all(Path(f"asks {name}").exists() for name in names):
        time.sleep(0.02)
    time.sleep(1)  # by now those have begun who do not wait


def test_processes_that_begin_at_once_make_a_slow_item_once(repository):
    processes = {name: ask(name) for name in ("one", "other")}
    all_ask(processes)
    Path("go").touch()
    assert [process.wait() for process in processes.values()] == [0, 0]
    assert len(begun(1)) == 1


def test_one_of_those_who_wait_takes_over_from_one_who_is_killed(repository):
    processes = {name: ask(name) for name in ("one", "other", "third")}
    all_ask(processes)
    (first,) = begun(1)
    processes[first].kill()
    assert processes.pop(first).wait() < 0
    assert begun(2)[1] in processes
    time.sleep(1)
    Path("go").touch()
    assert [process.wait() for process in processes.values()] == [0, 0]
    assert len(begun(2)) == 2
    # What is left of it is none of the living's, and goes.
    assert len(list(INDEX.with_name("announcers").iterdir())) == 1
    for left in INDEX.with_name("announcers").iterdir():
        os.utime(left, (0, 0))
    take()
    assert not list(INDEX.with_name("announcers").iterdir())


@pytest.fixture
def other(repository, monkeypatch):
    """The name of one who lives and has announced some of the items."""
    monkeypatch.setattr(making, "_SECONDS_TO_SAY", 0.0)
    with ItemCache("test") as cache:
        folder, index = cache.folder("announcers"), cache.index
    with announcing(folder) as name:
        index.start(KEYS[:4], CODE_NOW.id, name)
        yield name


def test_what_is_waited_for_is_told_with_what_ends_the_waiting(other, monkeypatch):
    told, lock = [], INDEX.with_name("announcers") / other

    def tell(line):
        told.append(line)
        lock.unlink()

    monkeypatch.setattr(making, "tell", tell)
    assert take(KEYS[:4])[1] == list(range(4))
    assert told == [
        f"waiting: another process of bob makes 4 of the items; if it does not, remove {lock}"
    ]


def test_who_has_made_others_waits_no_longer_than_they_have_taken(other, capfd):
    assert take()[1] == list(range(10))
    assert "waiting" not in capfd.readouterr().err


def test_no_one_waits_with_a_gpu_that_another_waits_for(other, monkeypatch, capfd):
    """It may be the one that is waited for."""
    monkeypatch.setattr(gpu_locks, "in_demand", lambda: True)
    assert take(KEYS[:4])[1] == list(range(4))
    assert "waiting" not in capfd.readouterr().err


def test_pruning_forgets_what_the_dead_have_announced_and_no_one_else(other):
    index = Index(INDEX)
    index.start(KEYS[4:6], CODE_NOW.id, "killed")
    assert invoke("cache", "prune") == (0, "0 items forgotten\n")
    assert index.announced(KEYS, CODE_NOW.id) == dict.fromkeys(KEYS[:4], other)


def test_an_earlier_bob_goes_on_with_the_index(repository):
    take(KEYS[:5])
    with closing(sqlite3.connect(INDEX)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (4,)
        db.execute("INSERT INTO started VALUES ('recipe', 'maker')")
        db.execute("DROP TABLE announced")  # as one that it has made
        db.commit()
    assert take()[1] == [5, 6, 7, 8, 9]


def test_what_a_dead_process_had_begun_is_made_by_another(repository):
    Index.start(ItemCache("test").index, KEYS[:4], CODE_NOW.id, "killed")
    assert take()[1] == list(range(10))


def test_the_index_of_a_shared_cache_is_its_groups(repository):
    with Repo() as repo, repo.config.edit("repo") as config:
        config["cache"]["shared"] = "group"
    take()
    assert INDEX.stat().st_mode & 0o777 == 0o664
    assert INDEX.parent.stat().st_mode & 0o7777 == 0o2775


# --- the workspace ---------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [["hardlink"], ["symlink"], ["copy"], ["reflink", "copy"]])
def test_files_are_placed_as_dvcs_cache_type_says(repository, kinds):
    with Repo() as repo, repo.config.edit("repo") as config:
        config["cache"]["type"] = kinds
    with ItemCache("test") as cache:
        oids = oids_of(cache.take(wanted(KEYS[:3]), Work(Maker()), 4))
        paths = [Path(f"out/{number}/item") for number in range(3)]
        cache.place(oids, paths)
        again = [Path(f"again/{number}") for number in range(3)]
        cache.place(oids, again)
    assert [path.read_bytes() for path in paths] == [b"item 0", b"item 1", b"item 2"]
    assert all(path.is_symlink() == (kinds == ["symlink"]) for path in paths)
    assert all((path.stat().st_nlink > 2) == (kinds == ["hardlink"]) for path in paths)


def test_a_file_that_cannot_be_linked_is_copied(repository, monkeypatch):
    with Repo() as repo, repo.config.edit("repo") as config:
        config["cache"]["type"] = ["hardlink"]

    def refuse(*_, **__):
        raise OSError(18, "another file system")

    monkeypatch.setattr("os.link", refuse)
    with ItemCache("test") as cache:
        cache.place(oids_of(cache.take(wanted(KEYS[:1]), Work(Maker()), 4)), [Path("item")])
    assert Path("item").read_bytes() == b"item 0"


# --- keys ------------------------------------------------------------------------------------


def test_a_key_has_one_spelling():
    assert item_key(seed=1, prompt="é") == item_key(prompt="é", seed=1)
    assert len({item_key(), item_key(seed=1), item_key(seed=2), item_key(seed="1")}) == 4


CODE = '''"""What it does."""
SIDE = 3  # pixels
"""Of a square."""


def area(side: int = SIDE) -> int:
    """The area."""
    # Two factors.
    return side * side
'''


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("# Two factors.", "# The side, twice.", True),
        ('"""The area."""', '"""Pixels."""', True),
        ('"""Of a square."""', "", True),
        ("side * side", "( side*side )", True),
        ("side * side", "side ** 2", False),
        ("SIDE = 3", "SIDE = 4", False),
        ("side: int = SIDE", "side: int = 1", False),
    ],
)
def test_code_is_hashed_without_comments_and_docstrings(tmp_path, monkeypatch, old, new, same):
    monkeypatch.setattr(recipe.resources, "files", lambda _: tmp_path)
    hashes = []
    for code in (CODE, CODE.replace(old, new)):
        (tmp_path / "module.py").write_text(code)
        hashes.append(code_hashes(["module"]))
    assert CODE.replace(old, new) != CODE
    assert (hashes[0] == hashes[1]) is same


# Imported by the code that makes items, without a say in what an item is.
DECIDES_NOTHING = {
    "cache.executors.chosen": "says where items are made",
    "cache.executors.local": "makes them here",
    "cache.gpu_locks": "says which GPU is free",
    "cache.recipe": "names makers",
    "cache.work": "names what an executor is given",
    "errors": "says what went wrong",
    "formats.files": "reads and writes JSON, and hashes a photo to compare it with its manifest",
    "formats.layout": "says where outputs lie",
    "formats.schemas": "checks what is read against its schema",
}


@pytest.mark.parametrize("module", [endpoint, sampling, vlm])
def test_the_code_in_a_key_is_the_code_that_makes_the_item(module):
    imported = imported_modules(module.__name__.removeprefix("bob."))
    assert set(module.MADE_BY) == imported - set(DECIDES_NOTHING)


def test_that_a_photo_is_readable_is_said_by_the_code_that_opens_it():
    assert set(split.MADE_BY) == imported_modules("formats.photos") - set(DECIDES_NOTHING)


def test_a_captioner_is_made_by_its_own_code_and_by_that_of_either_kind():
    either = {*captioner.MADE_BY, *endpoint.MADE_BY, *vlm.MADE_BY}
    assert either == imported_modules("models.captioner") - set(DECIDES_NOTHING)


def test_a_models_content_decides_and_not_its_place_or_card(repository):
    def write(folder, **files):
        Path(folder, "part").mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            Path(folder, "part", name.replace("_", ".")).write_text(content)
        with ItemCache() as cache:
            return cache.content_hash(Path(folder))

    first = write("models/a", config_json="{}", README_md="a card")
    assert write("models/b", config_json="{}", README_md="another card") == first
    assert write("models/b", config_json="{ }") != first
    assert write("models/b", config_json="{}") == first
    assert write("models/b", merges_txt="") != first
    with ItemCache() as cache, pytest.raises(BobError, match="models/c is missing"):
        cache.content_hash(Path("models/c"))


# --- bob cache -------------------------------------------------------------------------------


def test_the_cache_shows_what_is_there_and_what_the_last_run_reused(repository):
    take(KEYS[:4])
    take()
    object_path(KEYS[0]).unlink()
    code, output = invoke("cache")
    assert code == 0
    _, line, index = output.splitlines()
    assert line.split() == ["test", "9", "54", "0", "1", "4", "6"]
    assert index == f"index: {INDEX}"


def test_pruning_forgets_what_is_gone_and_nothing_else(repository):
    take()
    object_path(KEYS[0]).unlink()
    assert invoke("cache", "prune") == (0, "1 items forgotten\n")
    assert {row.recipe for row in Index(INDEX).all()} == set(KEYS[1:])
    assert invoke("cache", "prune") == (0, "0 items forgotten\n")


def listed(path=Path("results/items/test.jsonl")):
    """Take all items and list them as a stage does, half as files and half as texts."""
    with ItemCache("test") as cache:
        rows = cache.take(wanted(), Work(Maker()), 4)
        files = [Path(f"results/test/{number}") for number in range(5)]
        cache.place(oids_of(rows[:5]), files)
        texts = [cache.read(row.oid).decode() for row in rows[5:]]
    write_items(
        path,
        [
            Item(row.recipe, row.maker, row.oid, file, text)
            for row, file, text in zip(
                rows, [*map(str, files), *[None] * 5], [*[None] * 5, *texts], strict=True
            )
        ],
    )
    return path


def test_an_index_that_was_lost_is_adopted_from_the_lists(repository):
    path = listed()
    INDEX.unlink()
    assert invoke("cache", "adopt") == (0, f"{path}: 10 items adopted\n")
    assert take()[1] == []


def test_objects_that_were_lost_are_adopted_from_the_workspace(repository):
    path = listed()
    shutil.rmtree(".dvc/cache")
    Path("results/test/1").write_bytes(b"something else")
    Path("results/test/2").unlink()
    code, output = invoke("cache", "adopt", str(path))
    assert code == 0
    assert output.startswith(f"{path}: 8 items adopted, 2 are nowhere")
    assert take()[1] == [1, 2]


def test_a_list_that_is_none_is_told_with_its_line(repository):
    path = listed()
    path.write_text(
        path.read_text()
        + json.dumps({"recipe": "../../x", "maker": "0" * 64, "md5": "0" * 32})
        + "\n"
    )
    with pytest.raises(BobError, match=r"test\.jsonl, line 11: recipe is .*; allowed: 64 hex"):
        read_items(path)
    assert invoke("cache", "adopt")[0] == 1
    shutil.rmtree("results")
    code, output = invoke("cache", "adopt")
    assert code == 1
    assert "holds no lists of items" in output


def test_the_index_is_not_in_the_way_of_dvcs_garbage_collection(repository):
    """Items that are no stage's output are DVC's to delete; the index stays, and says so."""
    take()
    (repository / "dvc.yaml").write_text("stages: {}\n")
    subprocess.run([sys.executable, "-m", "dvc", "gc", "-w", "-f", "-q"], check=True)
    oid = hashlib.md5(b"item 0").hexdigest()
    assert Index(INDEX).find(KEYS[:1]) == [Row(KEYS[0], CODE_NOW.id, oid, 6, "test")]
    assert take()[1] == list(range(10))
