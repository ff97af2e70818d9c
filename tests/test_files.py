"""Outputs are whole or not there."""

import errno
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bob.errors import BobError
from bob.formats import files
from bob.formats.files import (
    check_room,
    read_json,
    read_jsonl,
    replacing,
    replacing_file,
    write_json,
    write_jsonl,
)


def test_a_folder_takes_the_place_of_the_old_one_at_once(workspace):
    target = workspace / "out"
    for content in ("old", "new"):
        with replacing(target) as folder:
            (folder / content).write_text(content)
            assert folder.parent == target.parent, "a rename must not cross file systems"
        assert [path.name for path in target.iterdir()] == [content]
    assert [path.name for path in workspace.iterdir()] == ["out"]


def test_a_folder_is_readable_by_others_as_any_new_folder_is(workspace):
    (workspace / "plain").mkdir()
    with replacing(workspace / "out"):
        pass
    assert (workspace / "out").stat().st_mode == (workspace / "plain").stat().st_mode


def test_a_failure_leaves_the_old_folder_and_nothing_else(workspace):
    target = workspace / "out"
    with replacing(target) as folder:
        (folder / "old").touch()
    with pytest.raises(RuntimeError), replacing(target) as folder:
        (folder / "half").touch()
        raise RuntimeError
    assert [path.name for path in target.iterdir()] == ["old"]
    assert [path.name for path in workspace.iterdir()] == ["out"]


def test_a_failure_leaves_the_old_file_and_nothing_else(workspace):
    target = workspace / "out.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), replacing_file(target) as draft:
        draft.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert [path.name for path in workspace.iterdir()] == ["out.txt"]


def test_what_was_there_stays_where_the_new_folder_cannot_take_its_place(workspace):
    target = workspace / "out"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(FileNotFoundError), replacing(target) as folder:
        folder.rmdir()
    assert [path.name for path in target.iterdir()] == ["old"]
    assert [path.name for path in workspace.iterdir()] == ["out"]


def dead():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def left_by(process, way, target):
    """The draft that such a process of this machine has left, when it was killed."""
    with suppress(RuntimeError), way(target) as draft:
        raise RuntimeError
    left = draft.with_name(draft.name.replace(f".{os.getpid()}.", f".{process}."))
    assert left != draft
    (left / "part").mkdir(parents=True) if way is replacing else left.touch()
    return left


@pytest.mark.parametrize("way", [replacing, replacing_file])
def test_drafts_of_the_dead_are_swept_and_those_of_the_living_are_not(workspace, way):
    target = workspace / "out.d"
    living, killed = (left_by(process, way, target) for process in (os.getppid(), dead()))
    write_json(target, {})
    assert living.exists() and not killed.exists()


@pytest.mark.parametrize("way", [replacing, replacing_file])
def test_a_draft_from_another_machine_or_container_is_swept_after_a_day(
    workspace, monkeypatch, way
):
    """Whether its process lives cannot be known here: the number is none of this machine's."""
    target, number = workspace / "out", dead()
    with monkeypatch.context() as there:
        there.setattr("platform.node", lambda: "elsewhere")
        files._where.cache_clear()
        draft = left_by(number, way, target)
    files._where.cache_clear()
    earlier = target.with_name(f".out.{number}.tmp")  # of bob before drafts said where
    earlier.touch()
    write_json(target, {})
    assert draft.exists() and earlier.exists()
    two_days_ago = time.time() - 2 * 86400
    os.utime(draft, (two_days_ago,) * 2)
    os.utime(earlier, (two_days_ago,) * 2)
    write_json(target, {})
    assert not earlier.exists()
    assert draft.exists() == (way is replacing)  # into a folder something was written since
    if draft.exists():
        os.utime(draft / "part", (two_days_ago,) * 2)
        write_json(target, {})
        assert not draft.exists()


def test_a_draft_says_where_its_process_is_in_a_word(workspace, monkeypatch):
    names = set()
    for host in ("box", "other.example.org", "é " * 40):
        monkeypatch.setattr("platform.node", lambda host=host: host)
        files._where.cache_clear()
        with replacing_file(workspace / "out") as draft:
            draft.touch()
            names.add(draft.name)
    files._where.cache_clear()
    assert len(names) == 3
    assert all(re.fullmatch(rf"\.out\.{os.getpid()}\.[0-9a-f]{{8}}\.tmp", name) for name in names)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("way", [replacing, replacing_file])
def test_an_error_that_names_no_file_names_the_output(workspace, way):
    with pytest.raises(OSError) as caught, way(workspace / "out"):
        os.write(os.open("/dev/full", os.O_WRONLY), b"x")
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(workspace / "out")


def test_a_disk_without_room_is_told(workspace):
    check_room(workspace, 0)
    with pytest.raises(OSError) as caught:
        check_room(workspace, 2**62)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(workspace))


def test_json_has_one_spelling_and_no_nan(workspace):
    write_json(workspace / "a.json", {"b": 1, "a": "é"})
    write_json(workspace / "b.json", {"a": "é", "b": 1})
    assert (workspace / "a.json").read_bytes() == (workspace / "b.json").read_bytes()
    assert read_json(workspace / "a.json") == {"a": "é", "b": 1}
    with pytest.raises(ValueError):
        write_json(workspace / "c.json", {"a": float("nan")})
    assert not (workspace / "c.json").exists()


def test_json_lines_read_back_and_mistakes_name_file_and_line(workspace):
    path = workspace / "rows.jsonl"
    write_jsonl(path, [{"a": 1}, {"a": 2}])
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}]
    for content, told in (("{}\n[1]\n", "line 2: a JSON object"), ("{}\n{\n", "line 2: not JSON")):
        path.write_text(content)
        with pytest.raises(BobError, match=rf"rows\.jsonl, {told}"):
            read_jsonl(path)
    with pytest.raises(BobError, match=r"absent\.json is missing"):
        read_json(workspace / "absent.json")


def test_lines_end_at_a_line_feed_and_nowhere_else(workspace):
    path = workspace / "rows.jsonl"
    rows = [{"class": f"a{end}b"} for end in "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r\n"]
    write_jsonl(path, rows)
    assert read_jsonl(path) == rows
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_jsonl(path) == rows


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ("9" * 10_000, "10000 digits"),
        ("NaN", "NaN is no finite number"),
        ("-Infinity", "-Infinity is no finite number"),
        ("1e999", "1e999 is no finite number"),
        ('"\\ud83d"', "surrogates not allowed"),
    ],
)
def test_a_value_that_nothing_can_be_done_with_is_one_line(workspace, value, why):
    path = workspace / "rows.jsonl"
    path.write_text(f'{{"a": 1}}\n{{"a": {value}}}\n')
    with pytest.raises(BobError, match=rf"^rows\.jsonl, line 2: not JSON.*{why}"):
        read_jsonl(Path("rows.jsonl"))
    path.write_text(value)
    with pytest.raises(BobError, match=rf"^rows\.jsonl: not JSON.*{why}"):
        read_json(Path("rows.jsonl"))


def test_what_is_no_file_or_may_not_be_read_is_told(workspace):
    with pytest.raises(BobError, match=r"cannot be read \(Is a directory\)"):
        read_json(workspace)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
).map(lambda value: json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"))


@settings(max_examples=300, derandomize=True, deadline=1000)
@given(st.lists(st.binary(max_size=40) | JSON, max_size=4).map(b"\n".join))
def test_whatever_is_in_a_file_is_a_value_or_one_line(content):
    with tempfile.NamedTemporaryFile(suffix="\n.json") as file:
        path = Path(file.name)
        path.write_bytes(content)
        for read in (read_json, read_jsonl):
            try:
                value = read(path)
            except BobError as error:
                assert len(str(error).splitlines()) == 1
            else:
                json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
