"""`bob look`: who may ask, what is served, what is written, and what a kill leaves."""

import hashlib
import http.client
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import closing, suppress
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError

import pytest
from click.testing import CliRunner
from PIL import Image
from starlette.testclient import TestClient

from bob.cache.items import ItemCache
from bob.cache.recipe import Maker
from bob.cache.wanted import Wanted
from bob.cli import cli
from bob.commands.look import server
from bob.commands.look.review import Review
from bob.commands.look.server import application
from bob.formats.layout import BANK, CLASSES, GENERATE, GENERATED, REVIEW, SPLIT, TRAIN
from bob.formats.manifest import Generated, write_manifest
from bob.formats.params import PARAMS, load
from bob.formats.photos import Photo, Task, write_photos, write_task
from bob.formats.prompts import Context, Entry, read_bank, write_bank
from bob.formats.review import read_verdicts, rejected
from tests.conftest import ROOT
from tests.dvc_project import environment, real_python

PORT, TOKEN = 8765, "the-token"
HOST = f"http://127.0.0.1:{PORT}"
INDEX = Path("results/report/index.html")
VERDICTS, CAPTIONS = REVIEW / "miniature.jsonl", Path("data/contexts/miniature.jsonl")


def png(number):
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 99, 200)).save(content, "png")
    return content.getvalue()


def recipe(number):
    return f"{number:064x}"


def generate(numbers):
    """A generated set as the stage leaves it, which DVC removes before it makes the next."""
    shutil.rmtree(GENERATE, ignore_errors=True)
    images = []
    for number in numbers:
        file = f"images/747-400/{number:04d}.png"
        image = Generated("747-400", None, "", number, file, recipe(number))
        (GENERATE / image.file).parent.mkdir(parents=True, exist_ok=True)
        (GENERATE / image.file).write_bytes(png(number))
        images.append(image)
    write_manifest(GENERATED, images)


@pytest.fixture
def project(repository):
    """What the page is about: six images, two shots with captions."""
    shutil.copyfile(ROOT / PARAMS, PARAMS)
    INDEX.parent.mkdir(parents=True)
    INDEX.write_text("<!doctype html>")
    generate(range(6))
    with ItemCache("generate") as cache:
        wanted = Wanted([recipe(number) for number in range(6)], {}, Maker({}, {}))
        cache.keep(wanted, {recipe(number): png(number) for number in range(6)})
    write_task(CLASSES, Task("aircraft", ("747-400", "A320")))
    photos = []
    for name in ("one", "two"):
        path = SPLIT / f"train/A320/{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(len(name)) + name.encode())
        photos.append(Photo(str(path), "A320", hashlib.sha256(path.read_bytes()).hexdigest()))
    write_photos(TRAIN, photos)
    sky = Context("clear sky", "climbing")
    write_bank(BANK, [Entry(photo.sha256, "A320", sky) for photo in photos])
    return repository


@pytest.fixture
def client(project):
    """A browser that has opened the URL."""
    return browser()


def browser():
    client = TestClient(
        application(Review(), TOKEN, PORT),
        base_url=HOST,
        headers={"Origin": HOST},
        raise_server_exceptions=False,
    )
    assert client.get(f"/?token={TOKEN}").text == "<!doctype html>"
    return client


def shots():
    return [entry.image for entry in read_bank(BANK)]


def save(client, verdicts=None, captions=None):
    body = {"verdicts": verdicts or {}, "captions": captions or {}}
    return client.post("/api/save", json=body)


def refused(answer, status):
    """The one line of an error."""
    assert answer.status_code == status, answer.text
    (line,) = answer.json().values()
    assert line and "\n" not in line
    return line


# --- who may ask ---------------------------------------------------------------------------------


def test_the_token_becomes_a_cookie_that_no_script_reads_and_leaves_the_address(project):
    client = TestClient(application(Review(), TOKEN, PORT), base_url=HOST, follow_redirects=False)
    answer = client.get(f"/?token={TOKEN}")
    assert answer.headers["location"] == "/results/report/index.html"
    cookie = answer.headers["set-cookie"].lower()
    assert cookie.startswith(f"bob-look-{PORT}={TOKEN}")
    assert "httponly" in cookie and "samesite=strict" in cookie
    assert client.get("/api/state").status_code == 200
    assert client.get("/").headers["location"] == "/results/report/index.html"


PATHS = ["/", "/results/report/index.html", "/api/state", f"/api/image/{recipe(0)}", "/nothing"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("query", ["", "?token=", "?token=the-toke", "?token=%C3%BC"])
def test_without_the_token_nothing_is_told(project, path, query):
    client = TestClient(application(Review(), TOKEN, PORT), base_url=HOST)
    assert "no valid token" in refused(client.get(path + query), 403)
    client.cookies.set(f"bob-look-{PORT + 1}", TOKEN)
    client.cookies.set(f"bob-look-{PORT}", "another")
    assert "no valid token" in refused(client.get(path + query), 403)
    assert client.get(f"/api/state?token={TOKEN}").status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", f"evil.example:{PORT}", "127.0.0.1", "127.0.0.1:1", "", "localhost"]
)
def test_another_host_is_refused_though_it_has_the_token(client, host):
    """A name that an attacker lets point to 127.0.0.1."""
    answer = client.get(f"/api/state?token={TOKEN}", headers={"Host": host})
    assert "Host is another" in refused(answer, 403)


def test_localhost_is_this_machine_too(client):
    headers = {"Host": f"localhost:{PORT}"}
    assert client.get(f"/api/state?token={TOKEN}", headers=headers).status_code == 200


@pytest.mark.parametrize("call", ["cost", "save", "try"])
@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": f"https://127.0.0.1:{PORT}"},
        {"Origin": f"http://127.0.0.1:{PORT + 1}"},
        {"Origin": HOST, "Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {},
    ],
)
def test_what_another_site_posts_is_refused(client, call, headers):
    del client.headers["Origin"]
    body = json.dumps({"verdicts": {recipe(0): "reject"}})
    answer = client.post(f"/api/{call}", content=body, headers=headers)
    assert "another site" in refused(answer, 403)
    assert not VERDICTS.exists()


def test_no_page_may_frame_it_or_guess_what_a_file_is(client):
    headers = client.get("/results/report/index.html").headers
    assert headers["x-content-type-options"] == "nosniff"
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["referrer-policy"] == "no-referrer"


# --- what is served ------------------------------------------------------------------------------


def test_the_reports_files_and_the_images_are_served(client):
    (INDEX.parent / "page.js").write_text("1")
    for path, media_type, content in (
        (INDEX, "text/html", b"<!doctype html>"),
        (INDEX.parent / "page.js", "text/javascript", b"1"),
        (GENERATE / "images/747-400/0002.png", "image/png", png(2)),
    ):
        answer = client.get(f"/{path.as_posix()}")
        assert answer.content == content
        assert answer.headers["content-type"].startswith(media_type)


@pytest.mark.parametrize(
    "path",
    [
        "params.yaml",
        "results/generate/metadata.jsonl",
        "results/generate/",
        "results/generate",
        "results/split/train.jsonl",
        "results/report/",
        "results/report/notes.txt",
        "results/report/../../params.yaml",
        "results/report/%2e%2e/%2e%2e/params.yaml",
        "results/report/..%2f..%2fsecret.png",
        "results/report/%2fetc%2fpasswd",
        "results/report//etc/passwd",
        "%2fetc/passwd",
        "//etc/passwd",
        "results/report/link.png",
        "results/report/folder/secret.png",
        "results/report/index.html%00.png",
        "results/reports/a.png",
        "results/report/" + 300 * "a" + ".png",
        "results\\report\\..\\..\\secret.png",
    ],
)
def test_nothing_else_is(client, path):
    Path("secret.png").write_bytes(png(0))
    (INDEX.parent / "link.png").symlink_to(Path("secret.png").resolve())
    (INDEX.parent / "folder").symlink_to(Path.cwd())
    (INDEX.parent / "notes.txt").write_text("")
    refused(client.get(f"/{path}"), 404)


def test_a_link_into_dvcs_cache_is_served_as_cache_type_symlink_makes_it(client):
    with ItemCache() as cache:
        (row, *_) = cache.index.find([recipe(3)])
    image = GENERATE / "images/747-400/0003.png"
    image.unlink()
    image.symlink_to(Path(".dvc/cache/files/md5", row.oid[:2], row.oid[2:]).resolve())
    assert client.get(f"/{image.as_posix()}").content == png(3)


@pytest.mark.parametrize("method", ["PUT", "DELETE", "POST", "PATCH"])
def test_files_are_only_read(client, method):
    refused(client.request(method, f"/{INDEX.as_posix()}"), 405)


# --- verdicts ------------------------------------------------------------------------------------


def test_a_verdict_is_a_line_of_a_file_and_is_taken_back(client):
    answer = save(client, {recipe(1): "reject", recipe(2): "keep"}).json()
    assert answer["files"] == [VERDICTS.as_posix()]
    assert [json.loads(line) for line in VERDICTS.read_text().splitlines()] == [
        {
            "class": "747-400",
            "file": f"images/747-400/000{number}.png",
            "recipe": recipe(number),
            "verdict": verdict,
        }
        for number, verdict in ((1, "reject"), (2, "keep"))
    ]
    assert answer["state"] == client.get("/api/state").json()
    assert answer["state"]["verdicts"] == {recipe(1): "reject", recipe(2): "keep"}
    assert answer["state"]["file"] == VERDICTS.as_posix()
    assert answer["state"]["rejected"] == []  # still in the set
    assert save(client, {recipe(1): None, recipe(2): None}).json()["state"]["verdicts"] == {}
    assert not VERDICTS.exists()


def test_a_rejected_image_that_is_gone_is_shown_from_the_cache_and_taken_back(client):
    save(client, {recipe(0): "reject"})
    generate(range(1, 7))
    (gone,) = client.get("/api/state").json()["rejected"]
    assert gone == {
        "recipe": recipe(0),
        "class": "747-400",
        "file": "images/747-400/0000.png",
        "image": f"/api/image/{recipe(0)}",
    }
    assert client.get(gone["image"]).content == png(0)
    shutil.rmtree(".dvc/cache/files")
    assert client.get("/api/state").json()["rejected"][0]["image"] is None
    refused(client.get(gone["image"]), 404)
    assert browser().post("/api/save", json={"verdicts": {recipe(0): None}}).status_code == 200
    assert rejected() == frozenset()


def test_the_other_items_of_the_cache_are_not_shown(client):
    with ItemCache("classify") as cache:
        cache.keep(Wanted([recipe(77)], {}, Maker({}, {})), {recipe(77): b"weights"})
    refused(client.get(f"/api/image/{recipe(77)}"), 404)


def test_an_image_of_the_set_before_a_run_can_still_be_rejected(client):
    """The page is open, and `dvc repro` makes another set."""
    client.get("/api/state")
    shutil.rmtree(GENERATE)
    assert client.get("/api/state").status_code == 200
    refused(client.get(f"/{GENERATE}/images/747-400/0001.png"), 404)
    assert save(client, {recipe(1): "reject"}).status_code == 200
    generate(range(3, 9))
    assert save(client, {recipe(2): "reject", recipe(8): "reject"}).status_code == 200
    assert rejected() == {recipe(1), recipe(2), recipe(8)}


def test_the_version_is_another_when_the_report_is_made_anew(client):
    def version():
        return client.get("/api/state").json()["version"]

    before = version()
    assert version() == before
    shutil.rmtree(INDEX.parent)
    assert version() != before
    refused(client.get(f"/{INDEX.as_posix()}"), 404)
    INDEX.parent.mkdir()
    INDEX.write_text("<!doctype html>")
    assert version() not in (before, "None")


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        "[]",
        "null",
        '{"verdicts": []}',
        '{"verdicts": {"a": "maybe"}}',
        '{"verdicts": {"a": ["reject"]}}',
        '{"verdicts": {"a": "reject"}}',
        '{"verdicts": {"../../../etc/passwd": "reject"}}',
        '{"verdicts": {"' + recipe(99) + '": null}}',
        '{"more": {}}',
        '{"captions": {"a": {}}}',
        '{"captions": {"a": {"background": 1, "pose": "x"}}}',
        '{"captions": {"a": {"background": "x", "pose": "x", "class": "x"}}}',
        b"\xff\xfe",
    ],
)
@pytest.mark.parametrize("call", ["cost", "save"])
def test_a_body_of_another_shape_is_refused_in_a_line_and_nothing_is_written(client, body, call):
    refused(client.post(f"/api/{call}", content=body), 400)
    assert not VERDICTS.exists() and not CAPTIONS.exists()
    assert load()["caption"]["bank"] == "captioner"


def test_nothing_of_a_request_is_written_where_a_part_of_it_is_refused(client):
    good, context = shots()[0], {"background": "fog", "pose": "left"}
    refused(save(client, {recipe(99): "reject"}, {good: context}), 400)
    refused(save(client, {recipe(1): "reject"}, {good: context, "unknown": context}), 400)
    assert not VERDICTS.exists() and not CAPTIONS.exists()


def test_a_body_may_only_be_so_long(client, monkeypatch):
    monkeypatch.setattr(server, "DECISIONS", 1000)
    assert "MiB" in refused(client.post("/api/save", content=b" " * 1001), 413)


def test_a_bad_line_in_a_file_is_told_and_the_server_goes_on(client):
    VERDICTS.parent.mkdir(parents=True)
    VERDICTS.write_text("<<<<<<< HEAD\n")
    assert "miniature.jsonl, line 1" in refused(client.get("/api/state"), 400)
    assert "mend" in refused(save(client, {recipe(1): "reject"}), 400)
    assert VERDICTS.read_text() == "<<<<<<< HEAD\n"
    VERDICTS.unlink()
    assert client.get("/api/state").status_code == 200


def test_what_fails_unforeseen_is_one_line_too(client, monkeypatch, capsys):
    monkeypatch.setattr(Review, "state", lambda self: 1 / 0)
    answer = client.get("/api/state")
    assert "ZeroDivisionError" in refused(answer, 500)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "GET /api/state: ZeroDivisionError" in err


def test_several_who_save_at_once_lose_no_verdict(client):
    generate(range(100))
    clients = [browser() for _ in range(4)]

    def decide(client, first):
        for number in range(first, 100, 4):
            assert save(client, {recipe(number): "reject"}).status_code == 200

    threads = [threading.Thread(target=decide, args=(one, n)) for n, one in enumerate(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rejected() == set(map(recipe, range(100)))


# --- captions ------------------------------------------------------------------------------------


def test_an_edited_caption_makes_a_bank_and_sets_it_and_keeps_all_else_of_the_params(client):
    before = PARAMS.read_text()
    one, two = shots()
    text = {"background": "The background is a Runway.", "pose": "taking off"}
    answer = save(client, captions={one: text}).json()
    assert answer["files"] == [CAPTIONS.as_posix(), "params.yaml"]
    assert [(entry.image, entry.context) for entry in read_bank(CAPTIONS)] == [
        (one, Context("runway", "taking off")),
        (two, Context("clear sky", "climbing")),
    ]
    assert PARAMS.read_text() == before.replace("bank: captioner #", f"bank: {CAPTIONS} #")
    assert answer["state"]["captions"] == {
        "file": CAPTIONS.as_posix(),
        "edits": {one: {"background": "runway", "pose": "taking off"}},
    }
    again = save(client, captions={two: text}).json()
    assert again["files"] == [CAPTIONS.as_posix()]
    assert set(again["state"]["captions"]["edits"]) == {one, two}
    # `dvc repro caption` takes them over.
    shutil.copyfile(CAPTIONS, BANK)
    assert client.get("/api/state").json()["captions"]["edits"] == {}


def test_lines_of_other_photos_stay_and_the_file_that_is_set_is_the_one_that_is_edited(client):
    path = Path("data/contexts/mine.jsonl")
    path.parent.mkdir(parents=True)
    other = Entry("f" * 64, "A320", Context("hangar", "parked"))
    write_bank(path, [other, *read_bank(BANK)])
    PARAMS.write_text(PARAMS.read_text().replace("bank: captioner", f'bank: "{path}"'))
    text = {"background": "fog", "pose": "left"}
    answer = save(client, captions={shots()[1]: text}).json()
    assert answer["files"] == [path.as_posix()]
    first, _, last = read_bank(path)
    assert first == other and last.context == Context("fog", "left")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ({"background": " ", "pose": "left"}, "background is empty"),
        ({"background": "sky", "pose": "pose: ."}, "pose is empty"),
        ({"background": "sky", "pose": "an A320 that climbs"}, "names a class"),
        ({"background": "a " * 20 + "sky", "pose": "left"}, "more than 12 words"),
        ({"background": "sky \u0007", "pose": "left"}, "no text"),
        ({"background": "sky", "pose": "\ud800"}, "no text"),
    ],
)
def test_a_caption_that_a_captioner_may_not_give_is_refused(client, text, told):
    answer = client.post("/api/save", content=json.dumps({"captions": {shots()[0]: text}}))
    assert told in refused(answer, 400)
    assert not CAPTIONS.exists()


def test_a_file_of_contexts_that_is_no_bank_is_let_be(client):
    CAPTIONS.parent.mkdir(parents=True)
    CAPTIONS.write_text('{"background": "fog", "pose": "left"}\n')
    assert client.get("/api/state").json()["captions"]["edits"] == {}
    text = {"background": "fog", "pose": "left"}
    assert "set caption.bank" in refused(save(client, captions={shots()[0]: text}), 400)
    assert CAPTIONS.read_text() == '{"background": "fog", "pose": "left"}\n'


def test_two_who_edit_at_once_lose_no_caption(client):
    texts = [{"background": f"place {n}", "pose": "left"} for n in range(10)]

    def edit(photo, client):
        for text in texts:
            assert save(client, captions={photo: text}).status_code == 200

    threads = [threading.Thread(target=edit, args=(photo, browser())) for photo in shots()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {entry.context for entry in read_bank(CAPTIONS)} == {Context("place 9", "left")}
    assert load()["caption"]["bank"] == CAPTIONS.as_posix()


# --- a photo -------------------------------------------------------------------------------------


def test_a_photo_needs_an_exported_classifier(client):
    assert "dvc repro export" in refused(client.post("/api/try", content=png(1)), 400)


def test_a_photo_may_only_be_so_large(client, monkeypatch):
    monkeypatch.setattr(server, "PHOTO", 1000)
    refused(client.post("/api/try", content=b" " * 1001), 413)


# --- the command ---------------------------------------------------------------------------------


def command(*arguments):
    result = CliRunner().invoke(cli, ["look", "--no-browser", *arguments])
    assert result.exit_code == 1
    return result.output


def test_without_a_report_it_says_how_to_make_one(project):
    INDEX.unlink()
    assert command() == "Error: results/report/index.html is missing; `dvc repro report` makes it\n"


class Served:
    """A real `bob look` in the current folder."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bob", "look", "--no-browser"],
            env=environment(Path.cwd(), real_python()) | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.fullmatch(r"bob look: (http://127\.0\.0\.1:(\d+))/\?token=(\S+) .*\n", line)
        assert found, line + str(self.process.communicate())
        self.url, self.port, self.token = found[1], int(found[2]), found[3]

    def ask(self, path, body=None):
        request = urllib.request.Request(
            f"{self.url}{path}?token={self.token}",
            None if body is None else json.dumps(body).encode(),
            {"Origin": self.url},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def end(self, number):
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out + err


def test_a_server_that_is_killed_right_after_it_has_saved_has_saved(project):
    served = Served()
    assert served.ask("/api/save", {"verdicts": {recipe(1): "reject"}})["files"]
    served.end(signal.SIGKILL)
    assert rejected() == {recipe(1)}
    again = Served()
    assert again.ask("/api/state")["verdicts"] == {recipe(1): "reject"}

    # Killed at any moment: what was answered is there, and the file is whole.
    answered = []

    def until_killed():
        with suppress(OSError, HTTPException):
            for number in (0, 2, 3, 4, 5):
                again.ask("/api/save", {"verdicts": {recipe(number): "reject"}})
                answered.append(recipe(number))

    thread = threading.Thread(target=until_killed)
    thread.start()
    while not answered:
        time.sleep(0.001)
    again.end(signal.SIGKILL)
    thread.join()
    assert set(answered) <= set(read_verdicts())


def test_a_path_that_leaves_the_folder_is_not_found(project):
    """As it is sent: clients that tests are written with take the dots out."""
    served = Served()
    for path in ("/results/report/../../params.yaml", "/../params.yaml", "//params.yaml"):
        with closing(http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)) as client:
            client.request("GET", f"{path}?token={served.token}")
            answer = client.getresponse()
            assert answer.status == 404 and "no such file" in json.load(answer)["error"]
    assert served.end(signal.SIGTERM)[1] == ""


def test_an_interrupt_ends_it_quietly_and_a_port_that_is_taken_is_told(project):
    served = Served()
    with pytest.raises(HTTPError) as caught:
        urllib.request.urlopen(f"{served.url}/api/state", timeout=60)
    assert caught.value.code == 403
    told = command("--port", str(served.port))
    assert told.startswith(f"Error: port {served.port} of 127.0.0.1: ") and told.count("\n") == 1
    assert served.end(signal.SIGINT) == (0, "")
