"""A `python -m` that starts at once, for the tests that run DVC and its stages.

They start hundreds of processes, and each would spend three to six seconds on importing libraries.
Here a server imports them once, at the first call, and forks for every call. The fork takes over
the caller's arguments, folder, environment and standard streams, and runs the module as `python -m`
does. Of bob itself the server imports nothing, since every copy of the project brings its own.

What the caller starts is a small program, warm_client.py; it waits for the fork and ends with its
status. The fork is killed when that program dies, and the server ends with the process that
started it.
"""

import ast
import atexit
import contextlib
import functools
import gc
import importlib
import marshal
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
# The one starts a thread, which a fork does not have and would wait for when it ends; the other
# reads its environment and brings gRPC, which is not made for forks.
NOT_BEFORE_A_FORK = ("onnxruntime", "ray")
# Holds all commands of DVC.
DVC = "dvc.cli.parser"
# Read by libraries when they are imported, so that for a fork it is too late.
READ_AT_IMPORT = ("HF_HUB_OFFLINE", "OMP_NUM_THREADS")


@functools.cache
def folder() -> Path:
    """A folder with a warm `python`, to be put first on PATH; it is there until this process ends.

    What is not `python -m` is passed on to the real one.
    """
    until_the_end = contextlib.ExitStack()
    atexit.register(until_the_end.close)
    place = Path(until_the_end.enter_context(tempfile.TemporaryDirectory(prefix="bob-")))
    address = str(place / "socket")
    client = [sys.executable, "-IS", str(Path(__file__).with_name("warm_client.py")), address]
    (place / "python").write_text(f'#!/bin/sh\nexec {shlex.join(client)} "$@"\n')
    (place / "python").chmod(0o755)
    # Its stdin ends with this process, however that ends.
    server = until_the_end.enter_context(
        subprocess.Popen(
            [sys.executable, __file__, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
    )
    assert server.stdout and server.stdout.readline(), "the server of warm Pythons has failed"
    return place


# --- the server ------------------------------------------------------------------------------


@functools.cache
def import_libraries() -> None:
    """Import what bob's modules import, anywhere in them, but bob; and DVC's commands."""
    # Asks for a GPU in a way that leaves it usable in a fork.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    importlib.import_module(DVC)
    for path in sorted((ROOT / "bob").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [(alias.name, "") for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(str(node.module), alias.name) for alias in node.names]
            else:
                continue
            for module, name in names:
                if module.partition(".")[0] not in ("bob", *NOT_BEFORE_A_FORK):
                    # The name too: some libraries import what they hold when it is asked for.
                    getattr(importlib.import_module(module), name, None)
    gc.freeze()  # a fork's collector leaves alone what it would have to copy


def serve(address: str) -> NoReturn:
    """Fork for every call, until stdin ends."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while sys.stdin not in select.select([sys.stdin, listener], [], [])[0]:
            client, _ = listener.accept()
            import_libraries()
            if os.fork() == 0:
                listener.close()
                keep(client)
            client.close()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
    os._exit(0)


def keep(client: socket.socket) -> NoReturn:
    """Fork again, and tell the client how the fork has ended."""
    _, streams, _, _ = socket.recv_fds(client, 1, 3)
    with client.makefile("rb") as request:
        (module, *arguments), cwd, environment = marshal.load(request)
    child = os.fork()
    if child == 0:
        client.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.chdir(cwd)
        run(module, arguments, environment)

    def kill_with_client() -> None:
        client.recv(1)  # nothing comes but the end
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)

    threading.Thread(target=kill_with_client, daemon=True).start()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        client.send(bytes([code if code >= 0 else 128 - code]))  # as a shell tells of a signal
    os._exit(0)


def run(module: str, arguments: list[str], environment: dict[str, str]) -> NoReturn:
    """Run a module as `python -m` does, in this process and the current folder."""
    if any(environment.get(name) != os.environ.get(name) for name in READ_AT_IMPORT):
        os.execve(sys.executable, [sys.executable, "-m", module, *arguments], environment)
    os.environ.clear()
    os.environ.update(environment)
    sys.executable = str(Path(sys.argv[1]).with_name("python"))  # what it starts is warm, too
    sys.argv[1:] = arguments
    sys.path[0] = str(Path.cwd())
    code: object = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 1
    # As Python ends, but for tidying up after the libraries, which takes half a second.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    serve(sys.argv[1])
