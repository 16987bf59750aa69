"""What the page cache has of a file, asked without bringing any of it in.

A read that must not wait (`os.RWF_NOWAIT`) tells that too, but the kernel starts to read ahead
whatever it refuses: up to 8 MiB each time, as the disk is set. Who then reads it directly has the
disk read everything twice.
"""

from __future__ import annotations

import ctypes
import mmap
import os

import numpy as np
from numpy.typing import NDArray

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None)


class PageCache:
    """The page cache's part of one open file; nothing is read through it.

    Args:
        fd: may be closed before this is; a mapping has a descriptor of its own.
    """

    def __init__(self, fd: int) -> None:
        self._map: mmap.mmap | None = None
        try:
            if os.fstat(fd).st_size:
                self._map = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
        except (OSError, ValueError):  # some file systems cannot: they do not tell; or it is cut
            pass
        self._bytes = np.frombuffer(self._map or b"", np.uint8)

    def close(self) -> None:
        """Give the file back: deleted ones take room on the disk for as long as they are mapped."""
        self._bytes = np.frombuffer(b"", np.uint8)
        if self._map is not None:
            self._map.close()

    def found(self, offset: int, length: int) -> NDArray[np.bool_]:
        """Tell for each page that a span touches whether it is there; the file's last pages are
        left out where it does not tell, or is shorter."""
        first, stop = offset // PAGE, min(-(-(offset + length) // PAGE),
                                          -(-len(self._bytes) // PAGE))
        pages = np.zeros(max(0, stop - first), np.uint8)
        if len(pages) and _libc.mincore(
                ctypes.c_void_p(self._bytes.ctypes.data + first * PAGE),
                ctypes.c_size_t(len(pages) * PAGE), pages.ctypes.data_as(ctypes.c_void_p)):
            pages[:] = 0
        return (pages & 1).astype(np.bool_)

    def num_found(self, offset: int, length: int) -> int:
        """Count the bytes of a span that are there, from its beginning on."""
        pages = self.found(offset, length)
        count = len(pages) if pages.all() else int(pages.argmin())
        return max(0, min(length, (offset // PAGE + count) * PAGE - offset))
