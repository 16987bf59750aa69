"""What a disk itself can do: plain reading of files, past the page cache."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

from longspan.bench.session import CheckFailed

READ_BYTES, NUM_READERS = 16 * 1024**2, 8
SAMPLE_BYTES = 8 * 1024**3
"""Files beyond that are left out: a million tokens take minutes of a slow disk otherwise."""
NUM_PROBES = 64
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
    _drop(files)  # a look at a page may bring it in


def _drop(files: Sequence[Path]) -> None:
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def cached_share(files: Sequence[Path]) -> float:
    """Estimate the share that the page cache holds, by a page here and there; 0 also where the
    file system does not tell."""
    ends = list(accumulate(file.stat().st_size for file in files))
    found, buffer = 0, bytearray(1)
    for probe in range(NUM_PROBES if ends else 0):
        place = ends[-1] * probe // NUM_PROBES
        index = next(index for index, end in enumerate(ends) if place < end)
        fd = os.open(files[index], os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # nothing is read ahead
            offset = place - (ends[index - 1] if index else 0)
            found += os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
        except OSError:
            pass
        finally:
            os.close(fd)
    return found / NUM_PROBES


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
