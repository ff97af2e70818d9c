"""What stands on PATH as `python` where the tests want a warm one: see warm_python.py.

It starts in hundredths of a second, because it imports next to nothing.
"""

import marshal
import os
import socket
import sys


def main() -> None:
    address, *arguments = sys.argv[1:]
    if arguments[:1] != ["-m"]:
        os.execv(sys.executable, [sys.executable, *arguments])
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        socket.send_fds(server, [b"\0"], [0, 1, 2])
        cwd = os.getcwd()  # noqa: PTH109  pathlib takes as long to import as all of this
        server.sendall(marshal.dumps((arguments[1:], cwd, dict(os.environ))))
        status = server.recv(1)
    sys.exit(status[0] if status else 1)


if __name__ == "__main__":
    main()
