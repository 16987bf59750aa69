"""What a disk itself can do: plain reading of files, past the page cache."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from longspan.bench.session import CheckFailed
from longspan.engine.device.page_cache import PageCache

READ_BYTES, NUM_READERS = 16 * 1024**2, 8
SAMPLE_BYTES = 8 * 1024**3
"""Files beyond that are left out: a million tokens take minutes of a slow disk otherwise."""
MAX_CACHED_SHARE = 0.05
_local = threading.local()


def read_bytes_per_s(files: Sequence[Path]) -> float:
    """Read files, or some of them from all over, in large pieces by several threads."""
    sizes = {file: file.stat().st_size for file in files}
    step = max(1, -(-sum(sizes.values()) // SAMPLE_BYTES))
    chosen = [file for index, file in enumerate(files) if index % step == 0]
    pieces = [(file, start) for file in chosen for start in range(0, sizes[file], READ_BYTES)]
    forget(chosen)
    begun_s = time.perf_counter()
    with ThreadPoolExecutor(NUM_READERS, initializer=_make_buffer) as pool:
        num_bytes = sum(pool.map(_read_piece, pieces))
    return num_bytes / (time.perf_counter() - begun_s)


def forget(files: Sequence[Path]) -> None:
    """Take files out of the page cache. Raises `CheckFailed` when they stay there: what is timed
    then would not be the disk."""
    _drop(files)
    if (share := cached_share(files)) > MAX_CACHED_SHARE:
        raise CheckFailed(f"{100 * share:.0f} % of the files stay in the page cache; not timed: "
                          "name a --dir on another file system")


def _drop(files: Sequence[Path]) -> None:
    for file in files:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def cached_share(files: Sequence[Path]) -> float:
    """Return the share of the files' pages that the page cache holds; 0 where the file system does
    not tell."""
    num_found = num_pages = 0
    for file in files:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            found = PageCache(fd).found(0, os.fstat(fd).st_size)
        finally:
            os.close(fd)
        num_found, num_pages = num_found + int(found.sum()), num_pages + len(found)
    return num_found / max(1, num_pages)


def _make_buffer() -> None:
    _local.memory = mmap.mmap(-1, READ_BYTES)


def _read_piece(piece: tuple[Path, int]) -> int:
    file, start = piece
    flags = os.O_RDONLY | os.O_CLOEXEC
    try:
        fd = os.open(file, flags | os.O_DIRECT)
    except OSError:  # some file systems have no such way
        fd = os.open(file, flags)
    try:
        return os.preadv(fd, [_local.memory], start)
    finally:
        os.close(fd)
