"""Appended lines: whole or not there, one writer."""

from __future__ import annotations

from pathlib import Path

import pytest

from longspan.data.lines import Lines, count_lines, dump, read_lines
from longspan.errors import LongspanError


def test_a_torn_line_is_taken_away(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    whole = "".join(dump({"i": i, "text": "ü" * i}) + "\n" for i in range(3)).encode()
    for torn in (b"", b'{"i"', b'{"i": 9}', b"x" * 3_000_000):
        file.write_bytes(whole + torn)
        assert count_lines(file) == 3 == len(list(read_lines(file)))
        with Lines(file) as lines:
            lines.append(dump({"i": 3}))
        assert [row["i"] for row in read_lines(file)] == [0, 1, 2, 3]
    file.write_bytes(b"no line end")
    with Lines(file):
        assert file.read_bytes() == b""
    assert list(read_lines(tmp_path / "none")) == [] and count_lines(tmp_path / "none") == 0


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with Lines(tmp_path / "a"), pytest.raises(LongspanError, match="another run is writing"):
        Lines(tmp_path / "a").__enter__()


def test_what_is_no_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_text('{"i": 1}\nnothing\n{"i": 2}\n')
    with pytest.raises(LongspanError, match="a, line 2: no JSON object"):
        list(read_lines(tmp_path / "a"))
    with pytest.raises(LongspanError, match="cannot be written"):
        Lines(tmp_path / "a" / "b").__enter__()
