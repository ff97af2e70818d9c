"""Ends a process whose Ray is gone: Ray's own calls wait for a minute, some for ever.

What waits in one can be told nothing, so that the end of the process is the only way out.
"""

import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import NoReturn

from bob.errors import LINE, shown

SECONDS_TO_JOIN = 120
SECONDS_TO_ANSWER = 20  # Ray gives up after 30 to 60, in many lines
_SECONDS_BETWEEN_LOOKS = 2.0
_SECONDS_TO_REACH = 10


def reach(address: str) -> None:
    """Connect to HOST:PORT; raises OSError where nobody listens."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), _SECONDS_TO_REACH).close()


class Watch:
    """Ends this process where it cannot join a cluster, or a part of it answers no longer.

    To be made before it joins. `parts` is what is known by then: name -> HOST:PORT.
    """

    def __init__(self, parts: Mapping[str, str]) -> None:
        self._parts = parts
        self._is_joined: Callable[[], bool] = lambda: True
        self._answered = time.monotonic()
        self._join_by = self._answered + SECONDS_TO_JOIN
        threading.Thread(target=self._look, name="watch", daemon=True).start()

    def joined(self, parts: Mapping[str, str], is_joined: Callable[[], bool]) -> None:
        """From now on look at these parts, for as long as `is_joined` says that it is of use."""
        self._answered, self._join_by = time.monotonic(), math.inf
        self._parts, self._is_joined = parts, is_joined

    def failed(self) -> None:
        """Look no longer: it could not join, and says so itself."""
        self._is_joined = lambda: False

    def _look(self) -> None:
        while self._is_joined():
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            gone = self._gone()
            if not gone:
                self._answered = time.monotonic()
            elif time.monotonic() > self._answered + SECONDS_TO_ANSWER:
                _end(f"{gone}; what was made is kept")
            if time.monotonic() > self._join_by:
                _end(f"the Ray cluster was not joined in {SECONDS_TO_JOIN} s")

    def _gone(self) -> str:
        """What does not answer, in words; empty where everything does."""
        for name, address in self._parts.items():
            try:
                reach(address)
            except OSError as error:
                return f"{name}, {address}, does not answer ({error.strerror or error})"
        return ""


def _end(reason: str) -> NoReturn:
    print(shown(f"bob: {reason}", LINE), file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)
