"""The text of a file by its kind, or the reason why there is none."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from pathlib import Path
from threading import Thread

import pytest
from pypdf import PdfReader, PdfWriter

from longspan.bench.documents.pdf import pdf_bytes
from longspan.documents.formats import UnreadableError, read_file
from tests.documents.files import write_word


def text_of(file: Path, data: bytes) -> str:
    file.write_bytes(data)
    return read_file(file)[0]


def reason(file: Path, data: bytes) -> str:
    file.write_bytes(data)
    with pytest.raises(UnreadableError) as error:
        read_file(file)
    return str(error.value)


def test_text_is_read_in_the_encodings_that_say_what_they_are(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    for data in (b"caf\xc3\xa9\n", b"\xef\xbb\xbfcaf\xc3\xa9\n", "caf\u00e9\n".encode("utf-16")):
        assert text_of(file, data) == "caf\u00e9\n"
    assert text_of(tmp_path / "a.txt.gz", gzip.compress(b"packed")) == "packed"


@pytest.mark.parametrize(("name", "data", "why"), [
    ("a.txt", b"caf\xe9 noir", "not UTF-8"), ("a.jpg", b"\xff\xd8\0\0", "binary"),
    ("a.py", b"x" * 9000 + b"\0", "binary"), ("a.gz", b"\x1f\x8b\x08nothing", "cannot be read"),
    ("a.pdf", b"%PDF-1.4\nnothing", "damaged PDF"), ("a.pdf", b"x", "damaged PDF"),
    ("a.pdf", pdf_bytes(""), "PDF without text (a scan?)"),
    ("a.docx", b"PK\x03\x04 nothing", "damaged Word file"), ("a.docx", b"x", "damaged Word file"),
])
def test_each_reason(tmp_path: Path, name: str, data: bytes, why: str) -> None:
    assert reason(tmp_path / name, data) == why


def test_pages_of_html_without_their_tags(tmp_path: Path) -> None:
    page = b"<html><head><title>x</title></head><body><p>One &amp; two</p><script>y</script>"
    assert text_of(tmp_path / "a.HTML", page).strip() == "One & two"


def test_pages_of_a_pdf(tmp_path: Path) -> None:
    data = pdf_bytes("On day 1 the Ada left.", "On day 2 it sank.")
    for name in ("a.pdf", "a.PDF", "a", "a.txt"):  # by its beginning, where the name does not tell
        assert text_of(tmp_path / name, data) == "On day 1 the Ada left.\n\nOn day 2 it sank."


def test_what_comes_through_a_pipe_is_read_whole(tmp_path: Path) -> None:
    """As ``--document <(command)`` gives it: a second look would find the beginning gone."""
    whole = "".join(f"{number} whales\n" for number in range(5000))
    for name, data, text in (("a", whole.encode(), whole), ("b", pdf_bytes("one"), "one")):
        os.mkfifo(tmp_path / name)
        writer = Thread(target=(tmp_path / name).write_bytes, args=(data,), daemon=True)
        writer.start()
        assert read_file(tmp_path / name) == (text, len(data))
        writer.join()


def test_an_empty_file_of_any_kind_is_no_damage(tmp_path: Path) -> None:
    for name in ("a.txt", "a.pdf", "a.docx", "a.gz", "a.html"):
        assert text_of(tmp_path / name, b"") == ""


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9])
def test_a_torn_pdf_is_text_or_a_reason(tmp_path: Path, share: float) -> None:
    data = pdf_bytes("one", "two", "three")
    file = tmp_path / "a.pdf"
    file.write_bytes(data[: int(share * len(data))])
    try:
        assert read_file(file)[0]
    except UnreadableError as error:
        assert "PDF" in str(error)


def test_a_pdf_with_a_password(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(pdf_bytes("secret"))
    writer = PdfWriter(clone_from=PdfReader(tmp_path / "a.pdf"))
    writer.encrypt("sesame", algorithm="RC4-128")
    writer.write(tmp_path / "b.pdf")
    with pytest.raises(UnreadableError, match="PDF with a password"):
        read_file(tmp_path / "b.pdf")


def test_a_word_file_in_its_order(tmp_path: Path) -> None:
    write_word(tmp_path / "a.docx")
    assert read_file(tmp_path / "a.docx")[0] == (
        "## Whales\n\nSeen from the Ada.\n\n| day | count |\n| 1 | 7 8 |\n\nThe end.")


@pytest.mark.parametrize(("name", "package"), [("a.pdf", "pypdf"), ("a.docx", "docx")])
def test_without_the_extra_the_reason_says_what_to_install(
    tmp_path: Path, name: str, package: str
) -> None:
    (tmp_path / name).write_bytes(pdf_bytes("x"))
    code = (f"import sys; sys.modules[{package!r}] = None\nfrom pathlib import Path\n"
            "from longspan.documents.formats import UnreadableError, read_file\n"
            f"try: read_file(Path({str(tmp_path / name)!r}))\n"
            "except UnreadableError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "needs pip install 'longspan[documents]'" in done.stdout
