"""Ends a process whose Ray cluster is gone: Ray's own calls wait for a minute, some for ever.

What waits in one can be told nothing, so that the end of the process is the only way out.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable

SECONDS_TO_JOIN = 120
SECONDS_WITHOUT_HEAD = 20  # Ray gives up after 30 to 60, in many lines
_SECONDS_BETWEEN_LOOKS = 2.0
_SECONDS_TO_REACH = 10


def reach(address: str) -> None:
    """Connect to HOST:PORT; raises OSError where nobody listens."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), _SECONDS_TO_REACH).close()


class Watch:
    """Ends this process where it cannot join, or loses the cluster's `head` (HOST:PORT, if known).

    To be made before it joins.
    """

    def __init__(self, head: str) -> None:
        self._head = head
        self._answered = time.monotonic()
        self._goes_on: Callable[[], bool] = lambda: True
        threading.Thread(target=self._look, name="watch", daemon=True).start()

    def joined(self, head: str, goes_on: Callable[[], bool]) -> None:
        """What the head is; from now on it alone is looked at, as long as `goes_on` says."""
        self._answered = time.monotonic()
        self._head, self._goes_on = head, goes_on

    def end(self) -> None:
        """Look no more."""
        self._goes_on = lambda: False

    def _look(self) -> None:
        while self._goes_on():
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            if not self._head:
                self._end_after(
                    SECONDS_TO_JOIN, "does not answer; `ray status` shows one that runs"
                )
                continue
            try:
                reach(self._head)
                self._answered = time.monotonic()
            except OSError as error:
                reason = error.strerror or str(error)
                self._end_after(SECONDS_WITHOUT_HEAD, f"has lost its head, {self._head} ({reason})")

    def _end_after(self, seconds: float, reason: str) -> None:
        if time.monotonic() > self._answered + seconds and self._goes_on():
            print(f"bob: the Ray cluster {reason}; what was made is kept", file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)
