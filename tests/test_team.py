"""A team's cache: what one has pushed is another's to take, and nothing is lost on the way."""

import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dvc.repo import Repo

from bob.cache.index import Index, Row, Trial
from bob.cache.items import FETCH, ItemCache
from bob.cache.recipe import Maker as Code
from bob.cache.shards import Basis, Evidence, read_shard, write_shard
from bob.cache.team import TeamIndex
from bob.cache.trials import Trials
from bob.cache.work import Work
from bob.commands import team as commands
from bob.dvc.remote import Remote
from bob.errors import BobError
from tests.conftest import ROOT
from tests.test_items import (
    CODE_BEFORE,
    CODE_NOW,
    INDEX,
    KEYS,
    Maker,
    Otherwise,
    before,
    check,
    invoke,
    now,
    wanted,
)
from tests.test_items import take as take_of

OBJECTS = Path(".dvc/cache/files/md5")


class Numbered(Maker):
    """Makes the items of these numbers."""

    def __init__(self, numbers):
        super().__init__()
        self._numbers = numbers

    def __call__(self, positions):
        return super().__call__([self._numbers[position] for position in positions])


def take(numbers=range(10), keys=KEYS):
    """Take items by their numbers; their bytes, and the numbers of those that were made."""
    return take_of([keys[number] for number in numbers], make=Numbered(numbers))


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def objects(folder=OBJECTS):
    """Name -> content of the objects in a folder of them."""
    return {
        path.parent.name + path.name: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


class Team:
    """Repositories, each of someone, with one remote, which is a folder; one of them is current."""

    def __init__(self, folder, monkeypatch):
        self._folder, self._monkeypatch = folder, monkeypatch
        self.storage = folder / "storage"
        self.objects = self.storage / "files/md5"

    def at(self, name):
        """Go to someone's repository, which is made where there is none."""
        folder = self._folder / name
        if not folder.exists():
            folder.mkdir()
            with Repo.init(str(folder), no_scm=True) as repo, repo.config.edit() as config:
                config["remote"] = {"storage": {"url": str(self.storage)}}
                config["core"]["remote"] = "storage"
        self._monkeypatch.chdir(folder)

    @property
    def shards(self):
        return sorted((self.storage / "bob/index").glob("*"))

    def object(self, content):
        oid = md5(content)
        return self.objects / oid[:2] / oid[2:]


@pytest.fixture
def team(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    team = Team(tmp_path, monkeypatch)
    team.at("alice")
    return team


def push(*arguments):
    """Push; how many items and objects."""
    code, output = invoke("cache", "push", *arguments)
    assert code == 0, output
    found = re.fullmatch(r"\w+: ([\d,]+) items pushed, ([\d,]+) objects brought\n", output)
    assert found, output
    return int(found[1].replace(",", "")), int(found[2].replace(",", ""))


def pull(*arguments):
    """Pull; how many items and shards."""
    code, output = invoke("cache", "pull", *arguments)
    assert code == 0, output
    found = re.fullmatch(r"\w+: ([\d,]+) items in (\d+) new shards\n", output)
    assert found, output
    return int(found[1].replace(",", "")), int(found[2])


def told(*arguments):
    """The one line of an error."""
    code, output = invoke("cache", *arguments)
    assert code == 1 and output.startswith("Error: ") and output.count("\n") == 1, output
    return output


def pushed(team, numbers=range(10)):
    """Alice has made items and pushed them; then it is Bob's turn, who has pulled."""
    take(numbers)
    push()
    team.at("bob")
    pull()


# --- what is shared --------------------------------------------------------------------------


def test_what_one_has_pushed_another_takes_and_makes_nothing(team):
    take()
    assert push() == (10, 10)
    team.at("bob")
    assert pull() == (10, 1)
    everything = [f"item {number}".encode() for number in range(10)]
    assert take() == (everything, [])
    assert take() == (everything, [])


def test_an_object_comes_when_its_item_is_taken_and_no_other_does(team):
    pushed(team)
    assert objects() == {}
    assert invoke("cache")[1].splitlines()[1].split() == ["test", "10", "0", "10", "0", "-", "-"]
    take(range(3))
    assert sorted(objects().values()) == [b"item 0", b"item 1", b"item 2"]
    assert invoke("cache")[1].splitlines()[1].split()[:5] == ["test", "10", "18", "7", "0"]


def test_a_fetched_object_is_one_of_dvcs_cache(team):
    pushed(team)
    with ItemCache("test") as cache:
        (row,) = cache.take(wanted(KEYS[:1]), Work(Maker()), 4)
        cache.place([row.oid], [Path("item")])
    assert (OBJECTS / row.oid[:2] / row.oid[2:]).stat().st_mode & 0o777 == 0o444
    with Repo() as repo:
        (stage,) = repo.add("item")
    assert stage.outs[0].hash_info.value == row.oid


def test_a_second_push_brings_what_is_new(team):
    take(range(6))
    assert push() == (6, 6)
    assert push() == (0, 0) and len(team.shards) == 1
    take()
    assert push() == (4, 4) and len(team.shards) == 2
    team.at("bob")
    assert pull() == (10, 2)
    assert pull() == (0, 0)


def test_an_object_is_brought_once_whether_dvc_or_bob_does(team):
    take()
    Path("file").write_bytes(b"item 3")
    with Repo() as repo:
        repo.add("file")
        repo.push()
        assert push() == (10, 9)
        Path("other").write_bytes(b"item 4")
        repo.add("other")
        assert repo.push() == 0


def test_who_pushes_learns_what_others_have_pushed(team):
    pushed(team, range(6))
    take(range(3, 10))
    team.at("alice")
    take(range(6, 7))
    push()
    team.at("bob")
    assert push() == (3, 3)  # the seventh was made by both
    team.at("alice")
    assert pull() == (3, 1)
    assert take()[1] == []


def test_an_item_keeps_its_maker_and_is_tried_like_any_other_makers(team):
    before()
    push()
    team.at("bob")
    pull()
    account, made, items = now()
    assert account == "6 reused (made by earlier code, same bytes in a trial of 4), 4 made"
    assert items == [f"item {n}".encode() for n in range(10)]
    makers = {row.recipe: row.maker for row in Index(INDEX).all() if row.recipe == KEYS[made[0]]}
    assert makers == {KEYS[made[0]]: CODE_NOW.id} or len(Index(INDEX).find([KEYS[made[0]]])) == 2
    assert Index(INDEX).maker(CODE_BEFORE.id) == CODE_BEFORE


def test_nothing_is_fetched_for_a_trial_that_fails_but_what_is_shown(team, capsys):
    before()
    push()
    team.at("bob")
    pull()
    make = Otherwise(*range(10))
    assert now(make)[1] == list(range(10))
    assert sorted(objects().values()) == [f"item {n}!".encode() for n in range(10)]
    assert "none of the 10" in capsys.readouterr().err
    team.at("carol")
    pull()
    now(Otherwise(*range(10)), differing=lambda one, other: f"{one.decode()}/{other.decode()}")
    assert re.search(r"\(item (\d)/item \1!\)", capsys.readouterr().err)


def test_a_trial_is_made_once_in_a_team(team):
    before()
    now()
    push()
    team.at("bob")
    pull()
    account, made, _ = now()
    assert made == []
    assert account.endswith("same bytes in an earlier trial), 0 made")


def test_why_items_are_made_is_known_of_what_was_pushed(team):
    before()
    push()
    team.at("bob")
    pull()
    now(Otherwise(0))
    assert Index(INDEX).last_runs()["test"].because == "other code: bob/models/sampling.py"
    assert len(Index(INDEX).families("test")) == 1


@pytest.mark.parametrize("order", [1, -1])
def test_a_difference_that_one_has_found_overrules_a_trial_that_has_found_none(team, order):
    index = TeamIndex(Path("items.sqlite"))
    number = index.number_of("storage")
    same = Evidence("f" * 64, Trial("a" * 64, "b" * 64, 4, 4), ["c" * 64])
    other = Evidence("f" * 64, Trial("b" * 64, "a" * 64, 0, 1), ["d" * 64])
    paths = [
        write_shard(Path(), Basis({"a" * 64: None, "b" * 64: None}, [], [evidence]), [])
        for evidence in (same, other)
    ]
    for path in paths[::order]:
        index.merge(number, [(path.name, read_shard(path))])
    assert index.trials("f" * 64) == [other.trial]


def test_a_difference_that_one_has_found_is_not_led_round_by_the_trials_of_others(team):
    """Alice has found two makers the same, Bob a third the same as one of them alone."""
    third = Code({"models.sampling": "third"}, {"torch": "2"})
    before()
    on_trial = now()[1]
    push()
    team.at("bob")
    index, family = Index(INDEX), wanted().family_id
    with ItemCache("test") as cache:
        cache.take(wanted([KEYS[n] for n in on_trial], third), Work(Numbered(on_trial)), 4)
    index.record_trial(family, Trial(third.id, CODE_NOW.id, 4, 4), [])
    index.record_trial(family, Trial(CODE_BEFORE.id, third.id, 3, 4), [])
    push()
    team.at("carol")
    pull()
    account, made, _ = now(code=third)
    assert made == sorted(set(range(10)) - set(on_trial))
    assert account == "4 reused, 6 made"
    # And whoever has the first one's code takes nothing of the third's but what is its own.
    same, different = Trials(Index(INDEX), "test").judged(wanted(code=CODE_BEFORE))
    assert (same, different) == ({CODE_BEFORE.id, CODE_NOW.id}, {third.id})


def test_what_a_check_has_found_is_pushed_without_items(team):
    before()
    now()
    push()
    on_trial = {row.recipe for row in Index(INDEX).all() if row.maker == CODE_NOW.id}
    number = next(number for number, recipe in enumerate(KEYS) if recipe not in on_trial)
    check(Otherwise(number))
    assert push() == (0, 0) and len(team.shards) == 2
    assert push() == (0, 0) and len(team.shards) == 2
    team.at("bob")
    pull()
    assert now()[1] == [n for n, recipe in enumerate(KEYS) if recipe not in on_trial]


def test_what_is_at_a_remote_is_neither_gone_nor_unknown(team):
    pushed(team)
    with ItemCache() as cache:
        assert len(cache.known(wanted())) == 10
    assert invoke("cache", "prune") == (0, "0 items forgotten\n")
    assert take()[1] == []
    shutil.rmtree(OBJECTS)  # as `dvc gc` does
    assert invoke("cache", "prune") == (0, "0 items forgotten\n")
    assert take()[1] == []


def test_an_index_that_was_lost_comes_back(team):
    take()
    push()
    INDEX.unlink()
    assert pull() == (10, 1)
    assert take()[1] == []


def test_items_go_to_each_of_two_remotes(team):
    take()
    with Repo() as repo, repo.config.edit() as config:
        config["remote"]["backup"] = {"url": str(team.storage.parent / "backup")}
    assert push() == (10, 10)
    assert push("-r", "backup") == (10, 10)
    assert push() == push("-r", "backup") == (0, 0)
    shutil.rmtree(OBJECTS)
    team.object(b"item 3").unlink()  # the other one still has it
    assert take()[1] == []


def test_more_remotes_than_can_be_told_apart_are_refused(team):
    index = TeamIndex(Path("items.sqlite"))
    names = [f"remote-{number}" for number in range(63)]
    assert [index.number_of(name) for name in names] == list(range(63))
    assert index.number_of("remote-7") == 7
    with pytest.raises(BobError, match="63 remotes"):
        index.number_of("another")
    row = Row(KEYS[0], CODE_NOW.id, "a" * 32, 6, "test")
    path = write_shard(Path(), Basis({CODE_NOW.id: CODE_NOW}), [row])
    index.merge(62, [(path.name, read_shard(path))])
    assert index.all()[0].remotes == 1 << 62
    assert len(index.page(62, None, 10, shared=True)) == 1 and index.page(62, None, 10) == []


# --- what is not trusted ---------------------------------------------------------------------


def test_a_damaged_object_of_the_remote_is_told_once_made_again_and_replaced(team, capsys):
    pushed(team)
    path = team.object(b"item 3")
    path.chmod(0o644)
    path.write_bytes(b"item 9")  # as many bytes
    found, made = take()
    assert made == [3] and found[3] == b"item 3"
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert "remote `storage`: of 10 objects 0 are gone and 1 damaged" in warning
    assert push() == (1, 1)
    assert path.read_bytes() == b"item 3"
    team.at("carol")
    pull()
    assert take()[1] == []


def test_objects_that_are_gone_at_the_remote_are_told_in_one_line_and_made_again(team, capsys):
    pushed(team)
    for number in (3, 4):
        team.object(f"item {number}".encode()).unlink()
    assert take()[1] == [3, 4]
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "2 are gone" in warning
    assert push() == (2, 2)


def test_a_damaged_object_of_the_cache_is_fetched_again(team, capsys):
    take()
    push()
    path = next(path for path in OBJECTS.rglob("*") if path.is_file())
    path.chmod(0o644)
    path.write_bytes(b"damaged")
    assert take()[1] == []
    assert "fetched from a remote again" in capsys.readouterr().err


def test_a_damaged_object_is_never_pushed(team):
    take()
    oid = md5(b"item 3")
    path = OBJECTS / oid[:2] / oid[2:]
    path.chmod(0o644)
    path.write_bytes(b"item 9")
    code, output = invoke("cache", "push")
    assert code == 0 and f"object {oid} of the DVC cache" in output
    assert "9 items pushed, 9 objects brought" in output
    assert oid not in objects(team.objects)


def test_half_an_object_that_a_killed_push_has_left_is_replaced(team):
    take()
    path = team.object(b"item 3")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"ite")
    assert push() == (10, 10)
    assert path.read_bytes() == b"item 3"


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_shard_is_told_and_left_out(team, damage):
    take(range(5))
    push()
    (first,) = team.shards
    take()
    push()
    content = first.read_bytes()
    first.write_bytes(content[:-9] if damage == "cut" else content[:-9] + bytes(9))
    team.at("bob")
    code, output = invoke("cache", "pull")
    assert code == 0 and f"shard {first.name} is damaged" in output and output.count("\n") == 2
    assert len(Index(INDEX).all()) == 5
    # Who still has what it had pushes that anew once it is removed.
    assert invoke("cache", "gc", "--remote")[0] == 0
    team.at("alice")
    assert push() == (5, 0)


LINE = ["a" * 64, "b" * 32, 6, 0, 0]
HEADER = {"bob": 1, "makers": [["c" * 64, None]], "stages": ["test"], "families": [], "trials": []}


@pytest.mark.parametrize(
    ("header", "line", "why"),
    [
        (HEADER, [*LINE[:1], "../../../../etc/passwd", *LINE[2:]], "no shard of items: found"),
        (HEADER, ["A" * 64, *LINE[1:]], "no shard of items: found"),
        (HEADER, [*LINE[:3], 1, 0], "no shard of items"),
        (HEADER | {"stages": ["\x1b[2J"]}, LINE, "no shard of items: found"),
        (HEADER | {"makers": [["c" * 64, {"code": {}, "libraries": {}}]]}, LINE, "another's name"),
        ({"bob": 2}, LINE, "made by a later version of bob"),
        ([], LINE, "no shard of items"),
    ],
)
def test_what_is_no_shard_is_refused_as_a_whole(team, header, line, why):
    take()
    push()
    content = gzip.compress(
        "".join(f"{json.dumps(one)}\n" for one in (header, LINE, line)).encode()
    )
    path = team.shards[0].with_name(f"{hashlib.sha256(content).hexdigest()}.jsonl.gz")
    path.write_bytes(content)
    team.at("bob")
    assert why in told("pull")
    assert not Index(INDEX).find(["a" * 64])
    assert why in told("gc", "--remote") and len(team.shards) == 2


def test_a_shard_is_the_same_bytes_for_the_same_items_and_reads_as_it_was_written(tmp_path):
    rows = [Row(key, code.id, md5(key.encode()), 6, "test") for key in KEYS for code in (CODE_NOW,)]
    basis = Basis({CODE_NOW.id: CODE_NOW}, [], [])
    path = write_shard(tmp_path, basis, rows)
    assert path.read_bytes()[4:8] == bytes(4)  # where gzip writes the time
    (tmp_path / "again").mkdir()
    assert write_shard(tmp_path / "again", basis, rows).name == path.name
    shard = read_shard(path)
    assert shard.basis == basis and list(shard.rows) == rows


# --- who may write ---------------------------------------------------------------------------


def test_who_has_pulled_read_only_does_not_push(team):
    take(range(5))
    push()
    team.at("ci")
    assert pull("--read-only") == (5, 1)
    before = {path: path.stat().st_mtime_ns for path in team.storage.rglob("*")}
    take()
    for command in (("push",), ("push", "-r", "storage"), ("gc", "--remote")):
        assert "read-only here since `bob cache pull --read-only`" in told(*command)
    pull("--read-only")
    assert {path: path.stat().st_mtime_ns for path in team.storage.rglob("*")} == before
    pull()
    assert push() == (5, 5)


# --- what cannot be reached ------------------------------------------------------------------


def test_without_a_remote_one_line_says_how_to_add_one(team):
    with Repo() as repo, repo.config.edit() as config:
        del config["core"]["remote"]
    assert "`dvc remote add -d NAME URL`" in told("push")
    assert "remote 'nowhere' doesn't exist" in told("pull", "-r", "nowhere")


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://127.0.0.1:1/x", "cannot be listed"),
        ("gs://bucket/x", "pip install 'dvc[gs]'"),
        ("ssh://nobody@127.0.0.1:1/x", "remote `storage` (ssh://127.0.0.1:1/x): "),
        ("{file}", "Not a directory"),
    ],
)
def test_a_remote_that_cannot_be_used_is_told_in_one_line(team, monkeypatch, url, why):
    if url.startswith("gs"):
        monkeypatch.setitem(sys.modules, "dvc_gs", None)
    if url.startswith("ssh"):
        pytest.importorskip("dvc_ssh")
    Path("file").touch()
    take()
    with Repo() as repo, repo.config.edit() as config:
        config["remote"]["storage"]["url"] = url.format(file=Path("file").absolute())
    for command in ("push", "pull"):
        assert why in told(command)


def test_a_full_disk_is_told_in_one_line_and_leaves_no_shard(team, monkeypatch):
    take()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dvc_objects.fs.local.copyfile", full)
    assert "remote `storage`" in (line := told("push")) and "No space left on device" in line
    assert team.shards == []
    monkeypatch.undo()
    team.at("alice")
    assert push() == (10, 10)


def test_items_of_a_remote_that_is_away_are_not_made_unasked(team, monkeypatch):
    pushed(team)
    away = team.storage.rename(team.storage.with_name("away"))
    with pytest.raises(BobError, match=r"has no items .*right one\?\); with BOB_FETCH=nothing"):
        take()
    assert "had 1 shards of items and has none now" in told("pull")
    monkeypatch.setenv(FETCH, "nothing")
    assert take(range(4))[1] == [0, 1, 2, 3]
    with ItemCache() as cache:
        assert len(cache.known(wanted())) == 4
    monkeypatch.delenv(FETCH)
    away.rename(team.storage)
    assert take()[1] == []


def test_items_of_a_remote_that_was_renamed_are_not_made_unasked(team):
    pushed(team)
    with Repo() as repo, repo.config.edit() as config:
        config["remote"]["other"] = config["remote"].pop("storage")
        config["core"]["remote"] = "other"
    with pytest.raises(BobError, match="remote 'storage' doesn't exist"):
        take()
    pull()
    assert take()[1] == []


def test_a_push_to_an_emptied_remote_begins_anew(team):
    take()
    push()
    shutil.rmtree(team.storage)
    assert push() == (10, 10)


# --- gc --------------------------------------------------------------------------------------


def collect():
    code, output = invoke("cache", "gc", "--remote")
    assert code == 0, output
    found = re.fullmatch(r"storage: (\d+) shards packed into (\d+), (\d+) items .* gone\n", output)
    assert found, output
    return tuple(map(int, found.groups()))


def test_gc_packs_shards_and_loses_nothing(team):
    before()
    push()
    now()
    push()
    more = [*KEYS, *(f"{number:064x}" for number in range(10, 20))]
    for number in range(10, 14):
        take([number], more)
        push()
    assert len(team.shards) == 6
    assert collect() == (6, 1, 0)
    team.at("bob")
    assert pull() == (10 + 4 + 4, 1)
    assert now()[1] == take(range(10, 14), more)[1] == []
    assert Index(INDEX).maker(CODE_BEFORE.id) == CODE_BEFORE
    assert len(Index(INDEX).families("test")) == 1
    assert collect() == (1, 1, 0)


def test_gc_forgets_items_whose_object_is_gone_and_who_has_it_can_push_it_again(team, capsys):
    take()
    push()
    team.object(b"item 3").unlink()
    team.at("bob")
    pull()
    assert collect() == (1, 1, 1)
    assert pull() == (9, 1)
    assert take()[1] == [3]
    assert not capsys.readouterr().err
    team.at("alice")
    assert push() == (1, 1)


def test_gc_makes_shards_of_no_more_than_so_many_items(team, monkeypatch):
    monkeypatch.setattr(commands, "ROWS", 4)
    monkeypatch.setattr(commands, "_PUSHED", 4)
    take()
    assert push() == (10, 10) and len(team.shards) == 3
    team.object(b"item 3").unlink()
    take(range(3), [f"{number:064x}" for number in range(3)])  # the same bytes under other keys
    assert push() == (3, 0)
    assert collect() == (4, 3, 1)
    team.at("bob")
    assert pull() == (12, 3)


def test_a_pull_beside_gc_lists_again(team, monkeypatch):
    take(range(5))
    push()
    take()
    push()
    stale = {path.name for path in team.shards}
    collect()
    files, listings = Remote.files, [stale] * 20
    monkeypatch.setattr(Remote, "files", lambda self: listings.pop() if listings else files(self))
    team.at("bob")
    assert "lists shards that it does not have" in told("pull")
    del listings[1:]
    assert pull() == (10, 1)
    assert not listings and take()[1] == []


def test_of_an_item_with_two_objects_that_which_was_here_stays(team):
    """Two have made one item otherwise, as machines of two kinds do."""
    index = TeamIndex(Path("items.sqlite"))
    number = index.number_of("storage")

    def merge(*oids, anew=False):
        rows = [Row(KEYS[0], CODE_NOW.id, oid * 32, 6, "test") for oid in oids]
        path = write_shard(Path(), Basis({CODE_NOW.id: CODE_NOW}), rows)
        index.merge(number, [(path.name, read_shard(path))], anew=anew)
        return [(row.oid[0], row.remotes) for row in index.all()]

    assert merge("a") == [("a", 1)]
    assert merge("b") == [("a", 1)]
    assert merge("b", anew=True) == [("b", 1)]  # the other one is nowhere now
    index.found_whole(index.all())
    assert merge("a", anew=True) == [("b", 0)]  # to be pushed
    assert merge("b") == [("b", 1)]


def test_drafts_of_the_dead_go_with_gc_and_no_one_elses(team):
    take()
    push()
    for name, age in {"old": 2 * 86400, "new": 60}.items():
        draft = team.storage / f"bob/index/{'0' * 64}.jsonl.gz.{name}.tmp"
        draft.write_bytes(b"half")
        os.utime(draft, (time.time() - age,) * 2)
    team.at("bob")
    assert pull() == (10, 1)
    collect()
    assert [path.name[-7:] for path in team.shards if path.suffix == ".tmp"] == ["new.tmp"]


# --- several at once -------------------------------------------------------------------------


def start(folder, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "bob", "cache", *arguments],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


@pytest.mark.slow
def test_pushes_pulls_and_gcs_at_once_lose_nothing(team):
    keys = [f"{number:064x}" for number in range(400)]
    for place, name in enumerate("abcd"):
        team.at(name)
        numbers = range(100 * place, min(100 * place + 150, 400))
        take(numbers, keys)
    for _ in range(2):
        running = [start(team.storage.parent / name, "push") for name in "abcd"]
        team.at("e")
        running += [start(Path.cwd(), "pull")]
        if team.shards:
            running += [start(Path.cwd(), "gc", "--remote") for _ in range(2)]
        for process in running:
            assert process.wait() == 0, process.stderr.read()
    assert collect()[2] == 0
    pull()
    assert {row.recipe for row in Index(INDEX).all()} == set(keys)
    assert take(range(400), keys)[1] == []
