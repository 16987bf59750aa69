"""Text files: what is read, and one line for each reason why a file is not."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from longspan.errors import LongspanError
from longspan.text_files import read_standard_input, read_text


def test_text_is_read_as_it_stands(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("é\r\nb\r".encode())
    assert read_text(file) == read_text(file, max_bytes=6) == "é\r\nb\r"


def test_each_reason_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"caf\xe9 noir")
    for path, limit, message in (
        (tmp_path / "none", None, f"{tmp_path}/none: no such file"),
        (tmp_path, 1, f"{tmp_path} is a directory; name a text file"),
        (tmp_path / ("x" * 300), None, f"{tmp_path}/{'x' * 300}: File name too long"),
        (file, 8, f"{file}: 9 bytes, at most 8 are read; split it"),
        (file, 9, f"{file}: not UTF-8 text (byte 0xe9 at offset 3); convert it first, for example "
                  "with iconv"),
    ):
        with pytest.raises(LongspanError) as error:
            read_text(path, limit)
        assert str(error.value) == message


def test_standard_input_has_the_same_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("é".encode() + b"\xff")))
    with pytest.raises(LongspanError, match="^standard input: not UTF-8 .* at offset 2"):
        read_standard_input()
