"""Visible text of HTML pages, and how much of a text is tags."""

from __future__ import annotations

import re
from html.parser import HTMLParser

_SKIP_TAGS = frozenset({"script", "style", "head", "nav", "svg"})
_BLOCK_TAGS = frozenset({"p", "div", "li", "tr", "h1", "h2", "h3", "h4", "pre", "br", "dt", "dd"})
_TAG = re.compile(r"</?[A-Za-z][\w:.-]*(?:\s[^<>\n]{0,300})?/?>|&[a-z]{2,8};")


class _TextExtractor(HTMLParser):
    """Collects the visible text of an HTML page, one block element per line."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self._skipped = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in _SKIP_TAGS:
            self._skipped += 1
        elif tag in _BLOCK_TAGS:
            self.pieces.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in _SKIP_TAGS:
            self._skipped = max(0, self._skipped - 1)

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.pieces.append(data)


def html_to_text(page: str) -> str:
    """Visible text of an HTML page with runs of blank lines collapsed."""
    parser = _TextExtractor()
    parser.feed(page)
    lines = [line.rstrip() for line in "".join(parser.pieces).splitlines()]
    kept = [a for a, b in zip(lines, ["x", *lines], strict=False) if a or b]
    return "\n".join(kept)


def markup_share(text: str) -> float:
    """Share of the characters that are tags and entities."""
    return sum(len(tag) for tag in _TAG.findall(text)) / max(1, len(text))
