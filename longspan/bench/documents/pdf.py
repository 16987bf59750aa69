"""A PDF of plain text, without a library: what a reader of documents is tried with."""

from __future__ import annotations

import textwrap

LINE = 84
"""Characters of a line on a page."""


def pdf_bytes(*pages: str) -> bytes:
    """Make a PDF of some pages of ASCII text."""
    kids = " ".join(f"{4 + 2 * index} 0 R" for index in range(len(pages)))
    bodies = ["<< /Type /Catalog /Pages 2 0 R >>",
              f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
              "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    for index, text in enumerate(pages):
        lines = [line for part in text.split("\n") for line in textwrap.wrap(part, LINE) or [""]]
        shown = " T* ".join(f"({_escaped(line)}) Tj" for line in lines)
        stream = f"BT /F1 11 Tf 14 TL 72 720 Td {shown} ET"
        bodies += [f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents "
                   f"{5 + 2 * index} 0 R /Resources << /Font << /F1 3 0 R >> >> >>",
                   f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream"]
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(bodies, 1):
        places.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n".encode("ascii")
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    return out + (f"xref\n0 {len(bodies) + 1}\n0000000000 65535 f \n{table}trailer\n"
                  f"<< /Size {len(bodies) + 1} /Root 1 0 R >>\nstartxref\n{len(out)}\n%%EOF\n"
                  ).encode()


def _escaped(line: str) -> str:
    return line.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)")
