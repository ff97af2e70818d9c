"""Verdicts and captions in copies of this project: what is made, what it was said to cost."""

import json
import re
from contextlib import contextmanager

import pytest
from ruamel.yaml import YAML
from starlette.testclient import TestClient

from bench.project import batches_made, clear_log
from bob.commands.look.review import Review
from bob.commands.look.server import application
from bob.formats.layout import GENERATED, TRAIN
from bob.formats.manifest import read_manifest
from bob.formats.photos import read_photos
from tests.dvc_project import TINY, dvc, make_project, ran, run, set_params

pytestmark = pytest.mark.slow

SETTINGS = {
    **TINY,
    "generate": {"images_per_class": 6, "steps": 2, "batch_size": 2},
    "audit": {"captioned_per_class": 2},
}
HOST = "http://127.0.0.1:1"
STAGES = ("caption", "finetune", "generate", "classify")


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    folder = make_project(tmp_path_factory.mktemp("review") / "project", SETTINGS, counted=True)
    dvc(folder, "repro", "evaluate")
    run(folder, "git", "add", "--all")
    run(folder, "git", "commit", "--quiet", "--message", "run")
    return folder


@pytest.fixture
def project(reproduced, monkeypatch):
    """The same as the current folder, as it was committed."""
    monkeypatch.chdir(reproduced)
    run(reproduced, "git", "checkout", "--quiet", ".")
    run(reproduced, "git", "clean", "--quiet", "--force", "data", "params.yaml")
    dvc(reproduced, "repro", "evaluate")
    return reproduced


@pytest.fixture
def client(project):
    client = TestClient(application(Review(), "t", 1), base_url=HOST, headers={"Origin": HOST})
    client.cookies.set("bob-look-1", "t")
    return client


def cost(client, **decided):
    answer = client.post("/api/cost", json=decided)
    assert answer.status_code == 200, answer.text
    return answer.json()["lines"]


def save(client, **decided):
    answer = client.post("/api/save", json=decided)
    assert answer.status_code == 200, answer.text
    return answer.json()["files"]


def repro(project, *options):
    """What DVC has run, and how many items of each stage were made."""
    clear_log(project)
    output = dvc(project, "repro", *options, "evaluate")
    return ran(output), {stage: sum(batches_made(project, stage)) for stage in STAGES}, output


def locked(project):
    """The outputs that dvc.lock has, without the lists of who made what."""
    stages = YAML(typ="safe").load((project / "dvc.lock").read_text())["stages"]
    return {
        out["path"]: out["md5"]
        for stage in stages.values()
        for out in stage["outs"]
        if "/items/" not in out["path"]
    }


@contextmanager
def uncounted(project):
    """With the commands that `bob verify` knows."""
    pipeline = project / "dvc.yaml"
    text = pipeline.read_text()
    pipeline.write_text(text.replace("-m bench.counted ", "-m bob "))
    try:
        yield
    finally:
        pipeline.write_text(text)


NOTHING = dict.fromkeys(STAGES, 0)


def test_rejected_images_are_replaced_and_classifiers_trained_and_all_is_as_before_when_taken_back(
    project, client
):
    before, planned = locked(project), read_manifest()
    assert repro(project)[:2] == (set(), NOTHING)
    images = [image for image in planned if image.class_name == planned[0].class_name][:3]
    reject = {image.recipe: "reject" for image in images}
    lines = cost(client, verdicts=reject)
    assert lines == [
        "rejecting 3: 3 new images, less than 1 s on h100",
        "then 1 classifier is trained again, less than 1 s on h100",
        "and the audit asks the captioner about 2 other images",
    ]
    assert repro(project)[:2] == (set(), NOTHING)  # to ask is to change nothing
    assert save(client, verdicts=reject) == ["data/review/miniature.jsonl"]
    why = run(project, "python", "-m", "bob", "why", "generate")
    assert "generate: data/review: miniature.jsonl added" in why
    plan = run(project, "python", "-m", "bob", "plan")
    assert re.search(r"^generate .* 9 reused, 3 new ", plan, re.MULTILINE)

    stages, made, output = repro(project)
    assert stages == {"generate", "classify", "evaluate"}
    assert made == NOTHING | {"generate": 3, "classify": 1}
    assert re.search(r"9 reused, 3 made on \w+; 3 rejected by data/review", output)
    after = read_manifest()
    assert len(after) == len(planned) and not {one.recipe for one in after} & reject.keys()
    changed = {path for path, md5 in locked(project).items() if md5 != before[path]}
    # Few photos: another classifier may name them alike, and so evaluate may say the same.
    assert {"results/generate", "results/classify"} <= changed
    assert not changed & {"results/caption", "results/finetune"}
    assert "all the same" in run(
        project, "python", "-m", "bob", "cache", "check", "--share", "1", "generate"
    )
    with uncounted(project):
        assert "findings: 0" in run(project, "python", "-m", "bob", "verify", "generate")

    state = client.get("/api/state").json()
    assert {one["recipe"] for one in state["rejected"]} == reject.keys()
    assert all(client.get(one["image"]).status_code == 200 for one in state["rejected"])

    back = dict.fromkeys(reject)
    assert cost(client, verdicts=back) == [
        "taking back 3: nothing is made, 3 from the cache",
        "and the audit asks the captioner about 2 other images",
    ]
    save(client, verdicts=back)
    _, made, _ = repro(project, "--no-run-cache")
    assert made == NOTHING and locked(project) == before
    assert run(project, "git", "status", "--porcelain", "data") == ""

    save(client, verdicts=reject)
    assert cost(client, verdicts=back)[0] == "taking back 3: nothing is made, 3 from the cache"
    assert repro(project)[1] == NOTHING  # DVC's run cache


def test_images_to_keep_make_nothing_and_nothing_after_generate_runs(project, client):
    keep = {image.recipe: "keep" for image in read_manifest()}
    assert cost(client, verdicts=keep) == ["keeping 12: nothing is made"]
    save(client, verdicts=keep)
    stages, made, _ = repro(project)
    assert (stages, made) == ({"generate"}, NOTHING)


def test_a_caption_trains_a_lora_and_its_images_and_taken_back_nothing(project, client):
    before, (photo, *_) = locked(project), read_photos(TRAIN)
    shown = json.loads((project / "results/caption/bank.jsonl").read_text().splitlines()[0])
    assert shown["image"] == photo.sha256
    old = {key: shown[key] for key in ("background", "pose")}
    new = {photo.sha256: {"background": "quiet harbour", "pose": "parked"}}
    reject = {read_manifest()[0].recipe: "reject"}
    file = "data/contexts/miniature.jsonl"
    sets = f"params.yaml: caption.bank becomes {file}, with the captions of all shots"
    assert cost(client, captions=new, verdicts=reject) == [
        "1 caption: 1 fine-tuning, 12 new images, less than 1 s on h100",
        sets,
        "rejecting 1: of no effect, as another LoRA will make other images",
        "then 1 classifier is trained again, less than 1 s on h100",
    ]
    assert save(client, captions=new) == [file, "params.yaml"]
    # Saved and not yet run: another caption adds nothing to it.
    other = {photo.sha256: {"background": "quiet harbour", "pose": "climbing"}}
    assert cost(client, captions=other) == ["1 caption: nothing is made"]
    stages, made, _ = repro(project)
    assert made == NOTHING | {"finetune": 2, "generate": 12, "classify": 1}
    assert stages >= {"caption", "finetune", "generate", "classify"}

    assert cost(client, captions={photo.sha256: old})[0] == (
        "1 caption: nothing is made, 12 from the cache"
    )
    save(client, captions={photo.sha256: old})
    assert repro(project)[1] == NOTHING
    assert locked(project) == before


def test_a_caption_that_no_training_reads_makes_the_images_that_draw_it(project, client):
    """The LoRA stays, so what it makes of other prompts is known."""
    set_params(project, {"finetune": {"context": "none"}})
    repro(project)
    photo, *_ = read_photos(TRAIN)
    new = {photo.sha256: {"background": "quiet harbour", "pose": "parked"}}
    first, *_ = cost(client, captions=new)
    save(client, captions=new)
    _, made, _ = repro(project)
    count = sum("quiet harbour" in image.prompt for image in read_manifest(GENERATED))
    assert made["finetune"] == 0 and made["generate"] == count > 0
    assert first == (
        f"1 caption: {count} new image{'s' if count > 1 else ''}, less than 1 s on h100"
    )
