"""Folders that one run writes to at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from longspan.errors import LongspanError
from longspan.files.whole import make_folder


@contextmanager
def owned_folder(folder: Path) -> Iterator[None]:
    """Keep a folder to this process. It is made where it is not there, and goes again where nothing
    was written to it.

    The lock is on the folder itself: it leaves no file, and ends with the process, however that
    ends. Raises `LongspanError` where it cannot be made, or another run has it.
    """
    is_new = not folder.exists()
    make_folder(folder)
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _lock(handle, folder)
        yield
    finally:
        os.close(handle)
        if is_new:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def _lock(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LongspanError(f"{folder}: another run is writing there; wait for it, or choose "
                            "another folder with --out") from None
    except OSError:
        pass  # network disks may have no locks on folders, and one run is the rule
