"""Keyword retrieval: given words, the paragraph that they stand in.

Two to five words of a paragraph are named that stand in no other one of the document; where it has
one such word only, that one. Several paragraphs are asked for behind one document. Distance: from
the paragraph.
"""

from __future__ import annotations

import random
import re
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

ASKS = (
    "Which paragraph has the keywords {}?", "Find the paragraph with: {}",
    "Recall the paragraph about {}", "Keywords: {}. Paragraph?", "Where do {} occur together?",
    "Quote the passage that mentions {}", "The passage with the words {}",
    "Look up {}", "Copy the part of the text in which {} appear", "Retrieve: {}")
_WORD = re.compile(r"[^\W\d_]{4,12}")
_ASK_LEN = 60
MAX_QUESTIONS = 16


def keywords_to_paragraph(rng: random.Random, source: Source, room: int) -> Sample | None:
    """Return a document, then keywords and the paragraphs that they stand in."""
    wanted = log_uniform(rng, 1, min(MAX_QUESTIONS, room // 512 + 2))
    paragraphs = draw_paragraphs(rng, source, max(room // 2, room - wanted * 200))
    rare = rare_words([source.table.text(ids) for ids in paragraphs])
    pool = [i for i, words in enumerate(rare) if words]
    if len(paragraphs) < MIN_PARAGRAPHS or not pool:
        return None
    marks, draft, starts = Marks.draw(rng, source), Draft(source.table), starts_of(paragraphs)
    draft.natural(np.concatenate(paragraphs))
    for index in rng.sample(pool, min(wanted, len(pool))):
        if len(draft) + len(paragraphs[index]) + _ASK_LEN > room and draft.answers:
            break
        words = rng.sample(rare[index], min(len(rare[index]), rng.randrange(2, 6)))
        ask = rng.choice(source.wordings(ASKS)).format(", ".join(words))
        draft.line(marks.line(ask))
        draft.answer(strip_line_end(paragraphs[index], source.table), starts[index])
        close(draft, marks)
    return draft.sample("keywords") if len(draft) <= room else None


def rare_words(texts: Sequence[str]) -> list[list[str]]:
    """Words of each text that are in no other one, sorted."""
    words = [set(_WORD.findall(text)) for text in texts]
    counts = Counter(word for found in words for word in {w.lower() for w in found})
    return [sorted(w for w in found if counts[w.lower()] == 1) for found in words]
