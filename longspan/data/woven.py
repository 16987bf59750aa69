"""Sentences of a corpus' own words into which a key and a number are woven, at any two places.

A small model learns a few hundred wordings of ours by heart. It then finds a number behind its key,
and no number in front of it: what is read later has to say which number it belongs to. So half of
these sentences and more have the number first.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from longspan.data.source import Source

VALUE_FIRST = 0.6
_WORD = re.compile(r"[^\W\d_]{2,20},?")
_TEXT_LEN, _LEAST, _MOST = 48, 4, 14
"""Tokens of text that words are taken from, and how many words."""


def draw_words(rng: random.Random, source: Source) -> list[str]:
    """Draw words that stand behind each other in the corpus; frequent ones where there is no text
    of words."""
    wanted = rng.randrange(_LEAST, _MOST + 1)
    for _ in range(4):
        text = source.table.text(source.corpus.stream(rng, _TEXT_LEN, source.table))
        words = _WORD.findall(text)[:wanted]
        if len(words) >= _LEAST:
            return words
    return rng.choices(source.corpus.words, k=wanted)


def weave(
    rng: random.Random, words: Sequence[str], name: str = "{k}", value_first: float = VALUE_FIRST,
) -> str:
    """Return the words with a name and ``{v}`` among them, without a full stop."""
    first, second = sorted(rng.choices(range(len(words) + 1), k=2))
    slots = ("{v}", name) if rng.random() < value_first else (name, "{v}")
    pieces = [*words[:first], slots[0], *words[first:second], slots[1], *words[second:]]
    return " ".join(pieces).rstrip(",")


def draw_template(rng: random.Random, source: Source, value_first: float = VALUE_FIRST) -> str:
    """Draw a sentence of the corpus' words with ``{k}`` and ``{v}`` in it."""
    return weave(rng, draw_words(rng, source), value_first=value_first)
