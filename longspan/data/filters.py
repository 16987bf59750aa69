"""Which texts are worth training on: length, markup, lines, scripts, compressibility."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from longspan.data.duplicates import Duplicates
from longspan.documents.markup import markup_share

_MIN_JUDGED = 1000
"""Shorter texts are not judged by their compressibility: hardly any of them can be compressed."""
_SAMPLE = 1_000_000
"""Characters that are compressed, and from which shares are taken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Filters:
    """What a text must be; the defaults keep prose and code in any language."""

    min_chars: int = 200
    max_chars: int | None = None
    max_markup: float = 0.3
    """Share of characters in tags."""
    min_compressed: float = 0.04
    """Size after zlib; below, a text says the same over and over."""
    max_compressed: float = 0.75
    """Above, it is noise: encoded binaries, keys, random digits."""
    near_duplicate: float | None = 0.8
    """Share of runs of 24 bytes in common with an earlier text; None: only exact duplicates."""
    min_ascii: float = 0.0
    """Share of printable ASCII characters."""
    min_letters: float = 0.0
    """Share of letters and spaces."""
    max_mean_line: float | None = None
    """Characters."""


class Refusal:
    """Says why a text is refused; remembers texts, to know duplicates."""

    def __init__(self, filters: Filters) -> None:
        self.filters = filters
        self._duplicates = Duplicates(filters.near_duplicate)

    def __call__(self, text: str) -> str | None:
        """Return the reason in words, or None for a text that is kept."""
        return self._length(text) or self._content(text) or self._duplicates.find(text)

    def _length(self, text: str) -> str | None:
        filters = self.filters
        if len(text) < filters.min_chars:
            return f"shorter than {filters.min_chars:,} characters"
        if filters.max_chars is not None and len(text) > filters.max_chars:
            return f"longer than {filters.max_chars:,} characters"
        if filters.max_mean_line and len(text) > filters.max_mean_line * (text.count("\n") + 1):
            return f"lines longer than {filters.max_mean_line:g} characters"
        return None

    def _content(self, text: str) -> str | None:
        filters, sample = self.filters, text[:_SAMPLE]
        if markup_share(sample) > filters.max_markup:
            return "mostly markup"
        if filters.min_ascii and ascii_share(sample) < filters.min_ascii:
            return f"less than {filters.min_ascii:.0%} ASCII"
        if filters.min_letters and letter_share(sample) < filters.min_letters:
            return f"less than {filters.min_letters:.0%} letters"
        if len(sample) < _MIN_JUDGED:
            return None
        ratio = compressed_share(sample)
        if ratio < filters.min_compressed:
            return "repeats itself"
        return "noise" if ratio > filters.max_compressed else None


def compressed_share(text: str) -> float:
    """Size after zlib over size before."""
    data = text.encode()
    return len(zlib.compress(data, 6)) / max(1, len(data))


def ascii_share(text: str) -> float:
    """Share of characters that are printable ASCII, line ends or tabs."""
    return sum(c.isascii() and (c.isprintable() or c in "\n\t") for c in text) / max(1, len(text))


def letter_share(text: str) -> float:
    """Share of characters that are letters of any script, or spaces."""
    return sum(c.isalpha() or c == " " for c in text) / max(1, len(text))
