"""Position retrieval: given a place, the paragraph before or after it.

The place is named by a paragraph that is quoted (once in the document), by its first words, or by
its number where paragraphs are numbered. Several places are asked for behind one document.
Distance: from the paragraph that answers.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import numpy as np

from longspan.data.draft import Draft, Sample
from longspan.data.source import Source
from longspan.data.tasks.paragraphs import (
    MIN_PARAGRAPHS,
    Marks,
    close,
    draw_paragraphs,
    log_uniform,
    starts_of,
    strip_line_end,
)
from longspan.data.tokens import Kind

ASKS = (
    ("Which paragraph comes before this one?", "Which paragraph comes after this one?"),
    ("What stands directly before this?", "What stands directly after this?"),
    ("Go back one paragraph from here", "Go on one paragraph from here"),
    ("The paragraph above the following one", "The paragraph below the following one"),
    ("Preceding paragraph of", "Following paragraph of"),
    ("What was said just before the following?", "What was said just after the following?"),
    ("Recall what leads up to this", "Recall what this leads to"),
    ("Previous part of", "Next part of"),
    ("Find this place and quote the part before it", "Find this place and quote the part after it"),
    ("Left neighbour of", "Right neighbour of"))
NUMBERED = ("Quote paragraph {}", "What is paragraph {}?", "Paragraph number {}", "Recall part {}",
            "Copy section {}")
MAX_QUESTIONS = 12


def paragraph_at_position(rng: random.Random, source: Source, room: int) -> Sample | None:
    """Return a document, then places in it and the paragraphs next to them."""
    wanted = log_uniform(rng, 1, min(MAX_QUESTIONS, room // 768 + 2))
    paragraphs = draw_paragraphs(rng, source, max(room // 2, room - wanted * 330))
    unique = _unique(paragraphs)
    if len(paragraphs) < MIN_PARAGRAPHS or not unique:
        return None
    if rng.random() < 0.25:
        return _numbered(rng, source, paragraphs, room)
    marks, draft, starts = Marks.draw(rng, source), Draft(source.table), starts_of(paragraphs)
    draft.natural(np.concatenate(paragraphs))
    for index in rng.sample(unique, min(wanted, len(unique))):
        step = rng.choice((-1, 1))
        ask = rng.choice(source.wordings(ASKS))[step > 0]
        there = paragraphs[index + step]
        if len(draft) + len(paragraphs[index]) + len(there) + 60 > room and draft.answers:
            break
        draft.line(marks.line(ask))
        draft.natural(paragraphs[index], Kind.COPY)
        draft.line(marks.line("Answer"))
        draft.answer(strip_line_end(there, source.table), starts[index + step])
        close(draft, marks)
    return draft.sample("position") if len(draft) <= room else None


def _unique(paragraphs: Sequence[np.ndarray]) -> list[int]:
    """Return indices of inner paragraphs that stand in the document once."""
    keys = [ids.tobytes() for ids in paragraphs]
    counts = Counter(keys)
    return [i for i in range(1, len(keys) - 1) if counts[keys[i]] == 1]


def _numbered(
    rng: random.Random, source: Source, paragraphs: Sequence[np.ndarray], room: int
) -> Sample | None:
    """Paragraphs with numbers, then numbers and their paragraphs."""
    marks, draft, starts = Marks.draw(rng, source), Draft(source.table), []
    for number, ids in enumerate(paragraphs, 1):
        if len(draft) > room - 400:
            break
        draft.line(marks.line(str(number)))
        starts.append(draft.natural(ids))
    if len(starts) < MIN_PARAGRAPHS:
        return None
    for index in rng.sample(range(len(starts)), len(starts)):
        if len(draft) + len(paragraphs[index]) + 40 > room:
            break
        ask = rng.choice(source.wordings(NUMBERED)).format(index + 1)
        draft.line(marks.line(ask))
        draft.answer(strip_line_end(paragraphs[index], source.table), starts[index])
        close(draft, marks)
    return draft.sample("position") if draft.answers and len(draft) <= room else None
