"""The last net: what nobody foresaw becomes one line as well, and an exit status."""

import errno
import os
import platform
import shlex
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from bob.errors import LINE, UNUSABLE, shown

DEBUG = "BOB_DEBUG"
"""Environment variable; where it is 1, a traceback is printed instead of the line."""
FAILED, UNFORESEEN, INTERRUPTED = 1, 70, 130  # exit statuses; 70 is EX_SOFTWARE of sysexits.h

# The repository, also where DVC runs a queued experiment in a folder that it removes afterwards;
# read before the command sets it otherwise.
_ROOT = os.environ.get("DVC_ROOT", "")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_SPACE = os.strerror(errno.ENOSPC)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
# What takes less memory, by stage.
LOWER = {
    "caption": "caption.batch_size or caption.image_side",
    "finetune": "finetune.batch_size, raising finetune.gradient_accumulation, or set "
    "finetune.gradient_checkpointing: true",
    "generate": "generate.batch_size",
    "classify": "classify.batch_size",
    "audit": "caption.batch_size",
    "benchmark": "benchmark.batch_sizes",
}


def guarded(command: Callable[[], object]) -> None:
    """Run `command`, and exit with one line on standard error where it fails.

    What it prints is written out before: a full disk is a failure too. A `SystemExit` goes through.
    """
    # What the terminal's encoding lacks is printed as an escape, as Python does on standard error.
    with suppress(AttributeError, OSError):  # it may be closed, or no text stream of Python's
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        try:
            command()
        except SystemExit:
            _flush()
            raise
        _flush()
    except SystemExit:
        raise
    except BaseException as error:
        with suppress(OSError):
            _flush()
        silence(sys.stdout)
        line = foreseen(error, next(iter(sys.argv[1:]), ""))
        try:
            _tell(error, line)
        except OSError:  # standard error may be what is full
            silence(sys.stderr)
        sys.exit(_status(error, line))
    finally:
        _end_at_once_by_ctrl_c()


def _end_at_once_by_ctrl_c() -> None:
    """What is left is Python's tidying up, which would print a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _flush() -> None:
    if sys.stdout is not None:  # as it is where it was closed
        sys.stdout.flush()


def _status(error: BaseException, line: str) -> int:
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return FAILED if line or isinstance(error, BrokenPipeError) else UNFORESEEN


def _tell(error: BaseException, line: str) -> None:
    if isinstance(error, KeyboardInterrupt | BrokenPipeError):  # `| head` has what it wanted
        return
    if os.environ.get(DEBUG) == "1":
        traceback.print_exception(error)
    else:
        print(f"Error: {shown(line or _unforeseen(error), LINE)}", file=sys.stderr)
    sys.stderr.flush()


def foreseen(error: BaseException, command: str) -> str:
    """What to say of an error whose cause is known: memory, disk, permission, environment."""
    if isinstance(error, ModuleNotFoundError):
        # DVC starts stages with the first `python` on PATH, which need not be the project's.
        return (
            f"{sys.executable} has no module {error.name!r}; activate the project's environment "
            "first: source .venv/bin/activate (`make repro` creates it)"
        )
    if _of_memory(error):
        lower = f"lower {LOWER[command]}" if command in LOWER else "free memory"
        return f"{command}: out of memory ({_reason(error)}); {lower} and run it again"
    number = error.errno if isinstance(error, OSError) else None
    sqlite = sys.modules.get("sqlite3")
    if sqlite and isinstance(error, sqlite.Error):  # bob's own index tells of its errors itself
        return f"a database of DVC's cannot be used ({_reason(error)}); {UNUSABLE}"
    if number in _FULL or _NO_SPACE in str(error):  # safetensors and torch have their own classes
        return f"{_place(error)} is full ({_reason(error)}); free space and run it again"
    if number in _FORBIDDEN:
        return f"{_place(error)} may not be used ({_reason(error)}); correct its permissions"
    return ""


def _of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")  # not imported for this
    classes = (MemoryError, *filter(None, [getattr(torch, "OutOfMemoryError", None)]))
    # What torch raises on a CPU has no class of its own.
    return isinstance(error, classes) or "DefaultCPUAllocator" in str(error)


def _reason(error: BaseException) -> str:
    """The start of an error's message."""
    said = error.strerror if isinstance(error, OSError) else str(error)
    return shown(" ".join((said or "").split()) or type(error).__name__)


def _place(error: BaseException) -> str:
    # Of two names, a copy's second is what it writes.
    name = getattr(error, "filename2", None) or getattr(error, "filename", None)
    return shown(os.fsdecode(name)) if isinstance(name, str | bytes) else "what it writes to"


def _unforeseen(error: BaseException) -> str:
    said = f"{type(error).__name__}: {_reason(error)} at {_innermost(error)}"
    if isinstance(error, OSError) and error.filename is not None:
        said = f"{_place(error)}: {said}"
    path = _write_traceback(error)
    kept = f"the traceback is in {path}" if path else f"{DEBUG}=1 shows the traceback"
    return f"{_command()}: {said}; bob did not foresee this: {kept}"


def _command() -> str:
    return shown(shlex.join(["bob", *sys.argv[1:]]))


def _innermost(error: BaseException) -> str:
    """The line of bob's that did not return."""
    package = Path(__file__).parent
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        path = Path(frame.filename)
        if path.is_relative_to(package):
            return f"{path.relative_to(package.parent)}:{frame.lineno}"
    return "the command line"


def _write_traceback(error: BaseException) -> Path | None:
    """Write what a report of the failure needs; None where it cannot be written."""
    dvc = Path(_ROOT, ".dvc")
    folder = dvc / "tmp/bob" if dvc.is_dir() else Path(tempfile.gettempdir())
    about = f"{_command()}\n{platform.platform()}, Python {platform.python_version()}\n\n"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix="failure-", suffix=".txt", dir=folder)
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(about)
            traceback.print_exception(error, file=file)
        return Path(name)
    return None


def silence(stream: object) -> None:
    """Let what is printed to a stream, and what could not be, go nowhere."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[attr-defined]
