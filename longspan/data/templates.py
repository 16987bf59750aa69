"""Planted facts with their questions as plain text, to train a tokenizer that knows them."""

from __future__ import annotations

import random

from longspan.data.facts import draw_group
from longspan.data.questions import INTRO, SUFFIXES, Ask, render
from longspan.data.vocabulary import Words


def template_texts(words: list[str], count: int = 300, seed: int = 5) -> list[str]:
    """Texts of 30 facts and questions each, with ``words`` in some of the keys."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        pools, group, used = Words.draw(rng, words, 30, False), draw_group(rng), set[str]()
        lines = [rng.choice(INTRO)]
        for _ in range(30):
            fact = group.make(rng, pools, used)
            ask = Ask(*rng.choice(fact.asks), fact.value, fact.noun)
            suffix = rng.choice(SUFFIXES).replace("{n}", fact.noun)
            lines += [fact.text, "".join(text for text, _ in render(rng, False, ask)) + suffix]
        texts.append("\n".join(lines) + "\n")
    return texts
