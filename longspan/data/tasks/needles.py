"""Needle and key-value families: facts planted in a document, and questions about them.

Facts are RULER's needles, pass keys, records and sentences; a row is filled with corpus text, noise
(RULER's), random words or facts alone. Half of the questions stand behind the document, the others
at any distance from their facts, evenly on a logarithmic scale. Distance: from the farthest fact
asked for; 0 for a key that is not there.
"""

from __future__ import annotations

import random

from longspan.data.draft import Sample
from longspan.data.layout import lay_out
from longspan.data.plan import Focus, draw_plan, num_questions
from longspan.data.source import Source

FOCI = {
    "needle": Focus(),
    "key_value": Focus(family="record", haystack="needles", lists=0.1, absent=0.1),
    "multi_query": Focus(lists=0.7),
    "multi_value": Focus(values=0.7),
    "absent": Focus(absent=0.5, lists=0.0, values=0.0)}


def needles(rng: random.Random, source: Source, length: int, task: str) -> Sample | None:
    """Return a row of exactly ``length`` tokens of one of `FOCI`."""
    wanted = max(2, round(num_questions(length) * rng.uniform(0.4, 1.4)))
    for _ in range(8):
        plan = draw_plan(rng, source, wanted, length, FOCI[task])
        sample = lay_out(rng, source, plan, length, task)
        if sample is not None:
            return sample
        wanted = max(1, wanted // 2)
    return None
