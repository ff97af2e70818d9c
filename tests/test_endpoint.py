"""A captioner behind an endpoint: a real HTTP server here, that misbehaves as servers do."""

import base64
import gzip
import io
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bob.errors import BobError
from bob.formats.files import sha256
from bob.formats.layout import BANK, CLASSES, TRAIN
from bob.formats.params import Params
from bob.formats.photos import Photo, Task, write_photos, write_task
from bob.formats.prompts import Context, read_bank
from bob.models.captioner import MAX_NEW_TOKENS, open_captioner
from bob.models.endpoint import UnansweredError
from bob.stages import caption
from tests.builders import build_photos

SECRET = "sk-no-one-may-read-this"


def chat(text):
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}


class Server(ThreadingHTTPServer):
    """Answers what `reply` makes of a question: a status, headers and a body, or None: nothing."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.replies = []  # taken first, in this order
        self.reply: Callable[[Any], Any] = lambda asked: (200, {}, chat("clear sky"))
        self.asked, self.headers, self.times = [], [], []
        self.in_flight, self.most_in_flight = 0, 0
        self.lock = threading.Lock()

    def handle_error(self, request, client_address):
        pass  # of a client that has gone


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.times.append(time.monotonic())
            server.asked.append(asked)
            server.headers.append(self.headers)
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
            reply = server.replies.pop(0) if server.replies else server.reply
        answer = reply(asked) if callable(reply) else reply
        with server.lock:
            server.in_flight -= 1
        if answer is None:
            self.close_connection = True
            return
        if isinstance(answer, list):  # raw pieces, a tenth of a second apart
            self.close_connection = True
            for piece in answer:
                self.wfile.write(piece)
                time.sleep(0.1)
            return
        status, headers, body = answer
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def write_endpoint(**values):
    folder = Path("models/remote")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "endpoint.json").write_text(json.dumps(values))
    return folder


def ask(server, count=1, image_side=768, **more):
    """The answers about `count` images of 80 x 60 pixels, all asked at once."""
    folder = write_endpoint(**{"url": server.url, "model": "org/vlm", **more})
    captioner = open_captioner(folder, precision="auto", batch_size=count, image_side=image_side)
    images = [Image.new("RGB", (80, 60), (60 * i, 0, 0)) for i in range(count)]
    return captioner.answer(images, "What is behind it?")


def told(server, **more):
    with pytest.raises(BobError) as caught:
        ask(server, **more)
    message = str(caught.value)
    assert message.startswith("models/remote/endpoint.json: ") and "\n" not in message
    return message


# --- a question ------------------------------------------------------------------------------


def test_a_question_is_asked_greedily_with_the_shrunk_image(workspace, server):
    assert ask(server, image_side=40) == ["clear sky"]
    (asked,) = server.asked
    image, text = asked["messages"][0]["content"]
    assert (asked["model"], asked["temperature"]) == ("org/vlm", 0)
    assert asked["max_tokens"] == MAX_NEW_TOKENS
    assert isinstance(asked["seed"], int)
    assert text == {"type": "text", "text": "What is behind it?"}
    kind, data = image["image_url"]["url"].split(",")
    assert kind == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (40, 30)


def test_the_key_is_sent_and_stands_in_no_message(workspace, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{SECRET}\n")
    server.replies = [(401, {}, {"error": {"message": f"Incorrect key: {SECRET}"}})]
    message = told(server)
    assert server.headers[0]["Authorization"] == f"Bearer {SECRET}"
    assert "Incorrect key: <OPENAI_API_KEY>" in message
    assert SECRET not in message


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ((200, {}, chat(f"my key is {SECRET}")), "its answer holds the OPENAI_API_KEY"),
        ((400, {}, b"<p>" + SECRET.encode()), "Error code: 400"),
        ((400, {}, {"error": {"message": f"no {SECRET}"}}), "<OPENAI_API_KEY>"),
        ((302, {"Location": f"http://elsewhere/?{SECRET}"}, b""), "?<OPENAI_API_KEY>"),
        ([b"HTTP/1.1 200 " + SECRET.encode() + b"\r\n\r\n\x00"], "it sent no chat completion"),
        ([SECRET.encode()], "no answer from"),
    ],
    ids=["answer", "text", "json", "location", "reason phrase", "no http"],
)
def test_a_key_that_the_server_sends_back_goes_nowhere(project, server, capfd, reply, reason):
    """Neither into the cache nor into an output or a message."""
    server.reply = lambda asked: reply
    write_endpoint(url=server.url, model="org/vlm", retries=0)
    with pytest.raises(BobError) as caught:
        run_stage()
    assert reason in str(caught.value)
    assert SECRET not in str(caught.value) + "".join(capfd.readouterr())
    files = [path for path in project.rglob("*") if path.is_file()]
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_a_key_that_python_shows_otherwise_is_masked_too(workspace, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", r"sk-back\slash")
    server.reply = lambda asked: [rb"sk-back\slash" + b"\r\n\r\n"]
    message = told(server, retries=0)
    assert "<OPENAI_API_KEY>" in message and "back" not in message


def test_a_short_key_is_no_secret(workspace, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sky")
    assert ask(server) == ["clear sky"]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(workspace, server, monkeypatch, status):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    server.reply = lambda asked: (status, {"Location": f"{server.url}/elsewhere"}, b"")
    message = told(server)
    assert f"(it redirects to {server.url}/elsewhere); set url there" in message
    assert len(server.asked) == 1


def test_a_server_without_keys_needs_none(workspace, server):
    assert ask(server) == ["clear sky"]


def test_a_broken_key_is_told_without_saying_it(workspace, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{SECRET}\nsecond line")
    with pytest.raises(BobError, match=r"^OPENAI_API_KEY holds a character") as caught:
        ask(server)
    assert SECRET not in str(caught.value)


# --- servers that fail -----------------------------------------------------------------------


def hang(asked):
    time.sleep(1)


@pytest.mark.parametrize(
    "reply",
    [
        (429, {}, {"error": {"message": "slow down"}}),
        (503, {}, b"<html>overloaded</html>"),
        (200, {}, b'{"choices": [{"mess'),
        (200, {"Content-Type": "text/html"}, b"<html>hello</html>"),
        (200, {}, {"choices": []}),
        (200, {}, {"object": "error"}),
        (200, {}, []),
        (200, {}, chat([{"type": "text"}])),
        (200, {}, chat("half an emoji: \ud83d")),
        None,
    ],
    ids=["429", "503", "half", "html", "empty", "none", "list", "parts", "surrogate", "closed"],
)
def test_what_passes_is_asked_again(workspace, server, reply):
    server.replies = [reply]
    assert ask(server, retries=1) == ["clear sky"]
    assert len(server.asked) == 2


def test_a_server_that_says_nothing_is_asked_again(workspace, server):
    server.replies = [hang]
    assert ask(server, timeout_s=0.5) == ["clear sky"]
    assert len(server.asked) >= 2


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "pieces",
    [[HEAD + b"\r\n", *[b" "] * 40], [HEAD + b"X: ", *[b"x"] * 40]],
    ids=["body", "headers"],
)
def test_an_answer_that_drips_is_given_up(workspace, server, pieces):
    """It never is silent for long enough."""
    server.reply = lambda asked: pieces
    begun = time.monotonic()
    assert "(no whole answer came within 2 s)" in told(server, timeout_s=0.2, retries=0)
    assert time.monotonic() - begun < 3.5


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ((200, {}, chat("sky " * 300_000)), "it sent more than 1,000,000 bytes"),
        ([HEAD + b"\r\n", *[b" " * 400_000] * 5], "it sent more than 1,000,000 bytes"),
        ((500, {}, b"x" * 1_000_001), "it sent more than 1,000,000 bytes"),
        ((200, {"Content-Encoding": "gzip"}, gzip.compress(b" " * 9_999)), "it compressed its"),
        ((200, {}, b"[" * 100_000), "it sent no chat completion"),
    ],
    ids=["long", "without a length", "error", "compressed", "deep"],
)
def test_an_answer_that_would_fill_the_memory_is_given_up(workspace, server, reply, reason):
    server.reply = lambda asked: reply
    assert reason in told(server, retries=0)


def test_it_waits_as_long_as_the_server_says_or_else_longer_each_time(workspace, server):
    """The first time it would by itself wait half a second at most."""
    server.replies = [(429, {"Retry-After": "1"}, b""), (500, {}, b"")]
    assert ask(server) == ["clear sky"]
    first, second = (b - a for a, b in itertools.pairwise(server.times))
    assert first >= 1
    assert second > 0.6


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ((500, {}, {"error": {"message": "no room"}}), "Error code: 500 - no room"),
        ((200, {}, b"[]"), "it sent no chat completion"),
        (None, "Server disconnected without sending a response"),
        (hang, "nothing came within 0.3 s"),
    ],
    ids=["500", "no completion", "closed", "hangs"],
)
def test_what_does_not_pass_is_told_with_what_to_do(workspace, server, reply, reason):
    server.replies = [reply] * 2
    message = told(server, timeout_s=0.3, retries=1)
    assert f"no answer from org/vlm at {server.url} (" in message
    assert reason in message
    assert "gave up after 1 retries; what was answered is kept" in message


def test_an_endpoint_that_is_not_there_is_told(workspace, server):
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    message = told(server, url=url, retries=0)
    assert f"no answer from org/vlm at {url} (" in message
    assert "refused" in message


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (400, "check model there, and whether it takes images"),
        (401, "check the environment variable OPENAI_API_KEY"),
        (403, "check the environment variable OPENAI_API_KEY"),
        (404, "check url and model there"),
    ],
)
def test_a_refusal_is_told_at_once(workspace, server, status, advice):
    server.reply = lambda asked: (status, {}, {"error": {"message": "it is like this"}})
    message = told(server)
    assert "it is like this" in message
    assert message.endswith(advice)
    assert len(server.asked) == 1


def test_of_a_batch_that_fails_the_answers_that_came_are_handed_over(workspace, server):
    server.replies = [(400, {}, b"")]
    with pytest.raises(UnansweredError) as caught:
        ask(server, count=3)
    assert list(caught.value.answers.values()) == ["clear sky"] * 2
    assert set(caught.value.answers) < {0, 1, 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"url": "http://a/v1"', "not JSON"),
        ('{"url": "http://a/v1"}', "model is missing"),
        ('{"url": "a/v1", "model": "m"}', 'url is "a/v1"; allowed: http://host:port/v1'),
        ('{"url": "http://a:b/v1", "model": "m"}', "allowed: http://host:port/v1"),
        ('{"url": "http://a..b/v1", "model": "m"}', "allowed: http://host:port/v1"),
        ('{"url": "http://me:key@a/v1", "model": "m"}', "or the like, without a key"),
        ('{"url": "http://a/v1", "model": ""}', "the name that the endpoint knows the model by"),
        ('{"url": "http://a/v1", "model": "m", "key": "s"}', "key is not a known key; known here:"),
        ('{"url": "http://a/v1", "model": "m", "timeout_s": 0}', "a number above 0"),
        ('{"url": "http://a/v1", "model": "m", "timeout_s": 1e99}', "a number above 0 to 86400"),
        ('{"url": "http://a/v1", "model": "m", "retries": -1}', "a whole number from 0 to 1000"),
        ("[]", "the content is []"),
    ],
)
def test_a_mistake_in_the_file_is_told(workspace, content, message):
    folder = write_endpoint()
    (folder / "endpoint.json").write_text(content)
    with pytest.raises(BobError) as caught:
        open_captioner(folder, precision="auto", batch_size=1, image_side=768)
    assert str(caught.value).startswith(f"{folder / 'endpoint.json'}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# --- the stage -------------------------------------------------------------------------------


@pytest.fixture
def project(repository, server, monkeypatch):
    """Six photos of two classes, to be captioned through the server."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    files = sorted(build_photos(repository / "photos", {"Wren": 3, "Blue Tit": 3}).rglob("*.jpg"))
    photos = [
        Photo(str(path.relative_to(repository)), path.parent.name, sha256(path)) for path in files
    ]
    write_photos(TRAIN, photos)
    write_task(CLASSES, Task("bird", ("Blue Tit", "Wren")))
    write_endpoint(url=server.url, model="org/vlm")
    return repository


def run_stage(batch_size=2, image_side=768):
    settings = {
        "bank": "captioner",
        "model": "models/remote",
        "batch_size": batch_size,
        "precision": "auto",
        "image_side": image_side,
    }
    caption.run(Params({"caption": settings}, "caption"))
    return [entry.context for entry in read_bank(BANK)]


def question(asked):
    return asked["messages"][0]["content"][1]["text"]


def shown(asked):
    return asked["messages"][0]["content"][0]["image_url"]["url"]


def test_as_many_questions_are_under_way_as_the_batch_has(project, server):
    together = threading.Barrier(3, timeout=20)

    def reply(asked):
        together.wait()  # broken, and with it the test, unless three are there
        return 200, {}, chat("perched" if "pose" in question(asked) else "green leaves")

    server.reply = reply
    assert run_stage(batch_size=3) == [Context("green leaves", "perched")] * 6
    assert len(server.asked) == 12
    assert server.most_in_flight == 3


def test_an_answer_that_is_empty_or_names_the_class_is_asked_for_again(project, server):
    def reply(asked):
        if "pose" in question(asked):
            return 200, {}, chat("perched")
        if "three words" in question(asked):
            return 200, {}, chat("a tree")
        return 200, {}, chat(None if "Do not say which" in question(asked) else "A Blue Tit.")

    server.reply = reply
    assert run_stage() == [Context("tree", "perched")] * 6
    assert len(server.asked) == 6 + 3 * 6
    assert not any("Wren" in question(asked) for asked in server.asked)


def test_after_a_failure_only_what_was_not_answered_is_asked(project, server):
    refused: list[str] = []

    def reply(asked):
        with server.lock:
            refused.extend([shown(asked)] if len(server.asked) > 4 and not refused else [])
        return (400, {}, b"") if shown(asked) in refused else (200, {}, chat("clear sky"))

    server.reply = reply
    with pytest.raises(BobError, match="no answer from"):
        run_stage(batch_size=4)
    assert not BANK.exists()
    assert len(server.asked) == 6  # four, and two of which one was refused

    server.asked.clear()
    server.reply = lambda asked: (200, {}, chat("clear sky"))
    assert run_stage(batch_size=4) == [Context("clear sky", "clear sky")] * 6
    assert [shown(asked) for asked in server.asked if "background" in question(asked)] == refused


def test_what_decides_an_answer_is_in_its_key_and_where_it_comes_from_is_not(project, server):
    run_stage()
    server.asked.clear()
    write_endpoint(url=f"{server.url}/elsewhere", model="org/vlm", timeout_s=9, retries=1)
    run_stage(batch_size=3)
    assert server.asked == []
    run_stage(image_side=32)
    assert len(server.asked) == 12
    write_endpoint(url=server.url, model="org/other")
    run_stage()
    assert len(server.asked) == 24


def test_the_key_stands_in_no_file(project, server):
    run_stage()
    assert all(headers["Authorization"] == f"Bearer {SECRET}" for headers in server.headers)
    files = [path for path in project.rglob("*") if path.is_file()]
    assert any(path.suffix == ".sqlite" for path in files)
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
