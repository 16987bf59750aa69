"""Headers of KV files: what is ours and whole, and nothing else."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from longspan.engine.kv_file import (
    BadFileError,
    file_name,
    index_of,
    make_header,
    max_file_bytes,
    read_header,
    scan,
)

KEY = bytes(range(16))
HASHES = [bytes([value] * 16) for value in (1, 2, 3)]
TENSORS = {"k": ("BF16", (2, 4, 1, 8)), "v": ("BF16", (2, 4, 1, 8)), "k_mean": ("F32", (2, 1, 8))}
BLOCK_BYTES = 2 * 2 * 64 + 64


def write(folder: Path, *, key: bytes = KEY, name: str | None = None) -> Path:
    """A whole file of three blocks."""
    header = make_header(key, HASHES, b"p" * 16, [7, 8, 9], TENSORS)
    file = folder / (name or file_name(key, HASHES[-1]))
    file.write_bytes(header + os.urandom(3 * BLOCK_BYTES))
    return file


def test_a_header_says_what_was_written(tmp_path: Path) -> None:
    file = write(tmp_path)
    run = read_header(file)
    assert (run.key, run.hashes, run.parent) == (KEY, tuple(HASHES), b"p" * 16)
    assert run.checksums == (7, 8, 9)
    assert run.tensors == {name: (dtype, (3, *shape)) for name, (dtype, shape) in TENSORS.items()}
    assert run.num_bytes == file.stat().st_size <= max_file_bytes(3, BLOCK_BYTES)
    assert run.data_start + 3 * sum(run.part_bytes()) == run.num_bytes
    assert run.data_start % 8 == 0, "as safetensors wants it"


def test_any_changed_bit_of_a_header_is_noticed(tmp_path: Path) -> None:
    file = write(tmp_path)
    whole, size = file.read_bytes(), read_header(file).data_start
    rng = random.Random(3)
    for place in [*range(8), *rng.sample(range(8, size), 200)]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        try:
            read_header(file)
        except BadFileError:
            continue
        assert whole[place:place + 1] == b" ", "spaces at the end carry nothing"


@pytest.mark.parametrize("length", [0, 1, 8, 40, 500, -1, -BLOCK_BYTES])
def test_truncated_and_lengthened_files_are_refused(tmp_path: Path, length: int) -> None:
    file = write(tmp_path)
    whole = file.read_bytes()
    for content in (whole[:length], whole + whole[:length]):
        if content != whole:
            file.write_bytes(content)
            with pytest.raises(BadFileError):
                read_header(file)


def test_other_files_are_refused_and_left_alone(tmp_path: Path) -> None:
    foreign = tmp_path / "model.safetensors"
    foreign.write_bytes((2).to_bytes(8, "little") + b"{}")
    renamed = write(tmp_path, name=file_name(b"x" * 16, HASHES[-1]))
    (tmp_path / "notes.txt").write_text("mine")
    good = write(tmp_path)
    runs, bad = scan(tmp_path)
    assert [run.name for run in runs] == [good.name]
    assert bad.keys() == {foreign.name, renamed.name}
    assert "another file's" in bad[renamed.name]
    names = {run.name: run.hashes for run in index_of(tmp_path, KEY)}
    assert names == {good.name: tuple(HASHES), renamed.name: ()}, "it takes room, and is deleted"
    assert index_of(tmp_path, b"o" * 16)[-1].hashes == ()
    assert index_of(tmp_path / "missing", KEY) == []


def test_files_come_in_the_order_of_their_use(tmp_path: Path) -> None:
    for age, name in enumerate("abc"):
        os.utime(write(tmp_path, key=name.encode() * 16), (1000 - age, 1000 - age))
    assert [run.key[:1] for run in scan(tmp_path)[0]] == [b"c", b"b", b"a"]


def test_only_files_are_read_whatever_else_bears_their_names(tmp_path: Path) -> None:
    """A pipe would be waited on for ever."""
    kept = write(tmp_path)
    os.mkfifo(tmp_path / file_name(KEY, b"f" * 16))
    (tmp_path / file_name(KEY, b"d" * 16)).mkdir()
    (tmp_path / file_name(KEY, b"l" * 16)).symlink_to(tmp_path / "nowhere")
    runs, bad = scan(tmp_path)
    assert [run.name for run in runs] == [kept.name] and not bad
    assert [run.name for run in index_of(tmp_path, KEY)] == [kept.name]


def test_a_file_that_its_engine_deletes_meanwhile_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    gone = write(tmp_path)
    monkeypatch.setattr("longspan.engine.kv_file.list_files", lambda *_: [gone.name])
    gone.unlink()
    assert scan(tmp_path) == ([], {})
