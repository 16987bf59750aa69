"""What the page cache has: told page by page, and nothing is brought in by asking or reading."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from longspan.engine.device import page_cache
from longspan.engine.device.file_reader import FileReader
from longspan.engine.device.page_cache import PAGE, PageCache

SIZE = 64 * PAGE + 10


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "data").write_bytes(os.urandom(SIZE))
    found = os.open(tmp_path / "data", os.O_RDONLY)
    yield found
    os.close(found)


def test_pages_are_told_one_by_one(fd: int) -> None:
    cache = PageCache(fd)
    assert cache.found(0, SIZE).tolist() == [True] * 65, "it was just written"
    os.fsync(fd)
    os.posix_fadvise(fd, 8 * PAGE, 8 * PAGE, os.POSIX_FADV_DONTNEED)
    found = cache.found(0, SIZE)
    assert cache.found(5 * PAGE + 7, 6 * PAGE).tolist() == found[5:12].tolist()
    for start, length in ((0, SIZE), (3, 4), (5 * PAGE + 7, 9 * PAGE), (60 * PAGE, 5 * PAGE)):
        count, gone = cache.num_found(start, length), found[start // PAGE:].tolist() + [False]
        end = (start // PAGE + gone.index(False)) * PAGE
        assert count == min(length, max(0, end - start))


def test_nothing_is_there_behind_the_end_or_where_nobody_tells(
    fd: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert PageCache(fd).num_found(66 * PAGE, PAGE) == 0
    with open("/dev/null", "rb") as other:
        assert not PageCache(other.fileno()).found(0, PAGE).any()
    monkeypatch.setattr(page_cache._libc, "mincore", lambda *args: -1)
    assert PageCache(fd).num_found(0, SIZE) == 0
    (tmp_path / "data").write_bytes(b"")
    assert PageCache(fd).num_found(0, SIZE) == 0


def test_a_direct_read_leaves_the_page_cache_as_it_was(tmp_path: Path) -> None:
    """Else the kernel reads everything once more."""
    file, size = tmp_path / "large", 32 * 1024**2
    file.write_bytes(bytes(size))
    fd = os.open(file, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    cache, target = PageCache(fd), memoryview(mmap.mmap(-1, size // 8))
    before = int(cache.found(0, size).sum())
    with FileReader(file) as reader:
        for part in range(8):
            reader.read(target, part * len(target))
    time.sleep(0.2)  # for what the kernel would read by itself
    assert int(cache.found(0, size).sum()) == before
    os.close(fd)
