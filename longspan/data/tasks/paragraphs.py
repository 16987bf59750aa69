"""Documents cut to paragraphs, and the marks that the report's tasks are written with."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from longspan.data.draft import Draft
from longspan.data.source import Source
from longspan.data.tokens import Kind, TokenTable

END = "End"
_FRAMES = ("### {}", "[{}]", "== {} ==", "<{}>", "--- {} ---", "{}:", "## {}", "*** {} ***",
           "// {}", "({})")
LOW_LEN, HIGH_LEN = 24, 160
"""Tokens of a paragraph, about."""
MIN_PARAGRAPHS = 4


@dataclass(frozen=True, slots=True)
class Marks:
    """How a sample sets its own lines off from the text."""

    frame: str

    @classmethod
    def draw(cls, rng: random.Random, source: Source) -> Marks:
        """Return marks that a split may use."""
        return cls(rng.choice(source.wordings(_FRAMES)))

    def line(self, title: str) -> str:
        """Return a line of its own."""
        return self.frame.format(title)


def draw_paragraphs(rng: random.Random, source: Source, room: int) -> list[np.ndarray]:
    """Paragraphs of a document, ``room`` tokens at most; in a short one they are short."""
    high = max(LOW_LEN + 8, min(HIGH_LEN, room // 6))
    return split_paragraphs(rng, source.document(rng, room), source.table, high=high)


def split_paragraphs(
    rng: random.Random, ids: np.ndarray, table: TokenTable, low: int = LOW_LEN,
    high: int = HIGH_LEN,
) -> list[np.ndarray]:
    """Cut ``ids`` into paragraphs of about ``low``..``high`` tokens; nothing is lost. Less than
    ``low`` tokens at the end belong to the last one."""
    places = table.cut_places(ids)
    places = places[places <= len(ids) - low]
    cuts = [0]
    while True:
        index = int(np.searchsorted(places, cuts[-1] + rng.randrange(low, high)))
        if index >= len(places):
            break
        cuts.append(int(places[index]))
    return [ids[a:b] for a, b in zip(cuts, [*cuts[1:], len(ids)], strict=True)]


def split_evenly(ids: np.ndarray, count: int, table: TokenTable) -> list[np.ndarray]:
    """Cut ``ids`` into up to ``count`` parts of about the same length; nothing is lost."""
    places = table.cut_places(ids)
    wanted = np.arange(1, count) * len(ids) // count
    found = np.searchsorted(places, wanted)
    cuts = np.unique(places[found[found < len(places)]])
    return [part for part in np.split(ids, cuts) if len(part)]


def log_uniform(rng: random.Random, low: float, high: float) -> int:
    """Return a whole number whose logarithm is evenly spread."""
    return int(math.exp(rng.uniform(math.log(low), math.log(max(low + 1, high)))))


def starts_of(paragraphs: Sequence[np.ndarray]) -> list[int]:
    """Where each paragraph begins, counted from the first."""
    return [0, *np.cumsum([len(p) for p in paragraphs[:-1]]).tolist()]


def strip_line_end(ids: np.ndarray, table: TokenTable) -> np.ndarray:
    """Without a last token that is nothing but line ends."""
    is_break = len(ids) > 1 and table.is_blank[ids[-1]] and table.ends_newline[ids[-1]]
    return ids[:-1] if is_break else ids


def close(draft: Draft, marks: Marks) -> None:
    """Write the line after an answer."""
    draft.text((marks.line(END) + "\n", Kind.COPY))
