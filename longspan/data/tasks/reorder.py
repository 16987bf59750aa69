"""Paragraph reordering: parts of a document in random order, then their original order.

A document has 4 to 64 parts, which together fill the row. The answer is the list of their numbers,
or, in half of the room, the text itself. Distance: from the part that comes first (numbers), for
the text from each part.
"""

from __future__ import annotations

import random

import numpy as np

from longspan.data.draft import Draft, Sample
from longspan.data.source import Source
from longspan.data.tasks.paragraphs import (
    HIGH_LEN,
    LOW_LEN,
    MIN_PARAGRAPHS,
    Marks,
    close,
    log_uniform,
    split_evenly,
)
from longspan.data.tokens import Kind

MAX_PARTS = 64
ASKS = ("Original order", "What was the order?", "Put the parts in order", "Right sequence",
        "Sort the parts as they were", "In which order do these belong?", "Restore the order",
        "The parts in order", "Undo the shuffling", "Correct order")
TEXT_ASKS = ("Original text", "Write the text in its order", "Put the text together",
             "The parts, restored", "Text in order")
PARTS = ("Part {}", "{}", "Piece {}", "Section {}", "Number {}")
_MARK_LEN = 14
"""Tokens of a part's mark and number, at most, about."""


def reorder_paragraphs(rng: random.Random, source: Source, room: int) -> Sample | None:
    """Shuffled, numbered parts of a document, then their order."""
    as_text = rng.random() < 0.25
    most = min(MAX_PARTS, room // (2 * (LOW_LEN + _MARK_LEN)))
    count = log_uniform(rng, MIN_PARAGRAPHS, max(MIN_PARAGRAPHS, most) + 1)
    size = (room - 2 * _MARK_LEN * (count + 2)) // (2 if as_text else 1)
    if size < count * LOW_LEN:
        return None
    paragraphs = split_evenly(source.document(rng, size), count, source.table)
    if len(paragraphs) < MIN_PARAGRAPHS:
        return None
    order = list(range(len(paragraphs)))
    rng.shuffle(order)
    marks, draft = Marks.draw(rng, source), Draft(source.table)
    name, starts = rng.choice(source.wordings(PARTS)), {}
    for number, index in enumerate(order, 1):
        draft.line(marks.line(name.format(number)))
        starts[index] = draft.natural(paragraphs[index])
    draft.line(marks.line(rng.choice(source.wordings(TEXT_ASKS if as_text else ASKS))))
    if as_text:
        for index, ids in enumerate(paragraphs):
            draft.answer(ids, starts[index])
    else:
        numbers = " ".join(str(order.index(i) + 1) for i in range(len(order)))
        ids = source.table.encode([((numbers, Kind.TEXT),)])[0].ids
        draft.answer(ids, 0, Kind.ANSWER)
    close(draft, marks)
    return draft.sample("reorder") if len(draft) <= room else None


def copy_span(rng: random.Random, source: Source, room: int) -> Sample | None:
    """Return a document with a marked span, other text behind it, then the span again.

    Not one of the report's tasks: the simplest one of its kind. Distance: from the span.
    """
    ids = source.document(rng, max(room // 2, room - 4 * HIGH_LEN))
    places = source.table.cut_places(ids)
    if len(places) < 3:
        return None
    begin = rng.randrange(len(places) - 1)
    longest = room - len(ids) - 8 * _MARK_LEN
    length = log_uniform(rng, LOW_LEN, max(LOW_LEN + 1, longest))
    stop = min(int(np.searchsorted(places, places[begin] + length)), len(places) - 1)
    before, marked, behind = np.split(ids, [int(places[begin]), int(places[stop])])
    marks, draft = Marks.draw(rng, source), Draft(source.table)
    name = f"{rng.randrange(100, 1000)}"
    draft.natural(before)
    draft.line(marks.line(f"Begin {name}"))
    evidence = draft.natural(marked)
    draft.line(marks.line(f"Stop {name}"))
    draft.natural(behind)
    draft.line(marks.line(f"Repeat {name}"))
    draft.answer(marked, evidence)
    close(draft, marks)
    return draft.sample("copy") if len(marked) and len(draft) <= room else None
