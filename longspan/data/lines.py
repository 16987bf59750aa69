"""JSON objects, one a line, that are only ever appended; a file has one writer at a time."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from longspan.errors import LongspanError

_CHUNK = 1 << 20


class Lines:
    """A file open to append to, a context manager. Safe from several threads.

    A line that a crash cut short is taken away: it was never whole. Raises `LongspanError` where
    the file cannot be written, or another process writes to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._file: Any = None

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file.truncate(_whole_size(self._file))
        except BlockingIOError:
            self._file.close()
            raise LongspanError(f"{self.path}: another run is writing there; wait for it, or "
                                "choose another folder with --out") from None
        except OSError as error:
            raise self._unwritable(error) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def append(self, line: str) -> None:
        """Write a line, whole; what is written of one that does not fit is taken back."""
        with self._lock:
            start = self._file.seek(0, os.SEEK_END)
            try:
                self._file.write(line.encode() + b"\n")
                self._file.flush()
            except OSError as error:
                os.ftruncate(self._file.fileno(), start)
                raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> LongspanError:
        return LongspanError(f"{self.path}: cannot be written ({error.strerror}); what was written "
                             "before is kept: make room, then repeat the command")


def dump(content: object) -> str:
    """Return an object as a line."""
    return json.dumps(content, ensure_ascii=False)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a file, in order; none where there is no file. A line cut short at the end is left
    out. Raises `LongspanError` for a line in the middle that is no JSON object."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                content = json.loads(line)
            except ValueError:
                content = None
            if not isinstance(content, dict):
                raise LongspanError(f"{path}, line {number}: no JSON object; take the line away, "
                                    "then repeat the command")
            yield content


def count_lines(path: Path) -> int:
    """Count the whole lines of a file; 0 where there is none."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(_CHUNK), b""))


def _whole_size(file: Any) -> int:
    """Bytes up to the last line end."""
    end: int = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - _CHUNK)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
