"""RULER's two counting tasks: common words in a numbered list, frequent words in a coded text."""

from __future__ import annotations

import math
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from longspan.eval.prompt import Materials, Prompt, TooShortError, count_tokens, open_prompt
from longspan.eval.task import Example, Gold
from longspan.eval.tasks.ruler import COMMON_WORDS, FREQUENT_WORDS, SHORT_LEN, RulerTask
from longspan.eval.text import Encoder, Piece
from longspan.eval.words import ADJECTIVES, NOUNS, draw_words

NUM_COMMON = 10
MIN_WORDS = 20
"""Fewer different words than this leave too few that are not among the common ones."""
WORD_LEN = 6
NUM_ASKED = 3
ZETA_2 = math.pi**2 / 6
MIN_CODED = math.ceil((NUM_ASKED + 1) ** 2 * ZETA_2)
"""With fewer words the last one asked for does not occur."""
TOKENS_PER_WORD = 50
"""The coded text has one different word for so many tokens of its length."""


@dataclass(frozen=True, slots=True)
class Form:
    """How often words occur."""

    common: int
    uncommon: int
    example_words: int
    example_common: int
    example_uncommon: int


STANDARD = Form(30, 3, 40, 10, 3)
SHORT = Form(6, 1, 20, 3, 1)


@dataclass(frozen=True, kw_only=True)
class CommonWordsTask(RulerTask):
    """The ten most common words of a list, behind a solved example.

    Below 4,096 tokens RULER has a short form with fewer repeats; it is also used where the standard
    one does not fit this tokenizer, and the row says so.
    """

    name: str = "cwe"
    max_tokens: int = 120
    group: ClassVar[str] = "counting"

    @property
    def is_binary(self) -> bool:
        """Ten words are asked for."""
        return False

    def build(
        self, materials: Materials, num_tokens: int, index: int, rng: random.Random
    ) -> list[Example]:
        """Build one prompt."""
        least = 0
        for form in (SHORT,) if num_tokens < SHORT_LEN else (STANDARD, SHORT):
            built = self._build_form(materials, num_tokens - self.max_tokens, form, rng)
            if isinstance(built, Example):
                return [built]
            least = built + self.max_tokens
        raise TooShortError(num_tokens, least, f"{MIN_WORDS} words")

    def _build_form(
        self, materials: Materials, budget: int, form: Form, rng: random.Random
    ) -> Example | int:
        """Build the example, or return the length that it would need."""
        head, tail, prefix = COMMON_WORDS.fill()
        end = materials.frame.tail(tail, prefix)
        solved = _solved(materials, form, rng, prefix)
        start = open_prompt(materials, solved + head)
        last = materials.encoder.piece(end)
        room = budget - count_tokens([*start, last])
        pieces, words, invented = _longest_list(materials, form, room, rng)
        if not pieces:
            return budget - room + _least_tokens(materials.encoder, words, form)
        notes = ["short form"] * (form is SHORT) + ["invented words"] * invented
        prompt = Prompt([*start, *pieces, last], materials.frame)
        return Example(prompt=prompt, gold=Gold(answers=tuple(words[:NUM_COMMON])),
                       question=tail.strip(), form=", ".join(notes))


@dataclass(frozen=True, kw_only=True)
class FrequentWordsTask(RulerTask):
    """The three most frequent invented words, whose frequencies fall with the square of the rank;
    the very first is dots, which do not count."""

    name: str = "fwe"
    max_tokens: int = 50
    group: ClassVar[str] = "counting"

    @property
    def is_binary(self) -> bool:
        """Three words are asked for."""
        return False

    def build(
        self, materials: Materials, num_tokens: int, index: int, rng: random.Random
    ) -> list[Example]:
        """Build one prompt."""
        head, tail, prefix = FREQUENT_WORDS.fill()
        start = open_prompt(materials, head.rstrip(" "))
        end = materials.frame.tail(tail, prefix)
        budget = num_tokens - self.max_tokens
        vocabulary = _coded_words(max(NUM_ASKED + 2, budget // TOKENS_PER_WORD), rng)
        pieces = [materials.encoder.piece(" " + word) for word in vocabulary]
        lens = np.array([len(piece.ids) for piece in pieces])
        room = budget - count_tokens(start) - materials.encoder.count(end)
        counts = _zipf_counts(lens, room)
        if counts[NUM_ASKED] < 1:
            least = num_tokens - room + int((_zipf(MIN_CODED, len(lens)) * lens).sum())
            raise TooShortError(num_tokens, least, f"{MIN_CODED} coded words")
        order = [piece for piece, count in zip(pieces, counts, strict=True)
                 for _ in range(count)]
        rng.shuffle(order)
        # Dots and the line end behind them are one token of some tokenizers.
        last = materials.encoder.piece(order.pop().text + end)
        return [Example(prompt=Prompt([*start, *order, last], materials.frame),
                        gold=Gold(answers=tuple(vocabulary[1:NUM_ASKED + 1])),
                        question=tail.strip())]


def _solved(materials: Materials, form: Form, rng: random.Random, prefix: str) -> str:
    """Build the example in front: a short list, the question, its answer."""
    head, tail, _ = COMMON_WORDS.fill()
    words, _ = draw_words(rng, form.example_words, _pool(materials))
    entries = _shuffled(words, form.example_common, form.example_uncommon, rng)
    context = " ".join(f"{number}. {word}" for number, word in enumerate(entries, 1))
    answer = " ".join(f"{n}. {word}" for n, word in enumerate(words[:NUM_COMMON], 1))
    return head + context + tail + prefix + " " + answer + "\n"


def _longest_list(
    materials: Materials, form: Form, room: int, rng: random.Random
) -> tuple[list[Piece], list[str], bool]:
    """Find the longest list that fits: (its pieces, its words with the common ones first, whether
    some are invented). Without pieces if not even `MIN_WORDS` fit."""
    pool = _pool(materials)
    words, invented = draw_words(rng, max(MIN_WORDS, len(pool)), pool)
    fitting = _num_fitting(materials.encoder, words, form, room)
    if fitting == len(words):
        least = 3 * materials.encoder.count(f" {room // 20}. a") // 4  # tokens of an entry
        words, invented = draw_words(rng, len(pool) + room // (least * form.uncommon), pool)
        fitting = _num_fitting(materials.encoder, words, form, room)
    if fitting < MIN_WORDS:
        return [], words[:MIN_WORDS], invented
    words = words[:fitting]
    entries = _shuffled(words, form.common, form.uncommon, rng)
    pieces = []
    for number, word in enumerate(entries, 1):
        pieces += [_number(materials.encoder, number), _word(materials.encoder, word)]
    return pieces, words, invented


def _num_fitting(encoder: Encoder, words: Sequence[str], form: Form, room: int) -> int:
    """Return how many of the words a list of at most `room` tokens can hold."""
    lens = np.array([len(_word(encoder, word).ids) for word in words])
    repeats = np.where(np.arange(len(words)) < NUM_COMMON, form.common, form.uncommon)
    numbers = np.cumsum(_number_lens(encoder, max(1, min(int(repeats.sum()), room))))
    last = np.minimum(np.cumsum(repeats), len(numbers)) - 1
    return int(np.searchsorted(np.cumsum(lens * repeats) + numbers[last], room, "right"))


def _least_tokens(encoder: Encoder, words: Sequence[str], form: Form) -> int:
    repeats = [form.common if i < NUM_COMMON else form.uncommon for i in range(len(words))]
    tokens = sum(n * len(_word(encoder, word).ids) for n, word in zip(repeats, words, strict=True))
    return tokens + int(np.sum(_number_lens(encoder, sum(repeats))))


def _shuffled(words: Sequence[str], common: int, uncommon: int, rng: random.Random) -> list[str]:
    entries = [*words[:NUM_COMMON]] * common + [*words[NUM_COMMON:]] * uncommon
    rng.shuffle(entries)
    return entries


def _number_lens(encoder: Encoder, count: int) -> list[int]:
    return [len(_number(encoder, number).ids) for number in range(1, count + 1)]


def _number(encoder: Encoder, number: int) -> Piece:
    return encoder.cached(f"{number}." if number == 1 else f" {number}.")


def _word(encoder: Encoder, word: str) -> Piece:
    return encoder.cached(" " + word)


def _pool(materials: Materials) -> tuple[str, ...]:
    return materials.words or (*ADJECTIVES, *NOUNS)


def _coded_words(count: int, rng: random.Random) -> list[str]:
    """Draw dots, then different words of random letters."""
    words: dict[str, None] = {"...": None}
    while len(words) < count:
        words["".join(rng.choices(string.ascii_lowercase, k=WORD_LEN))] = None
    return list(words)


def _zipf(num_words: int, num_ranks: int) -> np.ndarray:
    """Return how often the word of each rank occurs among so many."""
    return np.floor(num_words / (np.arange(1, num_ranks + 1) ** 2.0 * ZETA_2)).astype(int)


def _zipf_counts(lens: np.ndarray, room: int) -> list[int]:
    """Count the same for the longest text that fits, of words with these numbers of tokens."""
    low, high = 0, max(0, room)
    while low < high:
        middle = (low + high + 1) // 2
        tokens = int((_zipf(middle, len(lens)) * lens).sum())
        low, high = (middle, high) if tokens <= room else (low, middle - 1)
    return [int(count) for count in _zipf(low, len(lens))]
