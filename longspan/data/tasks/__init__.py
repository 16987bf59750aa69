"""Long-range tasks: the report's four (Qwen2.5-1M, section 3), retrieval, tracking, counting.

Each is ``f(rng, source, room) -> Sample | None``: a sample of at most ``room`` tokens, None where
the text that was drawn does not allow one.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from longspan.data.draft import Sample
from longspan.data.source import Source
from longspan.data.tasks.counting import count_words
from longspan.data.tasks.fim import fill_in_the_middle
from longspan.data.tasks.keywords import keywords_to_paragraph
from longspan.data.tasks.needles import FOCI, needles
from longspan.data.tasks.position import paragraph_at_position
from longspan.data.tasks.recall import recall
from longspan.data.tasks.reorder import copy_span, reorder_paragraphs
from longspan.data.tasks.variables import track_variables
from longspan.data.tokens import filler

Task = Callable[[random.Random, Source, int], Sample | None]


def plain_text(rng: random.Random, source: Source, room: int) -> Sample:
    """Natural text and no question."""
    return Sample("plain", filler(source.corpus.stream(rng, room, source.table)), ())


DOCUMENT_TASKS: dict[str, Task] = {
    "fim": fill_in_the_middle, "keywords": keywords_to_paragraph,
    "position": paragraph_at_position, "reorder": reorder_paragraphs, "copy": copy_span}
"""Tasks over one document."""
TASKS: dict[str, Task] = {
    **DOCUMENT_TASKS, "plain": plain_text, "variables": track_variables, "counting": count_words,
    "recall": recall,
    **{name: partial(needles, task=name) for name in FOCI}}
