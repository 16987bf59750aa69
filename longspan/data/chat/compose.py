"""A text with facts at their depths, of up to so many tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from longspan.data.haystack import haystack_filler
from longspan.data.source import Source
from longspan.data.tokens import Kind, TokenTable

MIN_FILLER = 24
"""Tokens of text around facts, at least."""
TURN_LEN = 8
"""Tokens that a chat template puts around a message, about."""


def count_tokens(table: TokenTable, text: str) -> int:
    """Tokens of a text."""
    return len(table.tokenizer.encode(text, add_special_tokens=False).ids)


def bury(
    rng: random.Random, source: Source, facts: Sequence[str], haystack: str, num_tokens: int
) -> str | None:
    """Return a text of up to ``num_tokens`` tokens that has the facts, a line each, in their order;
    None where they leave no room. ``needles`` as haystack is no other text at all."""
    lines = [fact + "\n" for fact in facts]
    fixed = sum(_line_lengths(source, facts))
    if haystack == "needles":
        return "".join(lines) if fixed <= num_tokens else None
    room = num_tokens - fixed
    if room < MIN_FILLER:
        return None
    ids = haystack_filler(rng, haystack, source.corpus, source.table, room)
    places = source.table.cut_places(ids)
    depths = sorted(rng.random() for _ in lines)
    spots = [_at(places, int(depth * len(ids))) for depth in depths]
    pieces, at = [], 0
    for spot, line in zip(spots, lines, strict=True):
        pieces += [_ended(source.table.text(ids[at:spot])), line]
        at = spot
    pieces.append(source.table.text(ids[at : int(places[-1]) if len(places) else len(ids)]))
    return "".join(pieces)


def num_that_fit(source: Source, facts: Sequence[str], num_tokens: int) -> int:
    """Count the first facts that make a text of so many tokens."""
    ends = np.cumsum(_line_lengths(source, facts))
    return int(np.searchsorted(ends, num_tokens, side="right"))


def _line_lengths(source: Source, facts: Sequence[str]) -> list[int]:
    """Tokens of each fact as a line, and one for a border that is spelled otherwise."""
    lines = [((fact + "\n", Kind.TEXT),) for fact in facts]
    return [len(piece) + 1 for piece in source.table.encode(lines)]


def _ended(text: str) -> str:
    return text if not text or text.endswith("\n") else text + "\n"


def _at(places: np.ndarray, spot: int) -> int:
    """Return the first place at or after a spot, else the last one; 0 where there is none."""
    if not len(places):
        return 0
    return int(places[min(int(np.searchsorted(places, spot)), len(places) - 1)])
