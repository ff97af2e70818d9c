"""`bob fetch` against a real HTTP server that speaks the Hub's protocol, on this machine."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORIES = {
    "org/pipeline": {
        "model_index.json": b"{}",
        "unet/config.json": b"{}",
        "unet/diffusion_pytorch_model.safetensors": b"weights",
        "unet/diffusion_pytorch_model.fp16.safetensors": b"half",
        "unet/diffusion_pytorch_model.bin": b"pickle",
        "v1-5-pruned.safetensors": b"everything again",
        "tokenizer/merges.txt": b"a b",
    },
    "org/plain": {"config.json": b"{}", "model.safetensors": b"weights", "pytorch_model.bin": b"p"},
    "org/clip": {
        "config.json": b'{"model_type": "clip"}',
        "flax_model.msgpack": b"weights again",
        "merges.txt": b"a b",
        "model.safetensors": b"weights",
        "preprocessor_config.json": b"{}",
        "pytorch_model.bin": b"pickle",
        "special_tokens_map.json": b"{}",
        "tf_model.h5": b"weights again",
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b"{}",
        "vocab.json": b"{}",
    },
    "org/pickled": {"config.json": b"{}", "pytorch_model.bin": b"pickle"},
}


class Hub(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(with_body=True)

    def do_HEAD(self):
        self.answer(with_body=False)

    def answer(self, with_body):
        path = self.path.split("?")[0].strip("/")
        headers = {}
        for name, files in REPOSITORIES.items():
            if path == f"api/models/{name}/tree/{COMMIT}":
                body = json.dumps(
                    [
                        {"type": "file", "path": file, "size": len(content), "oid": "0" * 40}
                        for file, content in files.items()
                    ]
                ).encode()
                break
            if path in (f"api/models/{name}/revision/{COMMIT}", f"api/models/{name}"):
                siblings = [{"rfilename": file} for file in files]
                body = json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode()
                break
            if path.startswith(f"{name}/resolve/{COMMIT}/"):
                file = path.split(f"{COMMIT}/")[1]
                if file in files:
                    body = files[file]
                    headers = {
                        "ETag": f'"{hashlib.sha1(body).hexdigest()}"',
                        "X-Repo-Commit": COMMIT,
                    }
                    break
        else:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def project(workspace):
    for command in (["git", "init", "--quiet"], [sys.executable, "-m", "dvc", "init", "--quiet"]):
        subprocess.run(command, check=True, cwd=workspace)
    (workspace / "models").mkdir()
    return workspace


# `bob fetch`, which does not wait before it asks again.
AT_ONCE = "import time; time.sleep = lambda _: None; from bob.__main__ import main; main()"


def fetch(hub, *arguments, start=("-m", "bob")):
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    return subprocess.run(
        [sys.executable, *start, "fetch", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"HF_ENDPOINT": hub, "HF_HUB_DISABLE_XET": "1", "HF_HOME": "hub-home"},
    )


def listing(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_pipeline_comes_without_pickles_and_second_copies_and_is_tracked(hub, project):
    result = fetch(hub, f"org/pipeline@{COMMIT}", "models/sd")
    assert result.returncode == 0, result.stderr
    assert listing(Path("models/sd")) == {
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "tokenizer/merges.txt",
    }
    assert (project / "models/sd/tokenizer/merges.txt").read_bytes() == b"a b"
    assert (project / "models/sd.dvc").is_file()
    assert "/sd" in (project / "models/.gitignore").read_text()


def test_a_single_model_keeps_its_weights_at_the_top(hub, project):
    assert fetch(hub, f"org/plain@{COMMIT}", "models/plain").returncode == 0
    assert listing(Path("models/plain")) == {"config.json", "model.safetensors"}


def test_a_clip_comes_with_its_tokenizer_and_preprocessing_and_once(hub, project):
    assert fetch(hub, f"org/clip@{COMMIT}", "models/clip").returncode == 0
    assert listing(Path("models/clip")) == {
        *("config.json", "model.safetensors", "preprocessor_config.json"),
        *("merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"),
        "vocab.json",
    }


@pytest.mark.parametrize(
    ("model", "folder", "told"),
    [
        ("org/plain@main", "models/x", "is not ID@COMMIT with a full 40-digit commit"),
        ("org/plain", "models/x", "is not ID@COMMIT"),
        (f"org/plain@{COMMIT}", "elsewhere/x", "models live in models/<name>"),
        (f"org/plain@{COMMIT}", "models/taken", "models/taken exists"),
        (f"org/pickled@{COMMIT}", "models/x", "has no safetensors weights"),
        (f"org/absent@{COMMIT}", "models/x", "could not be fetched"),
    ],
)
def test_mistakes_are_told_in_one_line_and_leave_nothing(hub, project, model, folder, told):
    (project / "models/taken").mkdir()
    result = fetch(hub, model, folder)
    assert result.returncode == 1
    assert told in result.stderr
    assert result.stderr.count("\n") == 1
    assert listing(project / "models") == set()


def test_an_unreachable_hub_is_told_in_one_line(project):
    ask = f"org/plain@{COMMIT}", "models/x"
    result = fetch("http://127.0.0.1:9", *ask, start=("-c", AT_ONCE))
    assert result.returncode == 1
    assert "could not be fetched" in result.stderr
    assert result.stderr.count("\n") == 1
