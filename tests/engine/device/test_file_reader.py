"""Reads past the page cache: the same bytes, from any place, into any memory."""

from __future__ import annotations

import mmap
import os
import random
from pathlib import Path

import pytest

from longspan.engine.device import file_reader
from longspan.engine.device.file_reader import ALIGN, FileReader
from longspan.engine.kv_file import BadFileError

SIZE = 3 * 65_536 + 777


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "data"
    file.write_bytes(random.Random(5).randbytes(SIZE))
    return file


def drop_pages(file: Path, start: int = 0, length: int = 0) -> None:
    """Take a file out of the page cache, or a part of it."""
    fd = os.open(file, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, start, length, os.POSIX_FADV_DONTNEED)
    os.close(fd)


@pytest.mark.parametrize("is_cached", [True, False])
@pytest.mark.parametrize("has_direct", [True, False])
def test_any_span_into_any_memory(
    file: Path, monkeypatch: pytest.MonkeyPatch, is_cached: bool, has_direct: bool,
) -> None:
    monkeypatch.setattr(file_reader, "PIECE_BYTES", 4 * ALIGN)
    monkeypatch.setattr(file_reader._buffers, "memory", memoryview(mmap.mmap(-1, 6 * ALIGN)),
                        raising=False)
    whole, memory, rng = file.read_bytes(), memoryview(mmap.mmap(-1, 2 * SIZE)), random.Random(1)
    spans = [(0, SIZE, 0), (ALIGN, 8 * ALIGN, 0), (ALIGN, 8 * ALIGN, 3), (SIZE - 1, 1, 5)]
    for _ in range(60):
        start = rng.randrange(SIZE)
        spans.append((start, rng.randrange(1, SIZE - start + 1), rng.randrange(2 * ALIGN)))
    for start, length, place in spans:
        if not is_cached:
            drop_pages(file)
        elif rng.random() < 0.5:
            drop_pages(file, rng.randrange(SIZE) // ALIGN * ALIGN, 8 * ALIGN)
        target = memory[place:place + length]
        with FileReader(file) as reader:
            reader._direct = reader._direct if has_direct else -1
            reader.read(target, start)
        assert target == whole[start:start + length], (start, length, place)


@pytest.mark.parametrize("place", [0, 1])
def test_a_file_that_ends_too_soon_is_noticed(file: Path, place: int) -> None:
    drop_pages(file)
    memory = memoryview(mmap.mmap(-1, 2 * SIZE))
    for start in (0, SIZE - 10, SIZE, SIZE + ALIGN):
        with FileReader(file) as reader, pytest.raises(BadFileError, match="truncated"):
            reader.read(memory[place:place + SIZE + 1], start)
