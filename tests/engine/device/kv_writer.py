"""Writes KV files in processes that are killed, and reads what they left. Run by a test.

Torch is loaded once; each process is a fork. While one writes, its folder is refused to another.
Prints how many files were found whole, and fails when one of them is wrong.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from array import array
from pathlib import Path

import torch

from longspan.attention.cache import allocate_cache
from longspan.engine.device.block_files import BlockFiles
from longspan.engine.device.block_store import BlockStore
from longspan.engine.kv_file import KvFolder, file_name, scan
from longspan.engine.transfer import Transfer, TransferResult
from longspan.errors import LongspanError
from tests.forks import forked

KEY, SLOTS, TIMES = b"k" * 16, 8, 20


def make_files(folder: Path) -> tuple[BlockFiles, BlockStore]:
    """Files of a small cache."""
    cache = allocate_cache(num_blocks=1, block_size=64, num_kv_heads=2, head_dim=64,
                           dtype=torch.float32, device="cpu", means=True)
    store = BlockStore([cache] * 2, SLOTS)
    return BlockFiles(KvFolder(folder), KEY, store), store


def content(value: bytes) -> int:
    """The byte that a block is full of."""
    return value[0]


def write(folder: Path, seed: int, done: int) -> None:
    """One file after another, until killed; each whole one is told by a byte to ``done``."""
    files, store = make_files(folder)
    number = 0
    while True:
        hashes = [bytes([(seed * 31 + number + index) % 251]) + number.to_bytes(8, "little")
                  + seed.to_bytes(7, "little") for index in range(SLOTS)]
        for slot, value in enumerate(hashes):
            store.memory[slot] = content(value)
        ended = list[TransferResult]()
        files._do(Transfer(
            transfer_id=number, kind="write", slots=array("i", range(SLOTS)),
            file=file_name(KEY, hashes[-1]), hashes=b"".join(hashes)), ended.append)
        assert not ended[0].failure, ended
        os.write(done, b".")
        number += 1


def check(folder: Path) -> int:
    """Read everything; the number of whole files. Others must be parts, which go."""
    files, store = make_files(folder)
    assert not list(folder.glob("*.part")), "the folder's new owner deletes them"
    runs, bad = scan(folder)
    assert not bad, bad
    for run in runs:
        ended = list[TransferResult]()
        files._do(Transfer(
            transfer_id=0, kind="read", slots=array("i", range(SLOTS)), file=run.name,
            hashes=b"".join(run.hashes)), ended.append)
        assert not ended[0].failure, ended
        for slot, value in enumerate(run.hashes):
            assert (store.memory[slot] == content(value)).all(), run.name
    return len(runs)


def is_refused(folder: Path) -> bool:
    """Whether somebody else has the folder."""
    try:
        KvFolder(folder).close()
    except LongspanError as error:
        return "in use by process" in str(error)
    return False


def main() -> None:
    """Kill and look, again and again."""
    folder, rng, num_parts = Path(sys.argv[1]), random.Random(int(sys.argv[2])), 0
    for turn in range(TIMES):
        told, done = os.pipe()
        pid = forked(lambda turn=turn, done=done: write(folder, turn, done))  # type: ignore[misc]
        os.read(told, 1)
        assert is_refused(folder), "another process owns it"
        time.sleep(rng.uniform(0.0, 0.03))
        os.kill(pid, signal.SIGKILL)
        os.close(told)
        os.close(done)
        os.waitpid(pid, 0)
        num_parts += bool(list(folder.glob("*.part")))
        _, status = os.waitpid(forked(lambda: print(check(folder), flush=True)), 0)
        assert status == 0, status
    print("killed while writing:", num_parts)


if __name__ == "__main__":
    main()
