"""Outputs are whole or not there."""

import pytest

from bob.errors import BobError
from bob.formats.files import (
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
