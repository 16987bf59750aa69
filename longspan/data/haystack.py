"""Filler for retrieval rows: corpus text mostly, RULER's noise, random words, needles only."""

from __future__ import annotations

import random

import numpy as np

from longspan.data.corpus import Corpus
from longspan.data.tokens import TokenTable

HAYSTACKS = ("corpus", "noise", "words", "needles")
HAYSTACK_WEIGHTS = (88, 4, 2, 6)
NOISE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n")
"""RULER's noise sentence (NVIDIA/RULER, Apache-2.0)."""


def draw_haystack(rng: random.Random) -> str:
    """Draw a haystack name from HAYSTACKS."""
    return rng.choices(HAYSTACKS, HAYSTACK_WEIGHTS)[0]


def haystack_filler(
    rng: random.Random, name: str, corpus: Corpus, table: TokenTable, num_tokens: int
) -> np.ndarray:
    """Token ids [num_tokens] of the named haystack; ``needles`` gets a little corpus text."""
    if name == "noise":
        unit = np.array(table.tokenizer.encode(NOISE, add_special_tokens=False).ids, np.int64)
        return np.tile(unit, num_tokens // len(unit) + 1)[:num_tokens]
    if name == "words":
        return _random_words(rng, corpus, table, num_tokens)
    return corpus.stream(rng, num_tokens, table)


def _random_words(
    rng: random.Random, corpus: Corpus, table: TokenTable, num_tokens: int
) -> np.ndarray:
    """Lines of random words; one block is encoded and its lines are shuffled to the length."""
    lines = [" ".join(rng.choices(corpus.words, k=rng.randrange(5, 15))) + "\n" for _ in range(200)]
    encoded = [np.array(table.tokenizer.encode(line, add_special_tokens=False).ids, np.int64)
               for line in lines]
    pieces: list[np.ndarray] = []
    missing = num_tokens
    while missing > 0:
        pieces.append(rng.choice(encoded))
        missing -= len(pieces[-1])
    return np.concatenate(pieces)[:num_tokens]
