"""`bob look`: the report in a browser, with verdicts on images and edits of captions."""

import os
import secrets
import socket
import sys
import webbrowser
from contextlib import suppress

import click

from bob.commands.look.pages import INDEX
from bob.errors import BobError

HOST = "127.0.0.1"
# The same each time, because a browser keeps what is pending for the address of a page.
PORT = 8717
SECONDS_TO_END = 2  # for requests that are being answered


def look(port: int | None = None, *, browser: bool = True) -> None:
    """Serve the report of the current folder until interrupted.

    At `port`, where 0 is any that is free; by default at PORT, or where that is taken at any.
    Raises BobError where there is no report, no DVC repository, or the port is taken.
    """
    # Late: `bob --help` needs none of it.
    import uvicorn

    from bob.commands.look.review import Review
    from bob.commands.look.server import application

    if not INDEX.is_file():
        raise BobError(f"{INDEX} is missing; `dvc repro report` makes it")
    token = secrets.token_urlsafe(24)
    review = Review()
    with _listening(port) as listener:
        port = listener.getsockname()[1]
        server = uvicorn.Server(
            uvicorn.Config(
                application(review, token, port),
                lifespan="off",
                log_level="error",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=SECONDS_TO_END,
            )
        )
        url = f"http://{HOST}:{port}/?token={token}"
        click.echo(f"bob look: {url} (Ctrl-C ends it)")
        if browser and _has_display():
            webbrowser.open(url)
        with suppress(KeyboardInterrupt):  # which uvicorn raises again when it has ended
            server.run(sockets=[listener])


def _listening(port: int | None) -> socket.socket:
    if port is None:
        with suppress(OSError):
            return socket.create_server((HOST, PORT))
        port = 0
    try:
        return socket.create_server((HOST, port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BobError(f"port {port} of {HOST}: {reason}; --port names another") from None


def _has_display() -> bool:
    # Without one, a browser for terminals would take this one.
    return sys.platform == "darwin" or bool({"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys())
