"""Files of KV blocks, read and written by threads of their own (`longspan.engine.kv_file`).

A file is written under another name, synced, then renamed: whoever looks finds all of it or none.
Each block's checksum is compared when it was read, by other threads than those that read: the disk
has the next reads meanwhile, also where cores are busy. Two files are under way each way, so that
it has something to do while one of them is opened, synced or reported; their blocks are done one
file after the other. Nothing here decides what is kept.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import TypeVar

from longspan.cores import num_cores
from longspan.engine.device.block_store import BlockStore
from longspan.engine.device.file_reader import PIECE_BYTES, FileReader
from longspan.engine.kv_file import (
    HASH_BYTES,
    PART_SUFFIX,
    BadFileError,
    KvFolder,
    StoredRun,
    list_files,
    make_header,
    read_header,
)
from longspan.engine.transfer import Transfer, TransferResult

MAX_HELPERS = 8
"""Blocks that are read, and that are written, at a time. Readers mostly wait for the disk, and
there are as many on few cores; those that compute are no more than the cores, or what an engine on
CPUs computes would wait for them."""
NUM_FILES = 2
"""Files that are read, and that are written, at a time."""
OnEnd = Callable[[TransferResult], None]
Result = TypeVar("Result")
logger = logging.getLogger("longspan.engine")


class BlockFiles:
    """Reads, writes and deletes the files of one engine.

    Args:
        key: of the blocks that it computes; others are not read.
    """

    def __init__(self, folder: KvFolder, key: bytes, store: BlockStore) -> None:
        self._folder, self._key, self._store = folder, key, store
        self._tensors = {part.name: (part.dtype, part.shape) for part in store.parts}
        self._sizes = [part.shape[0] * part.row_bytes for part in store.parts]
        self._memory = store.bytes_of
        self._starts = [sum(self._sizes[:index]) for index in range(len(self._sizes))]
        self._reader = ThreadPoolExecutor(NUM_FILES, "longspan-kv-read")
        self._writer = ThreadPoolExecutor(NUM_FILES, "longspan-kv-write")
        self._read_helpers = ThreadPoolExecutor(MAX_HELPERS, "longspan-kv-in")
        count = min(MAX_HELPERS, num_cores())
        self._check_helpers = ThreadPoolExecutor(count, "longspan-kv-check")
        self._write_helpers = ThreadPoolExecutor(count, "longspan-kv-out")
        self._lock = threading.Lock()
        self._ended_s = {"read": 0.0, "write": 0.0, "drop": 0.0}
        self._latest_s = max(
            ((folder.path / name).stat().st_mtime for name in list_files(folder.path)), default=0)

    def submit(self, transfer: Transfer, on_end: OnEnd) -> None:
        """Queue a transfer; ``on_end`` is called with its result on another thread."""
        pool = self._reader if transfer.kind == "read" else self._writer
        pool.submit(self._do, transfer, on_end)

    def close(self) -> None:
        """End after what is being read and written, drop the rest, and leave the directory."""
        for pool in (self._reader, self._writer, self._read_helpers, self._check_helpers,
                     self._write_helpers):
            pool.shutdown(cancel_futures=True)
        self._folder.close()

    def _do(self, transfer: Transfer, on_end: OnEnd) -> None:
        work = {"read": self._read, "write": self._write, "drop": self._drop}[transfer.kind]
        failure, begun_s = "", time.perf_counter()
        try:
            work(transfer)
        except BadFileError as error:
            failure = str(error)
        except OSError as error:
            failure = error.strerror or str(error)
        except BaseException as error:  # the scheduler must hear of its end, whatever it was
            logger.error("a KV file made trouble", exc_info=error)
            failure = type(error).__name__
        if failure:
            logger.warning("KV file %s cannot be %s: %s", self._folder.path / transfer.file,
                           {"read": "used", "write": "written", "drop": "deleted"}[transfer.kind],
                           failure)
        with self._lock:
            now_s = time.perf_counter()
            # the time of this file alone: it began when the one before it had ended
            elapsed_s = now_s - max(begun_s, self._ended_s[transfer.kind])
            self._ended_s[transfer.kind] = now_s
        on_end(TransferResult(
            transfer_id=transfer.transfer_id, failure=failure, elapsed_s=elapsed_s))

    def _read(self, transfer: Transfer) -> None:
        file = self._folder.path / transfer.file
        run = read_header(file)
        hashes = _split(transfer.hashes)
        if run.key != self._key or not set(hashes) <= set(run.hashes):
            raise BadFileError("it holds other blocks than it did")
        if {n: (t, s[1:]) for n, (t, s) in run.tensors.items()} != self._tensors:
            raise BadFileError("its blocks have another shape or dtype")
        places = {value: index for index, value in enumerate(run.hashes)}
        with FileReader(file) as reader:
            small, checks = self._read_small(reader, run), list[Future[None]]()
            try:
                _all(self._read_helpers.submit(
                    self._read_block, reader, run, small, places[value], slot, checks)
                    for value, slot in zip(hashes, transfer.slots, strict=True))
            finally:
                wait(checks)
            _all(checks)
        self._stamp(file)

    def _read_small(self, reader: FileReader, run: StoredRun) -> dict[int, memoryview]:
        """Read the parts that are small over all blocks, each in one go: its bytes by part."""
        found, start, count = dict[int, memoryview](), run.data_start, len(run.hashes)
        for part, size in enumerate(self._sizes):
            if count * size <= PIECE_BYTES:
                found[part] = memoryview(bytearray(count * size))
                reader.read(found[part], start)
            start += count * size
        return found

    def _read_block(
        self, reader: FileReader, run: StoredRun, small: dict[int, memoryview],
        index: int, slot: int, checks: list[Future[None]],
    ) -> None:
        """Read a block, and have it checked: that is added to ``checks``."""
        start = run.data_start
        for part, (view, size) in enumerate(zip(self._views(slot), self._sizes, strict=True)):
            if part in small:
                view[:] = small[part][index * size:(index + 1) * size]
            else:
                reader.read(view, start + index * size)
            start += len(run.hashes) * size
        checks.append(self._check_helpers.submit(self._check_block, run, index, slot))

    def _check_block(self, run: StoredRun, index: int, slot: int) -> None:
        checksum = 0
        for view in self._views(slot):
            checksum = zlib.crc32(view, checksum)
        if checksum != run.checksums[index]:
            raise BadFileError(f"block {index} of it is damaged")

    def _write(self, transfer: Transfer) -> None:
        hashes, name = _split(transfer.hashes), transfer.file
        header = partial(make_header, self._key, hashes, transfer.parent, tensors=self._tensors,
                         model=self._folder.model)
        start = len(header([0] * len(hashes)))
        part = self._folder.path / f"{name}{PART_SUFFIX}"
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            sums = _all(self._write_helpers.submit(
                self._write_block, fd, start, len(hashes), *pair)
                for pair in enumerate(transfer.slots))
            _write_all(fd, memoryview(header(sums)), 0)
            os.fdatasync(fd)
            os.replace(part, self._folder.path / name)
            self._stamp(self._folder.path / name)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)

    def _write_block(self, fd: int, start: int, count: int, index: int, slot: int) -> int:
        checksum = 0
        for view, size in zip(self._views(slot), self._sizes, strict=True):
            checksum = zlib.crc32(view, checksum)
            _write_all(fd, view, start + index * size)
            start += count * size
        return checksum

    def _stamp(self, file: Path) -> None:
        """Note that a file was just used: later than all others, whatever the clock says."""
        with self._lock:
            self._latest_s = max(time.time(), self._latest_s + 1e-3)
            os.utime(file, (self._latest_s, self._latest_s))

    def _drop(self, transfer: Transfer) -> None:
        (self._folder.path / transfer.file).unlink(missing_ok=True)

    def _views(self, slot: int) -> list[memoryview]:
        """View a slot's parts."""
        row = memoryview(self._memory[slot])
        return [row[start:start + size]
                for start, size in zip(self._starts, self._sizes, strict=True)]


def _all(futures: Iterable[Future[Result]]) -> list[Result]:
    """Wait for all of them, also where one fails: slots and files must not be touched any more when
    their transfer has ended."""
    found = list(futures)
    wait(found)
    return [future.result() for future in found]


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    """Write all of it, in as many calls as it takes."""
    done = 0
    while done < len(data):
        done += os.pwritev(fd, [data[done:]], offset + done)


def _split(hashes: bytes) -> list[bytes]:
    return [hashes[i:i + HASH_BYTES] for i in range(0, len(hashes), HASH_BYTES)]
