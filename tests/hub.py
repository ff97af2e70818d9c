"""A Hugging Face Hub on this machine: a real HTTP server that speaks the Hub's protocol."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


def commit_of(files: Files) -> str:
    """A made-up commit that is another for other files."""
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


def is_lfs(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".ckpt", ".msgpack", ".onnx"))


@dataclass
class Repository:
    """What the server has of a model."""

    refs: dict[str, Files]
    """Branches and tags by name, pull requests by `refs/pr/N`."""
    needs: str = ""
    """The error code of who has no right token: GatedRepo, RepoNotFound, or that token's fault."""

    def files(self, revision: str) -> Files | None:
        by_commit = {commit_of(files): files for files in self.refs.values()}
        return self.refs.get(revision) or by_commit.get(revision)


@dataclass
class Hub:
    """The server's state, which a test may change at any time."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    """The files whose content was asked for."""
    broken: set[str] = field(default_factory=set)
    """Files of which half arrives and then nothing."""
    damaged: set[str] = field(default_factory=set)
    waiting: set[str] = field(default_factory=set)
    """Files of which half arrives, and the rest never."""
    limited: bool = False
    url: str = ""

    def add(self, name: str, files: Files, **refs: Files) -> str:
        """Put up a model, of which `files` are main; its commit."""
        self.repositories[name] = Repository({"main": files, **refs})
        return commit_of(files)


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self):
        self.answer(with_body=True)

    def do_HEAD(self):
        self.answer(with_body=False)

    def answer(self, with_body):
        path = unquote(urlsplit(self.path).path).strip("/")
        if self.hub.limited:
            limit = {"RateLimit": '"api";r=0;t=55', "RateLimit-Policy": '"fixed";"api";q=500;w=300'}
            return self.send(429, limit)
        calls = f"{path.removeprefix('api/models/')}/"
        name = next((one for one in self.hub.repositories if calls.startswith(f"{one}/")), None)
        if name is None:
            return self.send(404, {"X-Error-Code": "RepoNotFound"})
        repository = self.hub.repositories[name]
        closed = repository.needs != "GatedRepo" or not path.startswith(
            "api/"
        )  # its list is public
        if closed and repository.needs and self.headers.get("Authorization") != "Bearer hf_mine":
            status = 403 if repository.needs == "GatedRepo" else 401
            kind = "Code" if repository.needs in ("GatedRepo", "RepoNotFound") else "Message"
            return self.send(status, {f"X-Error-{kind}": repository.needs})
        if path.startswith(f"{name}/resolve/"):
            commit, _, file = path.removeprefix(f"{name}/resolve/").partition("/")
            return self.content(repository.files(commit) or {}, commit, file, with_body)
        return self.api(repository, name, path.removeprefix(f"api/models/{name}").strip("/"))

    def api(self, repository, name, call):
        if call == "refs":
            found = [
                {"name": ref.rpartition("/")[2], "ref": ref, "targetCommit": commit_of(files)}
                for ref, files in repository.refs.items()
            ]
            pulls = [ref for ref in found if ref["ref"].startswith("refs/pr/")]
            branches = [ref for ref in found if ref not in pulls]
            return self.send_json(
                {"branches": branches, "converts": [], "tags": [], "pullRequests": pulls}
            )
        if call == "commits/main":
            one = {"title": "", "message": "", "date": "2026-01-01T00:00:00.000Z", "authors": []}
            return self.send_json([{"id": commit_of(repository.refs["main"]), **one}])
        kind, _, revision = call.partition("/")
        files = repository.files(revision or "main")
        if files is None:
            return self.send(404, {"X-Error-Code": "RevisionNotFound"})
        if kind == "tree":
            return self.send_json(
                [{"type": "file", "path": file, **self.about(file, files)} for file in files]
            )
        siblings = [
            {"rfilename": file, "blobId": about.pop("oid"), **about}
            for file in files
            for about in [self.about(file, files)]
        ]
        return self.send_json({"id": name, "sha": commit_of(files), "siblings": siblings})

    def about(self, file, files):
        content = files[file]
        size = len(content)
        blob = hashlib.sha1(b"blob %d\0" % size + content).hexdigest()
        lfs = {"size": size, "pointerSize": 1, "sha256": hashlib.sha256(content).hexdigest()}
        lfs["oid"] = lfs["sha256"]
        return {"size": size, "oid": blob, **({"lfs": lfs} if is_lfs(file) else {})}

    def content(self, files, commit, file, with_body):
        if file not in files:
            return self.send(404, {"X-Error-Code": "EntryNotFound"})
        about, body = self.about(file, files), files[file]
        etag = about["lfs"]["sha256"] if "lfs" in about else about["oid"]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit}
        if not with_body:
            return self.send(200, headers, body, with_body=False)
        self.hub.asked.append(file)
        if file in self.hub.damaged:
            body = body[::-1]
        if file in self.hub.broken | self.hub.waiting:
            self.send(200, headers, body, sent=len(body) // 2)
            if file in self.hub.waiting:
                threading.Event().wait(60)
            self.close_connection = True
            return None
        return self.send(200, headers, body)

    def send_json(self, value):
        self.send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def send(self, status, headers, body=b"", sent=None, with_body=True):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body and self.command == "GET":
            self.wfile.write(body[:sent])
            self.wfile.flush()

    def log_message(self, *_):
        pass


@contextmanager
def serving(hub: Hub) -> Iterator[None]:
    """Serve `hub` at `hub.url`, in threads of this process."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.socket.close()
