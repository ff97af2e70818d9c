"""Run a command on one of two machines that share nothing, joined by a Ray: namespaces of this one.

    python -m bench.namespaces COMMAND...

The command's machine, the driver, offers Ray no CPU, so that all is made on the other, the worker.
That has the system's programs and the Python environment, read-only, and a file tree of its own for
all else: neither project nor home, an empty /tmp, its own shared memory. Everything ends with the
command. Needs Linux with user namespaces, `unshare` and `ip`; root is not needed.
"""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import click

DRIVER, WORKER, PORT = "10.0.0.1", "10.0.0.2", 6379
ADDRESS = f"{DRIVER}:{PORT}"
RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",  # the driver's token lies in a home that the worker does not see
}
SYSTEM = ("bin", "etc", "lib", "lib32", "lib64", "sbin", "usr")
SECONDS_TO_JOIN = 60


def run(line: str) -> None:
    subprocess.run(shlex.split(line), check=True)


def new_machine(*names: str) -> list[str]:
    """Begins a command in new namespaces of these kinds, with all processes that it will start."""
    kinds = [f"--{name}" for name in (*names, "mount", "pid", "ipc", "uts")]
    return ["unshare", *kinds, "--fork", "--kill-child", "--mount-proc"]


def this_module(role: str, *rest: str) -> list[str]:
    return [sys.executable, "-m", "bench.namespaces", "--role", role, *rest]


def drive(command: tuple[str, ...], cpus: int) -> int:
    """Join two machines by a cable, start a Ray on both, and run the command here."""
    run("mount -t tmpfs tmpfs /run")  # where `ip` keeps the names of its namespaces
    run("ip netns add worker")
    run("ip link add cable type veth peer name eth0 netns worker")
    for side, device, address in (("", "cable", DRIVER), ("-n worker", "eth0", WORKER)):
        run(f"ip {side} address add {address}/24 dev {device}")
        run(f"ip {side} link set lo up")
        run(f"ip {side} link set {device} up")
        run(f"ip {side} route add default dev {device}")  # by which Ray finds its own address
    os.environ.update(RAY_ENVIRONMENT, RAY_ADDRESS=ADDRESS)
    head = f"--head --port={PORT} --num-cpus=0 --include-dashboard=false --temp-dir=/run/ray"
    start_ray(f"{head} --node-ip-address={DRIVER}").check_returncode()
    inside = ["ip", "netns", "exec", "worker", *new_machine()]
    with subprocess.Popen([*inside, *this_module("worker", str(cpus))]) as worker:
        try:
            await_cpus(cpus)
            return subprocess.run(command, check=False).returncode
        finally:
            worker.kill()


def work(cpus: int) -> None:
    """Take a file tree of one's own, and become a `ray start` that joins the driver's."""
    root = Path("/run/worker")
    root.mkdir()
    run(f"mount -t tmpfs tmpfs {root}")
    for folder in SYSTEM:
        source = Path("/", folder)
        if source.is_symlink():
            (root / folder).symlink_to(source.readlink())
        elif source.is_dir():
            show(source, root)
    for prefix in {sys.prefix, sys.base_prefix}:
        if not (root / prefix[1:]).exists():
            show(Path(prefix), root)
    for folder in ("dev", "proc", "tmp", "root"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    run(f"mount --rbind /dev {root}/dev")
    run(f"mount -t tmpfs tmpfs {root}/dev/shm")
    run(f"mount -t proc proc {root}/proc")
    run("hostname worker")
    os.chroot(root)
    os.chdir("/tmp")
    os.environ.clear()
    os.environ.update(RAY_ENVIRONMENT, HOME="/root", PATH=f"{sys.prefix}/bin:/usr/bin:/bin")
    options = f"--block --address={ADDRESS} --node-ip-address={WORKER} --num-cpus={cpus}"
    sys.exit(start_ray(options).returncode)


def show(folder: Path, root: Path) -> None:
    """Show a folder, and nothing beside it, in another file tree."""
    inside = root / folder.relative_to("/")
    inside.mkdir(parents=True)
    run(f"mount --bind -o ro {folder} {inside}")


def start_ray(options: str) -> "subprocess.CompletedProcess[bytes]":
    line = f"start --num-gpus=0 --object-store-memory=500000000 {options}"
    call = [sys.executable, "-m", "ray.scripts.scripts", *shlex.split(line)]
    return subprocess.run(call, check=False, stdout=subprocess.DEVNULL)


def await_cpus(count: int) -> None:
    import ray

    ray.init(ADDRESS, logging_level="error", log_to_driver=False)
    until = time.monotonic() + SECONDS_TO_JOIN
    while ray.cluster_resources().get("CPU", 0) < count:
        if time.monotonic() > until:
            raise click.ClickException("the worker has not joined")
        time.sleep(0.2)
    ray.shutdown()


@click.command(help=__doc__, context_settings={"ignore_unknown_options": True})
@click.option("--cpus", default=2, show_default=True, help="Of the worker.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("--role", default="outside", hidden=True)
def main(cpus: int, command: tuple[str, ...], role: str) -> None:
    if role == "outside":
        inside = this_module("driver", "--cpus", str(cpus), *command)
        os.execvp("unshare", [*new_machine("user", "map-root-user", "net"), *inside])
    if role == "driver":
        sys.exit(drive(command, cpus))
    work(int(command[0]))


if __name__ == "__main__":
    main()
