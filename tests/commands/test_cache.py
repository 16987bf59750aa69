"""`longspan cache list | drop | verify`."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest

from longspan.cli import run_command
from longspan.engine.kv_file import KvFolder, file_name, make_header

TENSORS = {"k": ("F32", (2, 16, 1, 4)), "v": ("F32", (2, 16, 1, 4))}
PART = 2 * 16 * 4 * 4


def write(folder: Path, key: bytes, number: int) -> Path:
    """A whole file of two blocks."""
    hashes = [bytes([number] * 16), bytes([number + 1] * 16)]
    parts = [[bytes([number + block + tensor]) * PART for block in range(2)]
             for tensor in range(2)]
    sums = [zlib.crc32(parts[1][block], zlib.crc32(parts[0][block])) for block in range(2)]
    file = folder / file_name(key, hashes[-1])
    data = b"".join(b"".join(blocks) for blocks in parts)
    file.write_bytes(make_header(key, hashes, b"", sums, TENSORS, "some-model") + data)
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in (1, 5):
        write(tmp_path, b"a" * 16, number)
    write(tmp_path, b"b" * 16, 9)
    (tmp_path / "mine.safetensors").write_text("mine")
    return tmp_path


def test_list_shows_each_engines_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["cache", "list", str(folder)]) == 0
    out, err = capsys.readouterr()
    rows = [line.replace("|", " ").replace("│", " ").split() for line in out.splitlines()]
    assert ["616161616161", "some-model", "2", "64"] in [row[:4] for row in rows]
    assert ["626262626262", "some-model", "1", "32"] in [row[:4] for row in rows]
    assert "mine.safetensors: its name is not one of longspan's" in err


def test_a_folder_without_kv_is_left_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    """Also by ``drop``, which takes the folder for itself while it deletes."""
    for command in ("list", "drop"):
        assert run_command(["cache", command, str(tmp_path)]) == 0
        assert f"no KV files in {tmp_path.name}" in capsys.readouterr().out.replace(
            f"{tmp_path.parent}/", "")
    assert not list(tmp_path.iterdir())


def test_verify_finds_what_is_damaged(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["cache", "verify", str(folder)]) == 0
    assert "3 files with" in capsys.readouterr().out
    file = write(folder, b"c" * 16, 3)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert run_command(["cache", "verify", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert f"{file.name}: block 1 is damaged" in err and "1 damaged" in out
    file.write_bytes(content[:-1])
    assert run_command(["cache", "verify", str(folder)]) == 1
    assert "bytes, and its header speaks of" in capsys.readouterr().err


def test_drop_deletes_an_engines_files_or_all(
    folder: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_command(["cache", "drop", str(folder), "--key", ""]) == 2
    assert "--key is empty" in capsys.readouterr().err
    assert run_command(["cache", "drop", str(folder), "--key", "6262"]) == 0
    assert "1 files deleted" in capsys.readouterr().out
    assert run_command(["cache", "drop", str(folder), "--key", "6262"]) == 2
    owned = KvFolder(folder)
    assert run_command(["cache", "drop", str(folder)]) == 2
    assert "in use by process" in capsys.readouterr().err
    owned.close()
    assert run_command(["cache", "drop", str(folder)]) == 0
    assert [file.name for file in folder.glob("*.safetensors")] == ["mine.safetensors"]


@pytest.mark.parametrize("command", ["list", "drop", "verify"])
def test_a_folder_that_is_not_there_is_one_line(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_command(["cache", command, str(tmp_path / "missing")]) == 2
    assert "cannot be read: No such file or directory" in capsys.readouterr().err
