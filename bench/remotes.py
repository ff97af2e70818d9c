"""Remotes of DVC to measure with: a folder, an sshd of our own, an S3 server in this process."""

import getpass
import logging
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dvc.repo import Repo

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
_CONFIG = """\
ListenAddress 127.0.0.1
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PidFile none
Subsystem sftp internal-sftp
"""


@dataclass(frozen=True)
class Served:
    """A remote, as DVC's configuration has it."""

    url: str
    options: Mapping[str, str] = field(default_factory=dict)

    def configure(self, repository: Path, name: str = "storage") -> None:
        """Make it the default remote of a repository."""
        with Repo(str(repository)) as repo, repo.config.edit() as config:
            config["remote"][name] = {"url": self.url, **self.options}
            config["core"]["remote"] = name


@contextmanager
def folder(path: Path) -> Iterator[Served]:
    yield Served(str(path.absolute()))


@contextmanager
def ssh(path: Path) -> Iterator[Served]:
    """The folder `path`, through an sshd on the loopback that knows one key."""
    if SSHD is None:
        raise FileNotFoundError("no sshd is installed (Debian: openssh-server)")
    keys = path.with_name(f"{path.name}.sshd").absolute()
    keys.mkdir()
    for name in ("host", "user"):
        generate = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name)]
        subprocess.run(generate, check=True)
    (keys / "config").write_text(_CONFIG.format(folder=keys))
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where a privileged sshd changes its root to
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (keys / "log").open("w") as log:
        server = subprocess.Popen(
            [SSHD, "-D", "-e", "-f", str(keys / "config"), "-p", str(port)], stderr=log
        )
    try:
        _wait(port)
        url = f"ssh://{getpass.getuser()}@127.0.0.1:{port}{path.absolute()}"
        yield Served(url, {"keyfile": str(keys / "user")})
    finally:
        server.terminate()
        server.wait()


def _wait(port: int) -> None:
    until = time.monotonic() + 20
    while True:
        with socket.socket() as asking:
            if asking.connect_ex(("127.0.0.1", port)) == 0:
                return
        if time.monotonic() > until:
            raise TimeoutError("sshd does not answer")
        time.sleep(0.05)


@contextmanager
def s3(path: Path) -> Iterator[Served]:
    """A bucket with the name of `path`, in moto's server, which keeps it in memory."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        account = {"access_key_id": "key", "secret_access_key": "secret", "region": "us-east-1"}
        names = {"access_key_id": "aws_access_key_id", "secret_access_key": "aws_secret_access_key"}
        client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            **{names.get(key, "region_name"): value for key, value in account.items()},
        )
        client.create_bucket(Bucket=path.name)
        yield Served(f"s3://{path.name}/cache", {"endpointurl": endpoint, **account})
    finally:
        server.stop()


REMOTES = {"folder": folder, "ssh": ssh, "s3": s3}
