"""KV files on disk: written whole or not at all, and used only when all about them is right."""

from __future__ import annotations

import gc
import logging
import os
import random
import resource
import subprocess
import sys
import threading
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from longspan.attention.cache import allocate_cache
from longspan.engine.device import block_files
from longspan.engine.device.block_files import BlockFiles
from longspan.engine.device.block_store import BlockStore
from longspan.engine.device.file_reader import FileReader
from longspan.engine.kv_file import LOCK, KvFolder, file_name
from longspan.engine.transfer import Transfer, TransferResult
from longspan.errors import LongspanError

KEY = b"k" * 16
HASHES = [bytes([value] * 16) for value in (1, 2, 3)]
NAME = file_name(KEY, HASHES[-1])


class Disk:
    """Files in a folder, and the slots that they are written from and read to."""

    def __init__(self, folder: Path, key: bytes = KEY, *, means: bool = True) -> None:
        self.caches = [allocate_cache(
            num_blocks=4, block_size=8, num_kv_heads=2, head_dim=6, dtype=torch.bfloat16,
            device="cpu", means=means) for _ in range(2)]
        self.store = BlockStore(self.caches, 6)
        self.files = BlockFiles(KvFolder(folder), key, self.store)

    def do(self, kind: str, slots: list[int], hashes: list[bytes], file: str = NAME) -> str:
        """Do a transfer; why it failed."""
        ended, done = list[TransferResult](), threading.Event()

        def on_end(result: TransferResult) -> None:
            ended.append(result)
            done.set()

        self.files.submit(Transfer(
            transfer_id=0, kind=kind, slots=array("i", slots),  # type: ignore[arg-type]
            file=file, hashes=b"".join(hashes)), on_end)
        assert done.wait(10)
        return ended[0].failure


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    found = Disk(tmp_path)
    found.store.memory.random_()
    yield found
    found.files.close()


def test_blocks_come_back_bit_for_bit(disk: Disk, tmp_path: Path) -> None:
    before = disk.store.memory.clone()
    assert disk.do("write", [4, 0, 2], HASHES) == ""
    assert (tmp_path / NAME).stat().st_mode & 0o777 == 0o600
    disk.store.memory.zero_()
    assert disk.do("read", [1, 3], [HASHES[2], HASHES[0]]) == ""
    assert torch.equal(disk.store.memory[1], before[2])
    assert torch.equal(disk.store.memory[3], before[4])
    assert not disk.store.memory[[0, 2, 4, 5]].any()


def test_files_are_safetensors(disk: Disk, tmp_path: Path) -> None:
    assert disk.do("write", [4, 0, 2], HASHES) == ""
    with safe_open(tmp_path / NAME, "pt") as opened:
        keys = opened.get_tensor("k")
        means = opened.get_tensor("v_mean")
        assert opened.metadata()["format"] == "longspan-kv"
    assert (keys.shape, keys.dtype) == ((3, 2, 8, 2, 6), torch.bfloat16)
    assert means.shape == (3, 2, 2, 6)
    assert keys[1].view(torch.uint8).flatten().tolist() == disk.store.memory[0][:keys[1].nbytes
                                                                                ].tolist()


def test_any_flipped_bit_is_noticed(disk: Disk, tmp_path: Path) -> None:
    assert disk.do("write", [4, 0, 2], HASHES) == ""
    file, rng = tmp_path / NAME, random.Random(1)
    whole = file.read_bytes()
    for place in rng.sample(range(len(whole)), 150):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        assert disk.do("read", [1, 3, 5], HASHES) or whole[place:place + 1] == b" "


def test_the_disk_has_reads_while_blocks_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two readers, three blocks of four parts: all are read before the first check ends."""
    monkeypatch.setattr(block_files, "MAX_HELPERS", 2)
    monkeypatch.setattr(block_files, "PIECE_BYTES", 0)
    num_read, all_read, read, crc32 = list[int](), threading.Event(), FileReader.read, zlib.crc32

    def note_read(reader: FileReader, target: memoryview, offset: int) -> None:
        read(reader, target, offset)
        num_read.append(offset)
        if len(num_read) == 12:
            all_read.set()

    def check(data: memoryview, value: int = 0) -> int:
        assert all_read.wait(5)
        return crc32(data, value)

    disk = Disk(tmp_path)
    disk.store.memory.random_()
    assert disk.do("write", [4, 0, 2], HASHES) == ""
    monkeypatch.setattr(FileReader, "read", note_read)
    monkeypatch.setattr("zlib.crc32", check)
    assert disk.do("read", [1, 3, 5], HASHES) == ""
    assert torch.equal(disk.store.memory[[4, 0, 2]], disk.store.memory[[1, 3, 5]])
    disk.files.close()


def test_truncated_foreign_missing_and_other_files_are_not_used(
    disk: Disk, tmp_path: Path,
) -> None:
    assert disk.do("write", [4, 0, 2], HASHES) == ""
    file = tmp_path / NAME
    whole = file.read_bytes()
    for content in (whole[:-1], whole[:100], b"", b"hello" * 1000, whole + b"\0"):
        file.write_bytes(content)
        assert disk.do("read", [1], HASHES[:1])
    file.write_bytes(whole)
    assert "other blocks" in disk.do("read", [1], [b"z" * 16])
    file.unlink()
    assert "No such file" in disk.do("read", [1], HASHES[:1])
    file.mkdir()
    assert disk.do("read", [1], HASHES[:1]) and disk.do("write", [1, 2, 3], HASHES)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("other", [{"key": b"o" * 16}, {"means": False}], ids=str)
def test_another_engines_file_is_not_used(
    disk: Disk, tmp_path: Path, other: dict[str, bytes | bool],
) -> None:
    assert disk.do("write", [4, 0, 2], HASHES) == ""
    disk.files.close()
    theirs = Disk(tmp_path, **other)  # type: ignore[arg-type]
    assert theirs.do("read", [1], HASHES[:1])
    theirs.files.close()


def test_a_full_disk_leaves_nothing_behind(
    disk: Disk, tmp_path: Path, caplog: pytest.LogCaptureFixture,
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with caplog.at_level(logging.WARNING):
            assert disk.do("write", [4, 0, 2], HASHES) == os.strerror(27)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written" in caplog.text
    assert [item.name for item in tmp_path.iterdir()] == [LOCK]
    assert disk.do("write", [4, 0, 2], HASHES) == "", "it goes on when there is room"


def test_use_is_noted_in_order_whatever_the_clock_says(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = [file_name(KEY, value) for value in HASHES]
    for name, value in zip(names, HASHES, strict=True):
        assert disk.do("write", [0], [value], name) == ""
        monkeypatch.setattr("time.time", lambda: 1e9)
    assert disk.do("read", [1], HASHES[:1], names[0]) == ""
    times = [(tmp_path / name).stat().st_mtime for name in names]
    assert times[1] < times[2] < times[0]
    disk.files.close()
    later = Disk(tmp_path)  # the clock is still behind
    assert later.do("read", [1], HASHES[1:2], names[1]) == ""
    assert (tmp_path / names[1]).stat().st_mtime > times[0]
    later.files.close()


def test_a_folder_has_one_owner_and_loses_what_was_left_half_written(tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(b"half")
    folder = KvFolder(tmp_path)
    assert not list(tmp_path.glob("*.part"))
    with pytest.raises(LongspanError, match=f"in use by process {os.getpid()}"):
        KvFolder(tmp_path)
    folder.close()
    KvFolder(tmp_path).close()


def test_other_peoples_things_in_the_folder_stay_and_do_no_harm(tmp_path: Path) -> None:
    """Browsers name unfinished downloads ``.part`` too."""
    (tmp_path / "film.mkv.part").write_bytes(b"half")
    (tmp_path / f"{NAME}.part").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    Disk(tmp_path).files.close()
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(
        ["film.mkv.part", f"{NAME}.part", "link", "longspan.lock"])


def test_processes_killed_while_they_write_leave_whole_files_only(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.device.kv_writer", str(tmp_path), "11"],
        capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stdout + done.stderr
    *counts, last = done.stdout.splitlines()
    assert len(counts) == 20 and int(counts[-1]) >= 20
    assert int(last.split(":")[1]) > 3, "some were killed in the middle of a file"


def test_a_damaged_file_is_given_back(tmp_path: Path) -> None:
    """Its descriptors and its mapping, at once: a deleted file takes room while they are there."""
    disk = Disk(tmp_path)
    disk.store.memory.random_()
    assert disk.do("write", [4, 0, 2], HASHES) == ""
    file = Path(disk.files._folder.path) / NAME
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    gc.collect()
    gc.disable()
    try:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            assert "damaged" in disk.do("read", [1, 3, 5], HASHES)
        assert len(os.listdir("/proc/self/fd")) == before
        assert NAME not in Path("/proc/self/maps").read_text()
    finally:
        gc.enable()
    disk.files.close()
