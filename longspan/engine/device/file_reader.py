"""Reads large files as fast as the disk gives them: past the page cache, where that has not what is
asked for.

The kernel's own way reads ahead by 128 KiB or so and copies everything once more; a few threads get
a tenth of what a disk can do. Direct reads need places, lengths and memory that are multiples of
`ALIGN`: what is so is read where it belongs, the rest by way of a buffer of each thread.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from longspan.engine.device.page_cache import PageCache
from longspan.engine.kv_file import BadFileError

ALIGN = 4_096
PIECE_BYTES = 4 * 1024**2
"""Read at a time: enough for any disk where several threads do it."""
_buffers = threading.local()


class FileReader:
    """One file, open for reading by several threads; a context manager."""

    def __init__(self, file: Path) -> None:
        self._fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        self._pages = PageCache(self._fd)
        try:
            self._direct = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError:  # some file systems have no such way
            self._direct = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._pages.close()
        os.close(self._fd)
        if self._direct >= 0:
            os.close(self._direct)

    def read(self, target: memoryview, offset: int) -> None:
        """Fill ``target``, contiguous bytes, from a place in the file.

        Raises `BadFileError` when the file ends before, `OSError` when it cannot be read.
        """
        done = self._cached(target, offset)
        while done < len(target):
            rest = target[done:done + PIECE_BYTES]
            count = self._piece(rest, offset + done)
            if not count:
                raise BadFileError("it is truncated")
            done += count

    def _cached(self, target: memoryview, offset: int) -> int:
        """Read what the page cache has of it, from its beginning on; whole pages where more
        follows. Returns the bytes."""
        count = self._pages.num_found(offset, len(target))
        if not count:
            return 0
        try:
            count = os.preadv(self._fd, [target[:count]], offset, os.RWF_NOWAIT)
        except OSError:  # it had it a moment ago
            return 0
        if count < len(target):
            count = max(0, (offset + count) // ALIGN * ALIGN - offset)
        return count

    def _piece(self, target: memoryview, offset: int) -> int:
        """Read some of it, `PIECE_BYTES` at most. Returns the bytes; 0: the file has ended."""
        if self._direct >= 0:
            try:
                place = np.frombuffer(target, np.uint8).ctypes.data
                is_aligned = not (offset | len(target) | place) % ALIGN
                if is_aligned:
                    return os.preadv(self._direct, [target], offset)
                return self._by_buffer(target, offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                # larger sectors than we know: the kernel's own way
        return os.preadv(self._fd, [target], offset)

    def _by_buffer(self, target: memoryview, offset: int) -> int:
        start = offset // ALIGN * ALIGN
        wanted = -(-(offset + len(target) - start) // ALIGN) * ALIGN
        buffer = _buffer()[:wanted]
        count = os.preadv(self._direct, [buffer], start)
        found = buffer[offset - start:count][:len(target)]
        # numpy copies without the interpreter's lock
        np.copyto(np.frombuffer(target[:len(found)], np.uint8), np.frombuffer(found, np.uint8))
        return len(found)


def _buffer() -> memoryview:
    """Return this thread's buffer, for a piece at any place."""
    if not hasattr(_buffers, "memory"):
        _buffers.memory = memoryview(mmap.mmap(-1, PIECE_BYTES + 2 * ALIGN))
    memory: memoryview = _buffers.memory
    return memory
