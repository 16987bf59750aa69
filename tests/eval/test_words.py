"""Keys that no training row can hold."""

from __future__ import annotations

import random

from longspan.data import vocabulary
from longspan.eval.words import ADJECTIVES, NOUNS, draw_key


def test_enough_words_each_once() -> None:
    assert len(set(ADJECTIVES)) == len(ADJECTIVES) >= 100
    assert len(set(NOUNS)) == len(NOUNS) >= 100


def test_disjoint_from_the_words_of_training() -> None:
    assert not set(ADJECTIVES) & set(vocabulary.ADJECTIVES)
    assert not set(NOUNS) & set(vocabulary.NOUNS)


def test_keys_are_an_adjective_and_a_noun() -> None:
    adjective, noun = draw_key(random.Random(1)).split("-")
    assert adjective in ADJECTIVES and noun in NOUNS
