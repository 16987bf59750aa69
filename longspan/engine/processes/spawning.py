"""What it takes to start a process of ours: its command, a private directory, its first line. No
torch, nothing but the standard library."""

from __future__ import annotations

import os
import sys
import tempfile

from longspan.errors import LongspanError

SOCKET_REMEDY = "free some space, or name a directory that takes sockets in TMPDIR"
MAX_SOCKET_PATH = 90
"""Unix sockets allow about 100 bytes."""


def private_directory() -> str:
    """Make a directory that only this user may enter, with a path short enough for sockets.

    Raises `LongspanError` when there can be none.
    """
    try:
        path = tempfile.mkdtemp(prefix="longspan-")
        if len(path) > MAX_SOCKET_PATH - len("/scheduler"):
            os.rmdir(path)
            path = tempfile.mkdtemp(prefix="longspan-", dir="/tmp")
    except OSError as error:
        place = f" ({os.path.dirname(error.filename)})" if error.filename else ""
        raise LongspanError(f"cannot make a directory for the engine's sockets: {error.strerror}"
                            f"{place}; {SOCKET_REMEDY}") from None
    return path


def python_command(module: str, *arguments: str) -> list[str]:
    """Build the command that runs ``main`` of a module in a fresh interpreter, which finds modules
    where this one does.

    Args:
        arguments: the first one is a name for people who list processes.
    """
    code = f"import sys; sys.path[:] = {sys.path!r}; from {module} import main; main()"
    return [sys.executable, "-c", code, *arguments]


def first_line() -> bytes:
    """Read one line of standard input unbuffered: a buffer would hide the end of the pipe,
    which is the lifeline."""
    line = bytearray()
    while (byte := os.read(0, 1)) not in (b"", b"\n"):
        line += byte
    return bytes(line)
