"""The warm Python does what the real one does, and leaves no process behind.

That stages write the same bytes in either is held by test_verify.py: what it compares with is of
the warm one.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from bob.parent import alive
from tests import warm_python
from tests.conftest import ROOT

pytestmark = pytest.mark.slow  # the first call imports all libraries

TELLS = """
import atexit, json, os, sys
print(json.dumps([__name__, sys.argv, sys.path[0], os.getcwd(), os.environ["MINE"], input()]))
print("an error", file=sys.stderr)
atexit.register(print, "at exit")
def end(how):
    if how == "raise":
        raise ValueError(how)
    sys.exit(int(how) if how.isdigit() else how)
if len(sys.argv) > 1:
    end(sys.argv[1])
"""


def start(folder, python, module, *arguments, **environment):
    place = folder / "place"
    place.mkdir(exist_ok=True)
    return psutil.Popen(
        [python, "-m", module, *arguments],
        cwd=place,
        env=os.environ | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def module(tmp_path):
    """Writes a module where `start` finds it."""
    (tmp_path / "place").mkdir()

    def write(text):
        (tmp_path / "place/told.py").write_text(text)

    return write


@pytest.fixture(scope="module")
def warm():
    return str(warm_python.folder() / "python")


@pytest.mark.parametrize("arguments", [(), ("3",), ("0", "more"), ("in words",), ("raise",)])
def test_a_module_runs_and_ends_as_in_the_real_one(tmp_path, module, warm, arguments):
    module(TELLS)
    told = {}
    for python in (sys.executable, warm):
        process = start(tmp_path, python, "told", *arguments, MINE="ä b")
        out, errors = process.communicate("line\n")
        told[python] = process.returncode, out, errors.splitlines()[::-1][:2]
    assert told[sys.executable] == told[warm]
    assert told[warm][0] == {"3": 3, "in words": 1, "raise": 1}.get("".join(arguments), 0)
    assert json.loads(told[warm][1].splitlines()[0])[4:] == ["ä b", "line"]


def modules(process):
    return set(json.loads(process.communicate()[0]))


def test_it_has_the_libraries_and_nothing_of_bob(tmp_path, module, warm):
    module("import json, sys; print(json.dumps(list(sys.modules)))")
    libraries = {"torch", "diffusers", "transformers", "timm", "dvclive", "dvc.repo"}
    found = modules(start(tmp_path, warm, "told"))
    assert libraries <= found
    assert not {name for name in found if name.partition(".")[0] in ("bob", "bench", "tests")}
    # Another number of threads is nothing that a library takes after it was imported.
    other = modules(start(tmp_path, warm, "told", OMP_NUM_THREADS="3"))
    assert not libraries & other


@pytest.mark.skipif(sys.platform != "linux", reason="the names of threads are read from /proc")
def test_no_thread_is_lost_in_a_fork(tmp_path, module, warm):
    """What threads of the server do or hold, a fork would wait for."""
    module("")
    assert start(tmp_path, warm, "told").wait() == 0
    (server,) = (
        one for one in psutil.Process().children() if warm_python.__file__ in one.cmdline()
    )
    names = [path.read_text().strip() for path in Path(f"/proc/{server.pid}/task").glob("*/comm")]
    names.remove(server.name())
    assert set(names) <= {"jemalloc_bg_thd"}, "which is started again in a fork"


def test_it_ends_with_its_caller_and_its_caller_with_it(tmp_path, module, warm):
    module("import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    killed, lasting = (start(tmp_path, warm, "told") for _ in range(2))
    of_killed, of_lasting = (
        psutil.Process(int(caller.stdout.readline())) for caller in (killed, lasting)
    )
    killed.kill()
    wait_for(lambda: not alive(of_killed))
    assert alive(of_lasting)
    of_lasting.send_signal(signal.SIGTERM)
    assert lasting.wait(timeout=10) == 128 + signal.SIGTERM


def test_its_server_ends_with_who_started_it_however_that_ends(tmp_path):
    code = "from tests import warm_python; print(warm_python.folder(), flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    assert process.stdout and process.stdout.readline()
    (server,) = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    wait_for(lambda: not alive(server))


def wait_for(what):
    until = time.monotonic() + 10
    while not what():
        assert time.monotonic() < until
        time.sleep(0.02)
