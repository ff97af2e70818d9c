"""Whatever goes wrong ends in one line and an exit status, and leaves nothing half-written."""

import errno
import os
import signal
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from dvc.repo import Repo
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from bob import failures
from bob.errors import LINE, NAME, BobError, first_line, shown, tell
from bob.formats.params import schema
from tests.builders import build_photos
from tests.conftest import ROOT

TEXTS = st.text(st.characters(codec=None), max_size=3 * LINE)  # surrogates, too


def run(
    code: str, *arguments: str, environment: dict[str, str] | None = None, stdout: int | None = None
) -> subprocess.CompletedProcess[str]:
    """bob's command line in another process, in which `code` has been run before."""
    return subprocess.run(
        [sys.executable, "-c", f"{code}\nfrom bob.__main__ import main; main()", *arguments],
        env={**os.environ, "PYTHONPATH": path(), **(environment or {})},
        stdout=subprocess.PIPE if stdout is None else stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )


def path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def failing(raised: str) -> str:
    """Code after which `bob split` raises that."""
    return (
        "import errno, sys, types; module = types.ModuleType('bob.stages.split')\n"
        f"def run(params): {raised}\n"
        "module.run = run; sys.modules['bob.stages.split'] = module"
    )


@pytest.fixture
def project(workspace: Path) -> Path:
    """A project that `bob split` runs in, with photos of two classes."""
    for name in ("params.yaml", "dvc.yaml"):
        (workspace / name).write_text((ROOT / name).read_text())
    values = YAML().load((workspace / "params.yaml").read_text())
    values["data"] |= {"name": "two", "shots": 2, "val_per_class": 1}
    YAML().dump(values, workspace / "params.yaml")
    build_photos(workspace / "data/two", {"Red_Disc": 6, "Blue_Disc": 6})
    (workspace / "data/two/dataset.yaml").write_text("descriptor: disc\n")
    return workspace


@pytest.fixture
def tracked(project: Path) -> Path:
    """The same as a DVC repository."""
    Repo.init(no_scm=True).close()
    return project


# --- the last net --------------------------------------------------------------------------------


def test_what_nobody_foresaw_is_one_line_and_a_file_with_the_traceback(project: Path) -> None:
    (project / ".dvc").mkdir()
    done = run(failing("[][0]"), "split")
    assert done.returncode == 70
    (kept,) = (project / ".dvc/tmp/bob").iterdir()
    assert done.stderr == (
        f"Error: bob split: IndexError: list index out of range at {_line_of('importlib')}; "
        f"bob did not foresee this: the traceback is in {kept}\n"
    )
    assert "IndexError: list index out of range" in kept.read_text().splitlines()[-1]
    assert kept.read_text().startswith("bob split\n")


def _line_of(words: str) -> str:
    lines = (ROOT / "bob/cli.py").read_text().splitlines()
    (number,) = (n for n, line in enumerate(lines, start=1) if f"{words}.import_module" in line)
    return f"bob/cli.py:{number}"


def test_without_dvc_the_traceback_is_in_the_systems_folder(project: Path, tmp_path: Path) -> None:
    (tmp_path / "temporary").mkdir()
    done = run(failing("[][0]"), "split", environment={"TMPDIR": str(tmp_path / "temporary")})
    (kept,) = (tmp_path / "temporary").iterdir()
    assert done.stderr.endswith(f"the traceback is in {kept}\n")


def test_the_traceback_of_a_queued_experiment_is_in_the_repository_that_stays(
    project: Path, tmp_path: Path
) -> None:
    (tmp_path / "repository/.dvc").mkdir(parents=True)
    run(failing("[][0]"), "split", environment={"DVC_ROOT": str(tmp_path / "repository")})
    assert len(list((tmp_path / "repository/.dvc/tmp/bob").iterdir())) == 1


def test_bob_debug_shows_the_traceback_instead(project: Path) -> None:
    (project / ".dvc").mkdir()
    done = run(failing("[][0]"), "split", environment={"BOB_DEBUG": "1"})
    assert done.returncode == 70
    assert done.stderr.startswith("Traceback (most recent call last):\n")
    assert not (project / ".dvc/tmp/bob").exists()


@pytest.mark.parametrize(
    ("raised", "status", "told"),
    [
        ("raise MemoryError('of 9 TB')", 1, "split: out of memory (of 9 TB); free memory and run"),
        (
            "raise RuntimeError('[enforce fail] DefaultCPUAllocator: no memory')",
            1,
            "split: out of memory ([enforce fail] DefaultCPUAllocator: no memory); free memory",
        ),
        (
            "raise OSError(errno.ENOSPC, 'No space left on device', 'results/x')",
            1,
            "results/x is full (No space left on device); free space and run it again",
        ),
        (
            "raise OSError(errno.ENOSPC, 'No space left on device', 'data/a', None, 'results/a')",
            1,
            "results/a is full (No space left on device); free space and run it again",
        ),
        (
            "raise PermissionError(errno.EACCES, 'Permission denied', b'\\x1b')",
            1,
            "\\x1b may not be used (Permission denied); correct its permissions",
        ),
        (
            "raise RuntimeError('I/O error: No space left on device (os error 28)')",
            1,
            "what it writes to is full (I/O error: No space left on device (os error 28)); free",
        ),
        ("raise OSError(errno.EMFILE, 'Too many', 'x')", 70, "bob split: x: OSError: Too many at "),
        (
            "import sqlite3; raise sqlite3.OperationalError('disk I/O error')",
            1,
            "a database of DVC's cannot be used (disk I/O error); if its disk is full, free space",
        ),
        ("raise ValueError('a\\nb\\u2028c' * 999)", 70, "bob split: ValueError: a b c"),
        ("raise RecursionError", 70, "bob split: RecursionError: "),
        ("import no_such_module", 1, f"{sys.executable} has no module 'no_such_module'; activate"),
    ],
)
def test_each_failure_has_its_line_and_status(
    project: Path, raised: str, status: int, told: str
) -> None:
    done = run(failing(raised), "split")
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith(f"Error: {told}")
    assert done.stderr.count("\n") == 1 and len(done.stderr.splitlines()) == 1
    assert len(done.stderr) <= LINE + len("Error: \n")


def test_a_file_that_ends_too_early_is_not_taken_for_the_end_of_input(project: Path) -> None:
    done = run(failing("raise EOFError"), "split")
    assert done.returncode == 70
    assert done.stderr.strip().startswith("Error: bob split: EOFError: EOFError at bob/cli.py")


@pytest.mark.parametrize("raised", ["OSError(28, os.strerror(28), 'x')", "KeyboardInterrupt"])
def test_nothing_half_written_stays(tracked: Path, raised: str) -> None:
    code = (
        "import os, bob.stages.split as stage\n"
        f"def fail(*_): raise {raised}\n"
        "stage.write_task = fail"  # the last that it writes
    )
    assert run(code, "split").returncode in (1, 130)
    assert list((tracked / "results").iterdir()) == []


def test_a_gpu_that_is_full_says_what_to_lower() -> None:
    torch = pytest.importorskip("torch")
    told = failures.foreseen(torch.OutOfMemoryError("CUDA out of memory."), "generate")
    assert told == (
        "generate: out of memory (CUDA out of memory.); lower generate.batch_size and run it again"
    )


def test_what_is_to_be_lowered_are_parameters() -> None:
    sections = schema()["properties"]
    for advice in failures.LOWER.values():
        named = [word.strip(",:") for word in advice.split() if "." in word]
        assert named
        for name in named:
            section, key = name.split(".")
            assert key in sections[section]["properties"], name


def test_ctrl_c_is_quiet(project: Path) -> None:
    # Where the tests run in the background of a shell, Ctrl-C is ignored, by what they start too.
    listening = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code = failing(
        f"{listening}import time; print('here', file=sys.stderr, flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", f"{code}\nfrom bob.__main__ import main; main()", "split"],
        env={**os.environ, "PYTHONPATH": path()},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr and process.stderr.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.read().strip() == ""
    assert process.returncode == 130


def test_ctrl_c_after_the_work_is_done_is_quiet(tracked: Path) -> None:
    code = (
        "import atexit, os, signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGINT)"
    )
    done = run(code, "split")
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")
    assert (tracked / "results/split/classes.json").exists()


def test_a_reader_that_goes_away_ends_it_quietly(project: Path) -> None:
    code = "import click, bob.cli; bob.cli.plan.callback = lambda **_: [print('x' * 99)] * 3000"
    read, write = os.pipe()
    os.close(read)
    done = run(code, "plan", stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(
    "arguments",
    [
        ("pl\x1b[31man\u202e",),
        ("plan", "--\x1b]0;title\x07"),
        ("plan", "\x1b[31m", "\u2028"),
        ("predict", "--top", "a\nb\x1b[2J", "x"),
        ("dataset", "\x1b[31m"),
    ],
)
def test_what_was_typed_wrongly_is_shown_in_one_line(arguments: tuple[str, ...]) -> None:
    done = run("", *arguments)
    assert done.returncode == 2
    *usage, line = done.stderr.split("\n")[:-1]
    assert line.startswith("Error: ") and line.isprintable()
    assert all(other.isprintable() for other in usage)


def test_an_error_without_a_message_is_called_by_its_class() -> None:
    assert first_line(ValueError()) == first_line(ValueError(" \n")) == "ValueError"
    assert first_line(ValueError("\n a\nb")) == "a"


# --- printing ------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_stage_whose_line_cannot_be_printed_has_done_its_work(tracked: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = run("", "split", stdout=full.fileno())
    assert done.returncode == 0
    assert done.stderr == (
        "split: warning: its output is written, but what it says is not: "
        f"[Errno {errno.ENOSPC}] No space left on device\n"
    )
    assert len((tracked / "results/split/train.jsonl").read_text().splitlines()) == 4


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_command_whose_lines_cannot_be_printed_fails_in_one_line(project: Path) -> None:
    code = "import bob.cli; bob.cli.plan.callback = lambda **_: print('a line')"
    with Path("/dev/full").open("w") as full:
        done = run(code, "plan", stdout=full.fileno())
    assert done.returncode == 1
    assert done.stderr == (
        "Error: what it writes to is full (No space left on device); free space and run it again\n"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize(("raised", "status"), [("[][0]", 70), ("raise BobError('bad')", 1)])
def test_an_error_that_cannot_be_printed_keeps_its_status(
    project: Path, raised: str, status: int
) -> None:
    code = f"from bob.errors import BobError\n{failing(raised)}\nimport os, sys"
    full = f"{code}; os.dup2(os.open('/dev/full', os.O_WRONLY), 2)"
    assert run(full, "split").returncode == status
    closed = f"{code}; sys.stdout = None"
    assert run(closed, "split").returncode == status


def test_letters_that_the_terminal_lacks_are_escapes_and_no_error(tracked: Path) -> None:
    (tracked / "data/two/dataset.yaml").write_text("descriptor: каюта\n", encoding="utf-8")
    done = run("", "split", environment={"PYTHONIOENCODING": "latin-1"})
    assert done.returncode == 0
    assert "2 classes of \\u043a\\u0430\\u044e\\u0442\\u0430;" in done.stdout


def test_a_stages_lines_are_one_each_whatever_is_in_a_name(tracked: Path) -> None:
    about = 'descriptor: "di\\u200Bsc\\e[31m\\u202E"\n'
    (tracked / "data/two/dataset.yaml").write_text(about)
    done = run("", "split")
    assert done.stdout == (
        "split: 2 classes of di\\u200bsc\\x1b[31m\\u202e; photos: 4 train, 2 val, 4 test\n"
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("Anna's Hummingbird é 鳥", "Anna's Hummingbird é 鳥"),
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\x1b[31m\x07\x9b", "\\x1b[31m\\x07\\x9b"),
        ("\u2028\u2029\x85", "\\u2028\\u2029\\x85"),
        ("\u202egpj.exe\u200f", "\\u202egpj.exe\\u200f"),
        ("\udcff.png", "\\udcff.png"),
        ("x" * 300, "x" * 99 + "..." + "x" * 98),
    ],
)
def test_a_name_is_shown_in_one_line(text: str, line: str) -> None:
    assert shown(text) == line


@settings(max_examples=200, derandomize=True, deadline=None)
@given(TEXTS)
def test_whatever_is_told_is_one_printable_line(text: str) -> None:
    for line, most in ((shown(text), NAME), (str(BobError(text)), LINE)):
        assert len(line) <= most
        assert not any(unicodedata.category(one) in ("Cc", "Cf", "Cs", "Zl", "Zp") for one in line)
        line.encode()
        assert shown(line, most) == line  # what is told of in another error stays as it is


@settings(max_examples=50, derandomize=True, deadline=None)
@given(TEXTS)
def test_a_warning_is_one_line(text: str) -> None:
    read, write = os.pipe()
    stderr = sys.stderr
    with os.fdopen(write, "w", encoding="ascii", errors="backslashreplace") as sys.stderr:
        tell(text)
    sys.stderr = stderr
    with os.fdopen(read, encoding="ascii") as file:
        assert len(file.read().splitlines()) == 1
