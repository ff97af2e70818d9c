"""The one error a user is meant to see, and how whatever is told to a user becomes one line."""

import sys
from contextlib import suppress

NAME, LINE = 200, 1000  # characters that are shown of a name, and of a line
# SQLite often cannot tell which.
UNUSABLE = "if its disk is full, free space; if it may not be written to, correct its permissions"


class BobError(Exception):
    """Bad input, told in one line that names the file, key or class and says what to do.

    The command line prints the message without a traceback and exits with status 1.
    """

    def __str__(self) -> str:
        return shown(super().__str__(), LINE)


def shown(text: object, most: int = NAME) -> str:
    r"""`text` in one line of at most `most` characters, as it is told to a user.

    A file's name may hold anything: line breaks, a terminal's escapes, marks that turn the
    direction of writing, bytes that are no text. These are shown as in Python's source, "\n" or
    "\x1b". Of what is longer, the middle is left out.
    """
    line = _cut(str(text), most)  # what is to be escaped may be a whole file
    return _cut("".join(one if one.isprintable() else _escaped(one) for one in line), most)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    end = (most - 3) // 2
    return f"{text[: most - 3 - end]}...{text[-end:]}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class where it has none."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def tell(message: str) -> None:
    """Print a line on standard error that a progress bar does not swallow."""
    from tqdm import tqdm

    with suppress(OSError):  # a line that cannot be printed is no reason to stop
        tqdm.write(shown(message, LINE), file=sys.stderr)
