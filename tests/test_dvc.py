"""What bob relies on in DVC's insides: where DVC moves something, these fail first."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from dvc.repo import Repo

from bob.cli import cli
from bob.commands import check as commands
from bob.commands.check import check_objects
from bob.dvc import experiments, remote
from bob.dvc.forecast import MAY_RUN, RESTORED, RUNS, UP_TO_DATE, Forecast
from bob.dvc.locks import release_dead
from bob.dvc.pipeline import CHANGED, MISSING, NEW, UNCACHED, Pipeline
from bob.dvc.repository import open_repository
from bob.dvc.store import ObjectStore, copy_file
from bob.errors import BobError
from tests.dvc_project import environment, link_as_here, run

PIPELINE = """\
stages:
  cut:
    cmd: mkdir -p out && head -c ${size} in/a > out/a
    deps: [in]
    params: [size, more.depth]
    meta: {optional_deps: [in]}
    outs:
      - out:
          meta: {deterministic: false}
  count:
    cmd: wc -c < out/a > count
    deps: [out/a]
    outs: [count]
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A small pipeline that has run, as the current folder."""
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "dvc.yaml": PIPELINE,
        "params.yaml": "size: 3\nmore: {depth: 1, other: 2}\n",
        "in/a": "abcdef",
    }.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    with Repo.init(no_scm=True) as repo:
        repo.reproduce()
    return tmp_path


def set_size(size):
    Path("params.yaml").write_text(f"size: {size}\nmore: {{depth: 1, other: 2}}\n")


def reproduce():
    with Repo() as repo:
        repo.reproduce()


def states():
    with Pipeline() as pipeline:
        return Forecast(pipeline).states


# --- the store -------------------------------------------------------------------------------


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def test_an_object_lies_where_dvc_looks_for_it_and_is_linked_into_the_workspace(repository):
    oid = md5(b"content")
    with ObjectStore() as store:
        assert not store.exists(oid)
        store.add(oid, b"content")
        assert store.exists(oid)
        assert store.path(oid) == repository / ".dvc/cache/files/md5" / oid[:2] / oid[2:]
        assert store.path(oid).stat().st_mode & 0o777 == 0o444  # no one writes into it by mistake
        store.place([oid, oid], [Path("a/one"), Path("b/two")])
        assert Path("a/one").read_bytes() == Path("b/two").read_bytes() == b"content"
        store.path(oid).chmod(0o644)
        store.path(oid).write_bytes(b"damaged")
        store.add(oid, b"content")  # also over one that is there
        assert store.path(oid).read_bytes() == b"content"
        with pytest.raises(BobError, match="went from the DVC cache while the stage ran"):
            store.place(["0" * 32], [Path("c")])
        assert store.folder("bob").is_dir() and not store.shared
    with Repo() as repo:  # the file in the workspace is the object, as DVC sees it
        (stage,) = repo.add("a/one")
        assert stage.outs[0].hash_info.value == oid


def test_hashes_of_a_folder_are_dvcs(repository):
    Path("in/b").mkdir()
    Path("in/b/c").write_text("c")
    Path(".dvcignore").write_text("*.tmp\n")
    Path("in/x.tmp").write_text("x")
    with ObjectStore() as store:
        assert store.hashes(Path("in")) == {"a": md5(b"abcdef"), "b/c": md5(b"c")}


def test_a_cache_for_a_group_says_so(repository):
    with Repo() as repo, repo.config.edit("local") as config:
        config["cache"]["shared"] = "group"
    with ObjectStore() as store:
        assert store.shared
        assert store.folder("bob").stat().st_mode & 0o070 == 0o070


def test_a_copy_is_no_link(tmp_path):
    (tmp_path / "a").write_text("a")
    copy_file(str(tmp_path / "a"), str(tmp_path / "b"))
    assert (tmp_path / "b").read_text() == "a"
    assert (tmp_path / "b").stat().st_ino != (tmp_path / "a").stat().st_ino


# --- links ---------------------------------------------------------------------------------------


def inode(path):
    return Path(path).stat().st_ino


def link_of(oid):
    with ObjectStore() as store:
        return store.path(oid)


@pytest.fixture
def linked(repository):
    """Two photos and their copy that DVC has been given, a photo that it has not."""
    link_as_here()
    for name in ("photos/one", "photos/two", "loose/own"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(name)
    with Repo() as repo:
        repo.add("photos")
    return repository


def write_in_place(path):
    """As root may, though the file is read-only."""
    Path(path).chmod(0o644)
    with Path(path).open("r+b") as file:
        file.write(b"PHOTO")
    Path(path).chmod(0o444)


def copy(folder, **names):
    with ObjectStore() as store:
        store.copy({Path(folder, old): Path(new) for old, new in names.items()})


def test_what_dvc_tracks_lies_once_on_the_disk_and_is_read_only(linked):
    for name in ("photos/one", "photos/two"):
        assert inode(name) == inode(link_of(md5(name.encode())))
        assert Path(name).stat().st_mode & 0o222 == 0
    copy("photos", one="copied", two="copied_too")
    assert inode("copied") == inode("photos/one") and inode("copied_too") == inode("photos/two")


def test_an_output_is_linked_once_it_is_committed(linked):
    set_size(5)
    for _ in range(2):  # also where its object is there already
        with Repo() as repo:
            repo.reproduce(force=True)
        assert inode("out/a") == inode(link_of(md5(b"abcde")))


def test_what_dvc_does_not_track_is_copied_though_it_is_read_only(linked):
    with ObjectStore() as store:
        store.add(md5(b"loose/own"), b"loose/own")  # also where an object has this content
    Path("loose/own").chmod(0o444)
    copy("loose", own="copied")
    assert Path("copied").read_text() == "loose/own"
    assert inode("copied") not in (inode("loose/own"), inode(link_of(md5(b"loose/own"))))
    Path("copied").write_text("writable")
    assert Path("loose/own").read_text() == "loose/own"


def test_a_link_that_leads_to_a_file_is_copied_as_the_file(linked):
    Path("loose/link").symlink_to("own")
    copy("loose", link="copied")
    assert not Path("copied").is_symlink() and Path("copied").read_text() == "loose/own"


def test_where_no_link_can_be_made_a_tracked_file_is_copied(linked, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("dvc_objects.fs.local.LocalFileSystem.hardlink", refuse)
    monkeypatch.setattr("dvc_objects.fs.local.LocalFileSystem.symlink", refuse)
    copy("photos", one="copied")
    assert Path("copied").read_text() == "photos/one" and inode("copied") != inode("photos/one")


def on_disk():
    """Bytes of all files in the workspace and of all objects that are no list of files."""
    files = [path for path in Path().rglob("*") if path.is_file() and ".dvc" not in path.parts]
    files += [path for path in Path(".dvc/cache/files/md5").rglob("*") if path.suffix != ".dir"]
    found = [path.lstat() for path in files if path.is_file() and path.suffix != ".dvc"]
    return sum({one.st_ino: one.st_size for one in found}.values())


@pytest.mark.parametrize("kinds", [None, "copy", "reflink,hardlink", "hardlink,symlink", "symlink"])
def test_what_copies_will_add_on_the_disk_is_known_before(repository, monkeypatch, kinds):
    def refuse(*_, **__):
        raise OSError(errno.ENOTSUP, "no reflinks")

    monkeypatch.setattr("dvc_objects.fs.local.LocalFileSystem.reflink", refuse)
    monkeypatch.setattr("dvc_objects.fs.system.reflink", refuse)
    with Repo() as repo, repo.config.edit() as config:
        config["cache"] = {"type": kinds} if kinds else {}
    for name in ("photos/one", "loose/own"):
        Path(name).parent.mkdir()
        Path(name).write_text(name)
    with Repo() as repo:
        repo.add("photos")
    with ObjectStore() as store:
        assert store.stores_once() == (kinds in ("hardlink,symlink", "symlink"))
        expected = store.new_bytes([Path("photos/one"), Path("loose/own")])
        before = on_disk()
        Path("copied").mkdir()
        store.copy({Path("photos/one"): Path("copied/1"), Path("loose/own"): Path("copied/2")})
    with Repo() as repo:
        repo.add("copied")
    symlinks = sum(path.lstat().st_size for path in Path("copied").iterdir() if path.is_symlink())
    assert on_disk() - before - symlinks == expected


def test_a_file_system_that_clones_stores_once(repository, monkeypatch):
    monkeypatch.setattr("dvc_objects.fs.generic.test_links", lambda kinds, *_: kinds)
    with ObjectStore() as store:
        assert store.stores_once()


def test_a_write_through_a_link_is_named_and_mended(linked, capsys):
    with Repo() as repo, repo.config.edit() as config:
        config["remote"]["storage"] = {"url": str(linked / "storage")}
        config["core"]["remote"] = "storage"
    with Repo() as repo:
        repo.push()
    assert check_objects()
    assert "all of them whole" in capsys.readouterr().out
    write_in_place("photos/one")
    with Repo() as repo:
        assert "photos.dvc" in repo.status()
        repo.checkout(force=True)  # which takes a read-only object to be whole
        assert repo.status() == {}
    assert not check_objects()
    first, second = capsys.readouterr().out.splitlines()
    oid = md5(b"photos/one")
    assert first.startswith("written to since DVC put it there: photos/one, .dvc/cache/files/md5/")
    assert "`dvc fetch` and `dvc checkout`" in second
    with pytest.raises(BobError, match="photos/one is not what DVC has recorded") as caught:
        copy("photos", one="copied", two="copied_too")
    assert "\n" not in str(caught.value) and not Path("copied").exists()
    for path in ("photos/one", link_of(oid)):
        Path(path).unlink()
    with Repo() as repo:
        repo.fetch()
        repo.checkout()
    assert check_objects() and Path("photos/one").read_text() == "photos/one"


@pytest.mark.parametrize(("stages", "status"), [([], 1), (["audit"], 0)])
def test_a_check_of_all_stages_fails_where_a_file_was_written_to(
    linked, monkeypatch, stages, status
):
    monkeypatch.setattr(commands, "check", lambda stages, share: True)  # all items are the same
    assert CliRunner().invoke(cli, ["cache", "check", *stages]).exit_code == 0
    write_in_place("photos/one")
    assert CliRunner().invoke(cli, ["cache", "check", *stages]).exit_code == status


def test_a_written_file_that_is_added_again_is_what_it_is_now(linked):
    before = Path("photos.dvc").read_text()
    write_in_place("photos/one")
    with Repo() as repo:
        repo.add("photos")
    copy("photos", one="copied")
    assert Path("copied").read_text() == "PHOTOs/one"
    assert check_objects()
    Path("photos.dvc").write_text(before)
    with Repo() as repo:
        repo.checkout(force=True)
    assert not check_objects()  # the object of what it was, which an earlier commit names


def test_outside_a_repository_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BobError, match=r"a DVC repository around .* is needed") as caught:
        open_repository()
    assert "\n" not in str(caught.value)


# --- remotes ---------------------------------------------------------------------------------


@pytest.fixture
def store(repository):
    with Repo() as repo, repo.config.edit() as config:
        config["remote"]["storage"] = {"url": str(repository / "storage")}
        config["core"]["remote"] = "storage"
    with ObjectStore() as store:
        yield store


@pytest.mark.parametrize("asked_one_by_one", [1000, 1])
def test_objects_go_to_a_remote_where_dvc_looks_for_them_and_come_back(
    store, monkeypatch, asked_one_by_one
):
    monkeypatch.setattr(remote, "_ASKED_ONE_BY_ONE", asked_one_by_one)
    contents = {md5(content): content for content in (b"one", b"three", b"seven")}
    sizes = {oid: len(content) for oid, content in contents.items()}
    for oid, content in contents.items():
        store.add(oid, content)
    storage = remote.Remote(store)
    assert storage.name == "storage"
    assert storage.sizes(contents) == {}
    assert storage.lacking(sizes) == set(contents)
    storage.bring(contents)
    assert storage.lacking(sizes) == set() and dict(storage.objects()) == sizes
    assert storage.sizes([*contents, "0" * 32]) == sizes
    with Repo() as repo:
        there = repo.cloud.get_remote_odb("storage")
        assert {oid for oid in contents if there.exists(oid)} == set(contents)
    first, second, third = contents
    path = Path("storage/files/md5") / first[:2] / first[2:]
    path.chmod(0o644)
    path.write_bytes(b"other")
    assert storage.lacking(sizes) == {first}  # of another size
    storage.bring([first])
    assert path.read_bytes() == contents[first]
    Path("storage/files/md5", second[:2], second[2:]).unlink()
    path = Path("storage/files/md5") / third[:2] / third[2:]
    path.chmod(0o644)
    path.write_bytes(b"sevne")
    for oid in contents:
        store.path(oid).unlink()
    storage.put(write_file(Path("a")))
    assert storage.fetch(list(contents)) == ({second}, {third})
    assert [store.exists(oid) for oid in contents] == [True, False, False]
    store.add(third, b"seven")
    assert storage.lacking({third: 5}) == set()
    assert storage.lacking({third: 5}, again={third}) == {third}
    storage.bring([third])
    assert path.read_bytes() == b"seven"


def write_file(folder):
    """A file of bob's, as it lies at a remote: named by its hash."""
    folder.mkdir(exist_ok=True)
    (folder / f"{hashlib.sha256(b'content').hexdigest()}.jsonl.gz").write_bytes(b"content")
    return next(folder.iterdir())


def test_files_of_bob_lie_beside_dvcs_objects(store):
    storage = remote.Remote(store, "storage")
    assert storage.files() == set()
    path = write_file(Path("a"))
    storage.put(path)
    storage.put(path)
    assert storage.files() == {path.name}
    assert [file.name for file in Path("storage/bob/index").iterdir()] == [path.name]
    Path("b").mkdir()
    assert storage.get([path.name], Path("b")) == set()
    assert Path("b", path.name).read_bytes() == b"content"
    with pytest.raises(FileNotFoundError):
        storage.get(["0" * 64 + ".jsonl.gz"], Path("b"))
    Path("storage/bob/index", path.name).write_bytes(b"other")
    assert storage.get([path.name], Path("b")) == {path.name}
    assert not Path("b", path.name).exists()
    storage.remove([path.name])
    storage.remove([path.name])
    assert storage.files() == set()


# --- the pipeline ----------------------------------------------------------------------------


def test_the_pipeline_as_declared_and_recorded(repository):
    set_size(4)
    with Pipeline() as pipeline:
        assert list(pipeline.stages) == ["cut", "count"]
        cut = pipeline.stages["cut"]
        assert cut.command == "mkdir -p out && head -c 4 in/a > out/a" and cut.command_changed
        assert (cut.deps, cut.outs) == (("in",), ("out",))
        assert cut.out_files == (repository / "out",)
        assert cut.meta == {"optional_deps": ["in"]}
        assert cut.meta_of("out") == {"deterministic": False}
        (params,) = cut.params
        assert params.file == "params.yaml" and set(params.keys) == {"size", "more.depth"}
        assert params.recorded == {"size": 3, "more.depth": 1}
        assert params.present == {"size": 4, "more.depth": 1}
        assert cut.lock and cut.lock["deps"][0]["path"] == "in"
        assert pipeline.root == repository
        assert pipeline.is_stale("cut") and not pipeline.is_stale("count")


def test_a_stage_that_never_ran_and_a_pipeline_that_dvc_refuses(repository):
    pipeline = Path("dvc.yaml")
    pipeline.write_text(PIPELINE.replace("count:", "sum:", 1))
    with Pipeline() as found:
        assert found.stages["sum"].lock is None
    pipeline.write_text(PIPELINE.replace("cmd: wc", "command: wc"))
    with pytest.raises(BobError, match=r"dvc\.yaml") as caught:
        Pipeline()
    assert "\n" not in str(caught.value)


def test_what_has_become_of_outputs(repository):
    def condition(name):
        with Pipeline() as pipeline:
            return [how for _, how in pipeline.stages[name].changed_outs()]

    assert condition("count") == []
    Path("count").write_text("7")
    assert condition("count") == [CHANGED]
    Path("count").unlink()
    assert condition("count") == [MISSING]
    reproduce()
    with Repo() as repo:
        (oid,) = (out.hash_info.value for out in repo.index.outs if out.def_path == "count")
    with ObjectStore() as store:
        store.path(oid).unlink()
    assert condition("count") == [UNCACHED]
    Path("dvc.yaml").write_text(PIPELINE.replace("outs: [count]", "outs: [count, sum]"))
    assert NEW in condition("count")


# --- the forecast ----------------------------------------------------------------------------


def test_the_forecast_is_what_dvc_then_does(repository):
    assert states() == {"cut": UP_TO_DATE, "count": UP_TO_DATE}
    set_size(4)
    assert states() == {"cut": RUNS, "count": MAY_RUN}
    reproduce()
    set_size(3)
    assert states() == {"cut": RESTORED, "count": RESTORED}  # by DVC's run cache
    with Pipeline() as pipeline:
        forecast = Forecast(pipeline)
        location = forecast.file(Path("out/a"))
        assert location is not None and location.read_text() == "abc"  # in the cache, not here
        assert Path("out/a").read_text() == "abcd"
        assert forecast.files(Path("out")) == {"a": md5(b"abc")}
    reproduce()
    assert Path("out/a").read_text() == "abc"
    assert states() == {"cut": UP_TO_DATE, "count": UP_TO_DATE}


def test_a_dependency_that_is_missing(repository):
    Path("dvc.yaml").write_text(PIPELINE.replace("[out/a]", "[out/a, gone]"))
    with Pipeline() as pipeline:
        forecast = Forecast(pipeline)
        assert forecast.missing == ["gone"]
        (dep,) = [dep for dep in forecast.dependencies["count"] if dep.missing]
        assert dep.path == "gone" and dep.coming is None and not dep.recorded


def test_files_of_a_dependency_then_and_now(repository):
    with Pipeline() as pipeline:
        forecast = Forecast(pipeline)
        (dep,) = forecast.dependencies["cut"]
        assert forecast.recorded_files(dep) is None  # DVC keeps none of what it does not track
    with Repo() as repo:
        repo.add("in")
    Path("in/b").write_text("b")
    with Pipeline() as pipeline:
        forecast = Forecast(pipeline)
        (dep,) = forecast.dependencies["cut"]
        assert dep.coming != dep.recorded
        assert forecast.recorded_files(dep) == {"a": md5(b"abcdef")}
        assert forecast.present_files(dep) == {"a": md5(b"abcdef"), "b": md5(b"b")}
        (out,) = forecast.dependencies["count"]
        assert forecast.recorded_files(out) is None is forecast.present_files(out)  # a file
        assert out.md5 == md5(b"abc")


# --- experiments -----------------------------------------------------------------------------


@pytest.fixture
def committed(tmp_path, monkeypatch):
    """A small pipeline in git, with metrics, as the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("dvc.yaml").write_text(
        "stages:\n  one:\n    cmd: >-\n      mkdir -p out && echo picture > out/a &&"
        ' echo \'{"a": {"size": ${size}}}\' > m.json\n'
        "    outs: [out]\n    metrics: [{m.json: {cache: false}}]\n"
    )
    Path("params.yaml").write_text("size: 3\n")
    changes = environment(tmp_path)
    for name in changes.keys() - os.environ.keys():
        monkeypatch.setenv(name, changes[name])
    monkeypatch.setenv("PATH", changes["PATH"])
    run(tmp_path, "git", "init", "--quiet")
    run(tmp_path, sys.executable, "-m", "dvc", "init", "--quiet")
    reproduce()  # an experiment keeps a file of metrics that git tracks already
    run(tmp_path, "git", "add", "--all")
    run(tmp_path, "git", "commit", "--quiet", "--message", "one")
    return tmp_path


@pytest.mark.slow
def test_the_queue_and_what_an_experiment_leaves(committed):
    with experiments.Queue() as queue:
        assert queue.states() == {} and queue.workers() == []
        for name, size in (("first", 4), ("second", 5)):
            queue.put(name, targets=["one"], params=[f"size={size}"], message="m", force=False)
        assert queue.states() == {"first": experiments.QUEUED, "second": experiments.QUEUED}
        queue.remove(["second"])
        assert queue.states() == {"first": experiments.QUEUED}
        queue.start_workers(1)
        (worker,) = wait_for(queue.workers)
        assert "queue-worker" in worker.cmdline()
    revision = wait_for(lambda: experiments.finished().get("first"))
    assert experiments.metrics(Path("m.json"), revision) == {"a": {"size": 4}}
    assert experiments.read_bytes(Path("out/a"), revision) == b"picture\n"
    with pytest.raises(FileNotFoundError):
        experiments.read_bytes(Path("out/b"), revision)
    with experiments.Queue() as queue:
        assert wait_for(lambda: queue.states() == {"first": experiments.SUCCESS})
    other = committed.parent / "other"
    other.mkdir()
    with Repo() as repo, repo.config.edit() as config:
        config["remote"]["storage"] = {"url": str(committed.parent / "storage")}
    experiments.begin_with_same_cache(other)
    with Repo(str(other)) as repo:
        assert Path(repo.cache.local_cache_dir) == committed / ".dvc/cache"
        assert Path(repo.cloud.get_remote("storage").path) == committed.parent / "storage"


def wait_for(what):
    until = time.monotonic() + 120
    while not (found := what()):
        assert time.monotonic() < until
        time.sleep(0.5)
    return found


# --- locks -----------------------------------------------------------------------------------


@pytest.fixture
def dead():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def locked(pid, **more):
    return {"pid": pid, "cmd": "dvc repro", **more}


def test_locks_of_the_dead_are_released_and_those_of_the_living_are_not(repository, dead):
    path = Path(".dvc/tmp/rwlock")
    mine = os.getpid()
    path.write_text(
        json.dumps(
            {
                "write": {"/a": locked(dead), "/b": locked(mine)},
                "read": {"/c": [locked(dead)], "/d": [locked(mine), locked(dead)]},
            }
        )
    )
    open_repository().close()
    assert json.loads(path.read_text()) == {
        "write": {"/b": locked(mine)},
        "read": {"/d": [locked(mine)]},
    }
    before = path.stat().st_mtime_ns
    open_repository().close()  # there is nothing to change
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize("content", ["", '{"write": {"/a": {"pid": 1', "[]", '{"read": {"/a": 1}}'])
def test_half_a_lock_file_keeps_dvc_from_running_until_it_is_cleared(repository, content):
    path = Path(".dvc/tmp/rwlock")
    path.write_text(content)
    set_size(5)
    command = [sys.executable, "-m", "dvc", "repro"]
    assert subprocess.run(command, capture_output=True, check=False).returncode  # as DVC does
    open_repository().close()
    assert not path.exists()
    reproduce()
    assert Path("out/a").read_text() == "abcde"


def test_half_a_lock_file_is_left_while_dvc_is_at_work(repository):
    path = Path(".dvc/tmp/rwlock")
    path.write_text("{")
    # Called as DVC is, from the environment's folder of commands.
    other = subprocess.Popen(["sh", "-c", "sleep 60; : /bin/dvc", "/bin/dvc"])
    try:
        with pytest.raises(BobError, match=f"process {other.pid}\\) is at work"):
            open_repository()
    finally:
        other.kill()
        other.wait()
    assert path.exists()


def test_a_repository_without_locks_is_left_alone(repository):
    Path(".dvc/tmp/rwlock").unlink(missing_ok=True)
    with Repo() as repo:
        release_dead(repo)
    assert not Path(".dvc/tmp/rwlock").exists()
