"""The text of one file, by its kind: plain text and code, HTML, PDF, Word, any text in gzip."""

from __future__ import annotations

import gzip
import logging
import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import BadZipFile

from longspan.documents.files import HEAD, decode, refuse_binary, unreadable
from longspan.documents.markup import html_to_text

if TYPE_CHECKING:
    from docx.table import Table
    from docx.text.paragraph import Paragraph

PDF, WORD = ".pdf", ".docx"
HTML = (".html", ".htm", ".xhtml")
INSTALL = "pip install 'longspan[documents]'"
PDF_MARK = b"%PDF-"
# The readers of both formats answer a damaged file with whatever error its damage leads to.
_DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError,
            ArithmeticError, SyntaxError, NotImplementedError, struct.error, zlib.error, BadZipFile)


class UnreadableError(Exception):
    """A file holds no text that can be read; the message is the reason, in a few words."""


def read_file(path: Path) -> tuple[str, int]:
    """Return the text of a file and the bytes that it was read from.

    Raises `UnreadableError`: binary, not UTF-8, damaged, or of a kind whose reader is not
    installed.
    """
    suffix = path.suffix.lower()
    try:
        with path.open("rb") as file:  # once: what comes through a pipe comes no second time
            head = file.read(HEAD)
            is_pdf = suffix == PDF or suffix != WORD and head.startswith(PDF_MARK)
            if not is_pdf and suffix != WORD:
                refuse_binary(head, suffix)
            data = head + file.read()
        text = _text_of(data, Path(path.name.lower()), is_pdf=is_pdf)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UnreadableError(unreadable(error)) from None
    return text, len(data)


def _text_of(data: bytes, name: Path, *, is_pdf: bool) -> str:
    if not data:
        return ""
    if is_pdf:
        return _pdf_text(data)
    if name.suffix == WORD:
        return _word_text(data)
    is_packed = name.suffix == ".gz"
    text = decode(gzip.decompress(data) if is_packed else data)
    return html_to_text(text) if (name.stem if is_packed else name.name).endswith(HTML) else text


def _pdf_text(data: bytes) -> str:
    try:
        from pypdf import PdfReader
        from pypdf.errors import PyPdfError
    except ImportError:
        raise UnreadableError(f"PDF, which needs {INSTALL}") from None
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # of oddities that it reads all the same
    try:
        reader = PdfReader(BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise UnreadableError("PDF with a password")
        text = "\n\n".join(page.extract_text().strip() for page in reader.pages)
    except ImportError:  # a cipher of a further package
        raise UnreadableError("PDF with encryption that cannot be read here") from None
    except (PyPdfError, *_DAMAGED):
        raise UnreadableError("damaged PDF") from None
    if not text.strip():
        raise UnreadableError("PDF without text (a scan?)")
    return text.encode("utf-8", "replace").decode()  # its fonts may name half characters


def _word_text(data: bytes) -> str:
    try:
        import docx
        from docx.opc.exceptions import OpcError
        from docx.table import Table
    except ImportError:
        raise UnreadableError(f"Word, which needs {INSTALL}") from None
    try:
        parts = [_word_table(part) if isinstance(part, Table) else _word_paragraph(part)
                 for part in docx.Document(BytesIO(data)).iter_inner_content()]
    except (OpcError, *_DAMAGED):
        raise UnreadableError("damaged Word file") from None
    return "\n\n".join(part for part in parts if part.strip())


def _word_paragraph(paragraph: Paragraph) -> str:
    style = paragraph.style.name if paragraph.style else None
    kind, _, level = (style or "").partition(" ")
    is_heading = kind == "Heading" and level.isdigit()
    return f"{'#' * int(level)} {paragraph.text}" if is_heading else paragraph.text


def _word_table(table: Table) -> str:
    return "\n".join("| " + " | ".join(" ".join(cell.text.split()) for cell in row.cells) + " |"
                     for row in table.rows)
