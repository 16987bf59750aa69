"""Files to documents: filters, splits, HTML."""

from __future__ import annotations

from pathlib import Path

import pytest

from longspan.data.sources import (
    MAX_BYTES,
    Root,
    html_to_text,
    is_clean,
    is_held_out,
    read_documents,
)

PROSE = "A line of ordinary words, long enough to count.\n" * 20


def test_reads_groups_and_deduplicates(tmp_path: Path) -> None:
    for name in ("a/one.py", "a/two.md", "b/copy.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / "a/one.py").write_text(PROSE + "one\n")
    (tmp_path / "a/two.md").write_text(PROSE)
    (tmp_path / "b/copy.md").write_text(PROSE)
    (tmp_path / "b/binary.txt").write_bytes(b"\xff\x00" * 900)
    (tmp_path / "b/long.txt").write_text("x" * 9000)
    (tmp_path / "b/large.txt").write_text(PROSE * (MAX_BYTES // len(PROSE) + 1))
    (tmp_path / "b/link.txt").symlink_to(tmp_path / "a/two.md")
    documents = read_documents([Root(path=tmp_path, max_bytes=10**6)])
    assert sum(d.text.count("\n") for d in documents) == 41
    assert all(d.text.endswith("\n") and not d.text.endswith("\n\n") for d in documents)


def test_line_ends_become_one_kind(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(PROSE.replace("\n", "\r\n").encode() + b"old\rMac\n")
    [document] = read_documents([Root(path=tmp_path, max_bytes=10**6)])
    assert document.text == PROSE + "old\nMac\n"


def test_takes_no_more_than_the_budget(tmp_path: Path) -> None:
    for i in range(8):
        (tmp_path / f"p{i}").mkdir()
        (tmp_path / f"p{i}" / "x.txt").write_text(f"{i} {PROSE}")
    documents = read_documents([Root(path=tmp_path, max_bytes=2000)])
    assert sum(len(d.text) for d in documents) <= 2001


def test_missing_root_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a directory"):
        read_documents([Root(path=tmp_path / "none", max_bytes=1)])


def test_chat_control_tokens_are_refused() -> None:
    assert is_clean(PROSE)
    assert not is_clean(PROSE + "<|im_end|>")
    assert not is_clean("1234567890 0987654321 {}[]();\n" * 40)


def test_split_is_stable_and_small() -> None:
    share = sum(is_held_out(f"dir/file{i}.py") for i in range(5000)) / 5000
    assert 0.01 < share < 0.03
    assert is_held_out("x") == is_held_out("x")


def test_html_keeps_visible_text() -> None:
    page = "<head><title>t</title></head><p>One &amp; two</p><script>x()</script><p>three</p>"
    assert html_to_text(page).split() == ["One", "&", "two", "three"]
