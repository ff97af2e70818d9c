"""Every reader of a file that others write gives what it says, or one line that names the file."""

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bob.cache.checkpoints import Checkpoint
from bob.cache.lists import read_items
from bob.cache.shards import read_shard
from bob.commands.study.plan import read_study
from bob.commands.study.results import read_results
from bob.errors import BobError
from bob.formats import params
from bob.formats.files import sha256
from bob.formats.manifest import read_manifest
from bob.formats.photos import read_photos, read_task
from bob.formats.prompts import read_bank, read_contexts
from bob.formats.review import read_verdicts
from bob.models.endpoint import Endpoint
from bob.stages.split import read_dataset
from tests.builders import build_photos
from tests.conftest import ROOT

HASH = "0123456789abcdef" * 4
PHOTO = {"path": "data/a/b.jpg", "class_name": "Wren", "sha256": HASH}
ENTRY = {"image": HASH, "class": "Wren", "background": "blue sky", "pose": "flying"}
IMAGE = {
    **ENTRY,
    "prompt": "a photo of a Wren",
    "seed": 7,
    "file_name": "Wren/0001.png",
    "recipe": HASH,
}
ITEM = {"recipe": HASH, "maker": HASH, "md5": HASH[:32], "text": "blue sky"}
VERDICT = {"class": "Wren", "file": "Wren/0001.png", "recipe": HASH, "verdict": "reject"}


def hashes(files: list[Path]) -> dict[Path, str]:
    return {file: sha256(file) for file in files}


@dataclass(frozen=True)
class Reader:
    """What reads a file, and a content that it reads."""

    file: str
    content: str
    read: Callable[[Path], object]


def lines(*rows: object) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def read_stage(path: Path) -> object:
    return params.for_stage("split").data.shots


READERS = {
    "photos": Reader("train.jsonl", lines(PHOTO), read_photos),
    "task": Reader(
        "classes.json", lines({"descriptor": "bird", "classes": ["Tit", "Wren"]}), read_task
    ),
    "bank": Reader("bank.jsonl", lines(ENTRY, {**ENTRY, "image": HASH[::-1]}), read_bank),
    "contexts": Reader("contexts.jsonl", lines(ENTRY), read_contexts),
    "manifest": Reader("metadata.jsonl", lines(IMAGE), read_manifest),
    "items": Reader("caption.jsonl", lines(ITEM), read_items),
    "verdicts": Reader("review.jsonl", lines(VERDICT), lambda path: read_verdicts(path.parent)),
    "endpoint": Reader(
        "endpoint.json",
        lines({"url": "http://a/v1", "model": "m", "timeout_s": 9}),
        lambda path: Endpoint(path.parent, 1).settings,
    ),
    "dataset": Reader(
        "data/two/dataset.yaml",
        "descriptor: disc\nclasses: {Red_Disc: F/A 18}\n",
        lambda path: read_dataset(path.parent, hashes),
    ),
    "params": Reader("params.yaml", (ROOT / "params.yaml").read_text(), params.load),
    "pipeline": Reader("dvc.yaml", "stages:\n  split:\n    params: [data.shots]\n", read_stage),
    "study": Reader(
        "small.yaml",
        "title: A\nabout: B\nsettings: {one: {seeds: [0], params: {data.shots: 5}}}\nclaims: []\n",
        read_study,
    ),
    "results": Reader(
        "small-study.csv",
        "setting,data_seed,overrides,code,inputs,top1\none,0,data.shots=5,c,i,0.5\n",
        read_results,
    ),
}


@pytest.fixture
def folder(workspace: Path) -> Path:
    for name in ("params.yaml", "dvc.yaml"):
        (workspace / name).write_text((ROOT / name).read_text())
    build_photos(workspace / "data/two", {"Red_Disc": 2, "Blue_Disc": 2}, (8, 8))
    return workspace


JSON = st.recursive(
    st.one_of(
        *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3)),
        st.sampled_from(["../x", "\0", "\ud83d", "/etc/passwd", "x" * 5000, 10**400]),
    ),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=3,
)


@st.composite
def broken(draw: Any, content: str) -> bytes:
    """The content with a value of it or a few bytes changed."""
    rows = content.splitlines()
    if content.startswith("{") and draw(st.booleans()):
        row = json.loads(rows[0])
        key = draw(st.sampled_from(sorted(row)))
        row[key] = draw(JSON)
        return lines(row, *map(json.loads, rows[1:])).encode()
    whole = content.encode()
    start = draw(st.integers(0, len(whole)))
    end = draw(st.integers(start, min(len(whole), start + 20)))
    other = draw(st.binary(max_size=6) | JSON.map(lambda value: json.dumps(value).encode()))
    return whole[:start] + other + whole[end:]


@pytest.mark.parametrize("name", READERS)
@settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_what_is_broken_is_read_or_told_in_one_line(
    folder: Path, name: str, data: st.DataObject
) -> None:
    reader = READERS[name]
    path = folder / reader.file
    path.write_text(reader.content)
    reader.read(path)
    path.write_bytes(data.draw(broken(reader.content)))
    try:
        reader.read(path)
    except BobError as error:
        assert str(error).isprintable()
        assert path.name in str(error) or name == "pipeline"  # it may be params.yaml that lacks it


@pytest.mark.parametrize(
    ("name", "row", "told"),
    [
        ("bank", {**ENTRY, "pose": None}, "line 1: pose is null; allowed: a text"),
        ("bank", {**ENTRY, "background": 5}, "line 1: background is 5; allowed: a text"),
        ("bank", {**ENTRY, "image": " "}, "line 1: image is"),
        ("bank", {**ENTRY, "image": HASH[::-1]}, "line 2: the photo of line 1 again; remove"),
        ("items", {**ITEM, "text": 5}, "line 1: text is 5; allowed: text"),
        ("items", {**ITEM, "file": ["x"]}, "line 1: file is"),
        ("items", {**ITEM, "md5": "../x"}, "line 1: md5 is"),
        ("manifest", {**IMAGE, "file_name": "../0001.png"}, "line 1: file_name is"),
        ("manifest", {**IMAGE, "file_name": "/etc/1.png"}, "line 1: file_name is"),
        ("manifest", {**IMAGE, "file_name": "Wren/one.png"}, "line 1: file_name is"),
        ("manifest", {**IMAGE, "seed": "7"}, "line 1: seed is"),
        ("photos", {**PHOTO, "sha256": None}, "line 1: sha256 is null"),
        ("task", {"descriptor": "bird", "classes": "Wren"}, 'classes is "Wren"; allowed: a list'),
        ("task", [], "the content is []"),
    ],
)
def test_a_value_of_another_kind_is_told_with_its_line(
    folder: Path, name: str, row: object, told: str
) -> None:
    reader = READERS[name]
    path = folder / reader.file
    path.write_text(lines(row) + "".join(reader.content.splitlines(keepends=True)[1:]))
    with pytest.raises(BobError) as caught:
        reader.read(path)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("descriptor: disc\nclasses: {../two/Red_Disc: Red}", "names the folder '../two/Red_Disc'"),
        ("descriptor: disc\nclasses: {.: Red}", "names the folder '.', which is not there"),
        ('descriptor: disc\nclasses: {"Red\\0": Red}', "names the folder 'Red\\x00', which is"),
        (f"descriptor: {'x' * 10_000}", "descriptor is"),
        ("descriptor: 5", "descriptor is 5; allowed: a noun such as bird"),
    ],
)
def test_what_dataset_yaml_cannot_say_is_told(folder: Path, content: str, told: str) -> None:
    (folder / "data/two/dataset.yaml").write_text(content)
    with pytest.raises(BobError) as caught:
        read_dataset(folder / "data/two", hashes)
    assert told in str(caught.value)


def test_a_descriptor_is_one_line_of_words(folder: Path) -> None:
    (folder / "data/two/dataset.yaml").write_text('descriptor: "a\\nb\\t c "')
    assert read_dataset(folder / "data/two", hashes).descriptor == "a b c"


@pytest.mark.parametrize("content", ["", "stages: 5", "stages: {split: 5}", "stages: {other: {}}"])
def test_a_pipeline_without_the_stage_is_told(folder: Path, content: str) -> None:
    (folder / "dvc.yaml").write_text(content)
    with pytest.raises(BobError, match=r"^dvc\.yaml: "):
        read_stage(folder)


def test_a_run_that_stands_twice_in_a_studys_results_is_told(folder: Path) -> None:
    reader = READERS["results"]
    path = folder / reader.file
    path.write_text(reader.content + reader.content.splitlines()[1] + "\n")
    with pytest.raises(BobError, match=r"small-study\.csv, line 3 is no result of a study"):
        read_results(path)


# --- files that are not text ---------------------------------------------------------------------


@settings(max_examples=60, derandomize=True, deadline=None)
@given(data=st.data())
def test_a_shard_that_is_broken_is_told(tmp_path_factory: Any, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "broken.jsonl.gz"
    header = {"bob": 1, "makers": [[HASH, None]], "stages": ["caption"], "families": []}
    content = lines({**header, "trials": []}, [HASH, HASH[:32], 5, 0, 0])
    packed = zlib.compress(data.draw(broken(content)), wbits=31)
    path.write_bytes(packed if data.draw(st.booleans()) else data.draw(broken_bytes(packed)))
    try:
        list(read_shard(path).rows)
    except BobError as error:
        assert str(error).isprintable()


@st.composite
def broken_bytes(draw: Any, content: bytes) -> bytes:
    """The content, cut off or with a byte changed."""
    place = draw(st.integers(0, len(content) - 1))
    return (
        content[:place] + draw(st.binary(max_size=1)) + content[place + draw(st.integers(1, 9)) :]
    )


STATE = {"parameters": [torch.zeros(2, 2)], "losses": [0.5]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("checkpoints")
    Checkpoint(folder, "a").save(STATE)
    assert Checkpoint(folder, "a").load() is not None
    return (folder / "a.pt").read_bytes()


def test_a_checkpoint_that_is_broken_is_none(tmp_path: Path, saved: bytes) -> None:
    """Whichever byte is changed, wherever it ends."""
    checkpoint, path = Checkpoint(tmp_path, "a"), tmp_path / "a.pt"
    for place in range(len(saved)):
        for broken in (
            saved[:place],
            saved[:place] + bytes([saved[place] ^ 1]) + saved[place + 1 :],
        ):
            path.write_bytes(broken)
            assert checkpoint.load() is None, place
    path.write_bytes(saved)
    assert checkpoint.load() is not None


def test_a_checkpoint_of_another_run_is_none(tmp_path: Path, saved: bytes, capsys: Any) -> None:
    (tmp_path / "b.pt").write_bytes(saved)
    assert Checkpoint(tmp_path, "b").load() is None
    assert (
        "cannot be read and the run begins anew (it is of another run)" in capsys.readouterr().err
    )
    torch.save(STATE, tmp_path / "b.pt")  # as an earlier bob wrote it, and without a key
    assert Checkpoint(tmp_path, "b").load() is None
    assert "it is not as it was written" in capsys.readouterr().err
