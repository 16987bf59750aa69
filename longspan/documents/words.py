"""Words of a text in any language, as a search compares them, and where they stand."""

from __future__ import annotations

import re
from collections.abc import Iterator

_WORD = re.compile(r"[^\W_]+")
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]")
"""Scripts that put no spaces between words."""


def words_at(text: str) -> Iterator[tuple[str, int, int]]:
    """Yield each word in small letters, its first character and the one behind it; of scripts
    without spaces, pairs of characters.

    Plural endings go, so that a question finds its answer; names of code are cut at underscores.
    """
    for match in _WORD.finditer(text):
        word, start, stop = match[0].lower(), match.start(), match.end()
        if _UNSPACED.search(word):
            for place in range(start, max(start + 1, stop - 1)):
                yield text[place : min(place + 2, stop)].lower(), place, min(place + 2, stop)
        else:
            yield word[:-1] if len(word) > 3 and word.endswith("s") else word, start, stop


def words(text: str) -> list[str]:
    """Return the words alone."""
    return [word for word, _, _ in words_at(text)]
