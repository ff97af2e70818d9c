"""Verdicts on generated images: the files, several writers, a writer that is killed."""

import multiprocessing
import os
import signal
import subprocess
import time

import pytest

from bob.errors import BobError
from bob.formats import files, review
from bob.formats.review import KEEP, REJECT, Verdict, decide, read_verdicts, rejected
from tests.conftest import ROOT


def recipe(number):
    return f"{number:064x}"


def verdicts(*numbers, verdict=REJECT):
    return {recipe(one): Verdict(recipe(one), verdict, "Wren", "") for one in numbers}


LINE = f'{{"class": "Wren", "file": "", "recipe": "{recipe(1)}", "verdict": "reject"}}\n'


def test_a_file_has_a_line_an_image_and_goes_with_its_last_verdict(tmp_path):
    path = tmp_path / "review/birds.jsonl"
    assert decide(verdicts(3, 1, 2), path) == [path]
    before = path.read_text()
    assert before.splitlines() == sorted(before.splitlines()) and before.startswith(LINE)
    assert decide(verdicts(5), path) == [path]
    assert decide({recipe(5): None}, path) == [path]
    assert path.read_text() == before
    assert decide({recipe(7): None}, path) == []
    assert decide(dict.fromkeys(map(recipe, (1, 2, 3))), path) == [path]
    assert not path.exists() and rejected(path.parent) == frozenset()


def test_a_later_verdict_replaces_an_earlier_one_in_whatever_file(tmp_path):
    mine, hers = tmp_path / "mine.jsonl", tmp_path / "hers.jsonl"
    decide(verdicts(1, 2), hers)
    assert decide(verdicts(1, verdict=KEEP), mine) == [mine, hers]
    assert rejected(tmp_path) == {recipe(2)}
    assert decide({recipe(2): None}, mine) == [hers]
    assert {one.verdict for one in read_verdicts(tmp_path).values()} == {KEEP}


@pytest.mark.parametrize("lines", [(KEEP, REJECT), (REJECT, KEEP)])
def test_of_two_verdicts_that_a_merge_has_left_reject_wins(tmp_path, lines):
    text = "".join(LINE.replace("reject", one) for one in lines)
    (tmp_path / "a.jsonl").write_text(text)
    assert rejected(tmp_path) == {recipe(1)}
    for name, one in zip("bc", lines, strict=True):
        (tmp_path / f"{name}.jsonl").write_text(LINE.replace("reject", one))
    (tmp_path / "a.jsonl").unlink()
    assert rejected(tmp_path) == {recipe(1)}


@pytest.mark.parametrize(
    "line",
    [
        "<<<<<<< HEAD",
        LINE.replace("reject", "maybe"),
        LINE.replace(recipe(1), "abc"),
        LINE.replace(recipe(1), recipe(1).upper().replace("0", "A")),
        LINE.replace('"Wren"', "[]"),
        LINE.replace('"class": "Wren", ', ""),
        LINE.replace("{", '{"note": "blurred", '),
        "[]",
    ],
)
def test_a_bad_line_is_named_with_what_to_do(tmp_path, line):
    path = tmp_path / "birds.jsonl"
    path.write_text(f"{LINE}{line}\n")
    for use in (lambda: read_verdicts(tmp_path), lambda: decide(verdicts(3), path)):
        with pytest.raises(BobError, match=r"birds\.jsonl, line 2: .*; mend ") as caught:
            use()
        assert "\n" not in str(caught.value)
    assert path.read_text() == f"{LINE}{line}\n"


def test_verdicts_that_may_not_be_read_are_not_taken_for_none(tmp_path, bound_by_modes):
    assert rejected(tmp_path / "none") == frozenset()
    (tmp_path / "review").mkdir(mode=0)
    with pytest.raises(PermissionError):
        rejected(tmp_path / "review")


def test_verdicts_of_two_branches_merge_in_git(tmp_path):
    def git(*arguments):
        subprocess.run(
            ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )

    folder = tmp_path / "data/review"
    path = folder / "birds.jsonl"
    decide(verdicts(10, 20), path)
    attributes = (ROOT / "data/review/.gitattributes").read_text()
    (folder / ".gitattributes").write_text(attributes)
    git("init", "--quiet", "--initial-branch=main")
    git("add", "data/review/birds.jsonl", "data/review/.gitattributes")
    git("commit", "--quiet", "--message", "two")
    git("checkout", "--quiet", "-b", "hers")
    decide(verdicts(11, 12) | verdicts(13, verdict=KEEP), path)
    git("commit", "--quiet", "--all", "--message", "hers")
    git("checkout", "--quiet", "main")
    decide(verdicts(11, 13, 14), path)
    git("commit", "--quiet", "--all", "--message", "mine")
    git("merge", "--quiet", "--no-edit", "hers")
    assert rejected(folder) == set(map(recipe, (10, 11, 12, 13, 14, 20)))
    decide({recipe(13): None}, path)
    assert rejected(folder) == set(map(recipe, (10, 11, 12, 14, 20)))


def _decide_many(path, start):
    for number in range(start, start + 40):
        decide(verdicts(number), path)


def test_writers_at_once_lose_no_verdict(tmp_path):
    path = tmp_path / "birds.jsonl"
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=_decide_many, args=(path, 100 * n)) for n in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(read_verdicts(tmp_path)) == 120


def _decide_for_ever(path, said):
    number = 1000
    while True:
        decide(verdicts(number), path)
        said.put(number)
        number += 1


def test_a_writer_that_is_killed_leaves_a_whole_file_with_all_that_was_written(tmp_path):
    path = tmp_path / "birds.jsonl"
    decide(verdicts(*range(1000)), path)  # long enough to be killed in
    fork = multiprocessing.get_context("fork")
    for pause in (0.05, 0.11, 0.17, 0.23):
        said = fork.SimpleQueue()
        writer = fork.Process(target=_decide_for_ever, args=(path, said))
        writer.start()
        first = said.get()
        time.sleep(pause)
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        last = first
        while not said.empty():
            last = said.get()
        assert recipe(last) in read_verdicts(tmp_path)
        decide({recipe(number): None for number in range(1000, last + 2)}, path)
    assert len(read_verdicts(tmp_path)) == 1000
    # What a killed writer had begun goes with the next one.
    assert {one.name for one in tmp_path.iterdir()} == {".lock", path.name}


def test_a_draft_that_cannot_be_written_leaves_the_file(tmp_path, monkeypatch):
    path = tmp_path / "birds.jsonl"
    decide(verdicts(1), path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.json, "dumps", full)
    with pytest.raises(OSError, match="No space"):
        decide(verdicts(2), path)
    assert path.read_text() == LINE
    assert review.rejected(tmp_path) == {recipe(1)}
