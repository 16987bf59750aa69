"""Fill in the middle: a span of a document is taken out and asked for, given both sides.

The span begins anywhere and has 8 tokens to a quarter of the document, 2,048 at most, evenly on a
logarithmic scale. Prefix or suffix comes first (PSM, SPM; Bavarian et al. 2022), with the control
tokens of the tokenizer where it has them, else between lines. Distance: from the farther border of
the gap.
"""

from __future__ import annotations

import random

import numpy as np

from longspan.data.draft import Draft, Sample
from longspan.data.source import Source
from longspan.data.tasks.paragraphs import Marks, close, log_uniform
from longspan.data.tokens import Kind

MIN_SPAN, MAX_SPAN = 8, 2048
TITLES = (
    ("Prefix", "Suffix", "Middle"), ("Before the gap", "After the gap", "The gap"),
    ("Beginning", "Ending", "Missing part"), ("First part", "Last part", "Part in between"),
    ("Text above", "Text below", "Fill in"), ("Start", "Finish", "What is missing?"),
    ("Left side", "Right side", "Insert here"), ("Part 1", "Part 3", "Part 2"),
    ("Until here", "From here", "Between both"), ("Opening", "Closing", "Body"))
_ROOM = 64
"""Tokens for marks."""


def fill_in_the_middle(rng: random.Random, source: Source, room: int) -> Sample | None:
    """Return a document with a gap, then what fills it."""
    ids = source.document(rng, room - _ROOM)
    with_control = source.table.fim_marks is not None and rng.random() < 0.5
    start, stop = _gap(rng, source, ids, with_control)
    if not 0 < start < stop < len(ids):
        return None
    prefix, middle, suffix = np.split(ids, [start, stop])
    if with_control:
        return _with_control_tokens(rng, source, prefix, middle, suffix)
    marks, titles = Marks.draw(rng, source), rng.choice(source.wordings(TITLES))
    draft, borders = Draft(source.table), []
    sides = [(titles[0], prefix), (titles[1], suffix)]
    for title, side in sides if rng.random() < 0.5 else sides[::-1]:
        draft.line(marks.line(title))
        begin = draft.natural(side)
        borders.append(begin + len(side) if side is prefix else begin)
    draft.line(marks.line(titles[2]))
    draft.answer(middle, min(borders), Kind.TEXT)
    close(draft, marks)
    return draft.sample("fim")


def _gap(
    rng: random.Random, source: Source, ids: np.ndarray, with_control: bool
) -> tuple[int, int]:
    """First and last border of the span: at words between control tokens, else where a line may
    be put."""
    table = source.table
    length = log_uniform(rng, MIN_SPAN, min(MAX_SPAN, len(ids) // 4))
    start = rng.randrange(1, max(2, len(ids) - length))
    places = table.cut_places(ids)
    if with_control:
        places = np.flatnonzero(table.starts_word[ids[1:]] & table.begins_character[ids[1:]]) + 1
    if not len(places):
        return 0, 0
    first = min(int(np.searchsorted(places, start)), len(places) - 1)
    last = int(np.searchsorted(places, places[first] + length))
    return int(places[first]), int(places[min(last, len(places) - 1)])


def _with_control_tokens(
    rng: random.Random, source: Source, prefix: np.ndarray, middle: np.ndarray, suffix: np.ndarray
) -> Sample:
    before, after, fill = (np.array([mark]) for mark in source.table.fim_marks or ())
    draft = Draft(source.table)
    parts = [(before, prefix), (after, suffix)]
    borders = []
    for mark, side in parts if rng.random() < 0.5 else parts[::-1]:
        draft.natural(mark, Kind.TEXT)
        begin = draft.natural(side)
        borders.append(begin + len(side) if side is prefix else begin)
    draft.natural(fill, Kind.TEXT)
    draft.answer(middle, min(borders), Kind.TEXT)
    if source.table.end is not None:
        draft.natural(np.array([source.table.end]), Kind.TEXT)
    return draft.sample("fim")
