"""Small PDF and Word files for tests."""

from __future__ import annotations

from pathlib import Path

import docx


def pdf_bytes(*pages: str) -> bytes:
    """A PDF of one line of text a page."""
    kids = " ".join(f"{4 + 2 * index} 0 R" for index in range(len(pages)))
    bodies = ["<< /Type /Catalog /Pages 2 0 R >>",
              f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
              "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    for index, text in enumerate(pages):
        stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET"
        bodies += [f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents "
                   f"{5 + 2 * index} 0 R /Resources << /Font << /F1 3 0 R >> >> >>",
                   f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream"]
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(bodies, 1):
        places.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n".encode()
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    return out + (f"xref\n0 {len(bodies) + 1}\n0000000000 65535 f \n{table}trailer\n"
                  f"<< /Size {len(bodies) + 1} /Root 1 0 R >>\nstartxref\n{len(out)}\n%%EOF\n"
                  ).encode()


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
