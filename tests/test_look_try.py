"""A photo that is dropped on the page of `bob look`: its classes, and the shots that it is near."""

import os
import threading
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from starlette.testclient import TestClient

from bob.commands.look.review import Review
from bob.commands.look.server import application
from bob.formats import layout
from bob.formats.params import PARAMS, Params
from bob.formats.photos import read_photos
from bob.models.predictor import Classifier
from bob.stages import classify, export
from tests.conftest import ROOT
from tests.tiny_project import CLASSES, classify_params, make_project

HOST = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A project with an exported classifier; tests only read it."""
    root = make_project(tmp_path_factory.mktemp("exported"), train=3)
    values = YAML().load((ROOT / PARAMS).read_text())
    values["audit"]["feature_model"] = "models/tiny"
    with (root / PARAMS).open("w") as file:
        YAML().dump(values, file)
    here = Path.cwd()
    os.chdir(root)
    try:
        classify.run(classify_params(epochs=2, seeds=[0]))
        export.run(Params({"export": {"precisions": ["fp32"]}}, "export"))
    finally:
        os.chdir(here)
    return root


@pytest.fixture
def client(exported, monkeypatch):
    monkeypatch.chdir(exported)
    client = TestClient(application(Review(), "t", 1), base_url=HOST, headers={"Origin": HOST})
    client.cookies.set("bob-look-1", "t")
    return client


def test_a_shot_is_nearest_to_itself_and_its_classes_are_those_of_bob_predict(client):
    photo, *_ = read_photos(layout.TRAIN)
    answer = client.post("/api/try", content=Path(photo.path).read_bytes()).json()
    (prediction,) = Classifier(layout.ONNX).predict([photo.path], top=5)
    assert [(one["class"], one["probability"]) for one in answer["top"]] == list(prediction.top)
    assert {one["class"] for one in answer["top"]} == set(CLASSES)
    first, *others = answer["shots"]
    assert (first["file"], first["class"]) == (photo.path, photo.class_name)
    assert first["similarity"] == pytest.approx(1, abs=1e-5)
    similarities = [one["similarity"] for one in answer["shots"]]
    assert len(others) == 4 and similarities == sorted(similarities, reverse=True)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"<svg/>"])
def test_a_broken_photo_is_told_in_a_line(client, content):
    answer = client.post("/api/try", content=content)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("the photo: ")
    assert "\n" not in answer.json()["error"]


def test_photos_at_once_and_other_requests_meanwhile(client):
    """None waits for the network to be loaded but those that need it."""
    content = {p.path: Path(p.path).read_bytes() for p in read_photos(layout.TRAIN)[:3]}
    nearest = {}

    def ask(path):
        answer = client.post("/api/try", content=content[path]).json()
        nearest[path] = answer["shots"][0]["file"]

    threads = [threading.Thread(target=ask, args=(path,)) for path in content]
    for thread in threads:
        thread.start()
    assert client.get("/api/state").status_code == 200
    for thread in threads:
        thread.join()
    assert nearest == {path: path for path in content}
