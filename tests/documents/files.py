"""A small Word file for tests."""

from __future__ import annotations

from pathlib import Path

import docx


def write_word(file: Path) -> None:
    """A Word file with a heading, a paragraph, a table and a last paragraph."""
    document = docx.Document()
    document.add_heading("Whales", level=2)
    document.add_paragraph("Seen from the Ada.")
    table = document.add_table(rows=2, cols=2)
    for cell, text in zip((c for row in table.rows for c in row.cells),
                          ("day", "count", "1", "7\n8"), strict=True):
        cell.text = text
    document.add_paragraph("The end.")
    document.save(str(file))
