"""How fast the files of an earlier engine are read, before this one has read any: whether they are
worth reading is decided by that."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path

from longspan.engine.device.block_files import MAX_HELPERS
from longspan.engine.device.file_reader import PIECE_BYTES, FileReader
from longspan.engine.kv_file import BadFileError, list_files

SAMPLE_BYTES, SAMPLE_S = 64 * 1024**2, 0.25
"""Most that is read, and the time after which no more is."""


def sampled_bytes_per_s(folder: Path) -> float | None:
    """Read a little of the KV files in a folder, as an engine does; None: there are none, or none
    can be read."""
    end_s = time.perf_counter() + SAMPLE_S

    def read(piece: tuple[Path, int]) -> int:
        file, offset = piece
        target = memoryview(bytearray(PIECE_BYTES))
        if time.perf_counter() < end_s:
            with suppress(OSError, BadFileError), FileReader(file) as reader:
                reader.read(target, offset)
                return PIECE_BYTES
        return 0

    try:
        files = [(folder / name, (folder / name).stat().st_size) for name in list_files(folder)]
    except OSError:
        return None
    pieces = ((file, offset) for file, size in files
              for offset in range(0, size - PIECE_BYTES, PIECE_BYTES))
    chosen = list(islice(pieces, SAMPLE_BYTES // PIECE_BYTES))
    begun_s = time.perf_counter()
    with ThreadPoolExecutor(MAX_HELPERS) as pool:
        num_bytes = sum(pool.map(read, chosen))
    return num_bytes / (time.perf_counter() - begun_s) if num_bytes else None
