"""Practice: rows of exact lengths that are nothing but conversations, composed while training.

The same exercises as in fine-tuning, with many questions about each document: a row of 4,096 tokens
has some ten answers to learn from instead of one or two. Some rows are those of pre-training, so
that its other tasks are not forgotten.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import numpy as np

from longspan.data.chat.gold import Exercise
from longspan.data.chat.rows import EXERCISES, MIN_LENGTH
from longspan.data.rows import compose_row
from longspan.data.source import Source
from longspan.data.tasks.paragraphs import log_uniform
from longspan.data.tokens import IM_END, IM_START, Kind, Part, Piece, concat, filler

PRACTICE: Mapping[str, float] = {
    "mixed": 14, "key_value": 4, "ruler_niah": 22, "ruler_variables": 16, "variables": 3,
    "sentences": 36, "ruler_words": 4, "ordering": 1}
"""Shares of the exercises."""
LONG_LEN = 8192
LONG: Mapping[str, float] = {
    "mixed": 18, "key_value": 4, "ruler_niah": 34, "ruler_variables": 26, "variables": 2,
    "sentences": 14, "ruler_words": 2}
"""Those of rows of `LONG_LEN` tokens and more: what is looked for once carries over from short
ones; several values and chains do less."""
REPLAY = 0.15
"""Share of rows that are pre-training's."""
MAX_TURNS = 48
_TOKENS_PER_TURN, _DENSE_TURN, _DENSE = 340, 140, 0.35
"""A document has at most one question for so many tokens; this share of them are denser."""
_ATTEMPTS = 12


def compose_practice(
    seed: Sequence[int], source: Source, num_rows: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """``ids`` uint32 and ``kinds`` uint8, both [num_rows, length]; row i has seed (*seed, i)."""
    rows = [compose_conversations((*seed, i), source, length) for i in range(num_rows)]
    return np.stack([row.ids for row in rows]), np.stack([row.kinds for row in rows])


def compose_conversations(seed: Sequence[int], source: Source, length: int) -> Piece:
    """Return the row of a seed: conversations one behind the other, natural text before them where
    they are shorter than the row."""
    rng = random.Random(repr(("practice", *seed)))
    if rng.random() < REPLAY:
        return compose_row(seed, source, length).piece
    end = source.table.end
    ending = [] if end is None else [filler(np.array([end]), Kind.TEXT)]
    pieces: list[Piece] = []
    missing = length
    while missing > MIN_LENGTH + 1:
        room = missing - len(ending)
        is_whole = rng.random() < 0.6
        piece = _draw(rng, source, room if is_whole else min(room, log_uniform(
            rng, MIN_LENGTH, length)))
        if piece is None:
            break
        pieces += [piece, *ending]
        missing -= len(piece) + len(ending)
    if missing > len(ending):
        text = filler(source.corpus.stream(rng, missing - len(ending), source.table))
        pieces = [text, *ending, *pieces]
    elif missing:
        pieces = [*ending, *pieces]
    return concat(pieces)


def _draw(rng: random.Random, source: Source, room: int) -> Piece | None:
    """Return a conversation of at most ``room`` tokens from one of a few draws."""
    shares = LONG if room >= LONG_LEN else PRACTICE
    name = rng.choices(list(shares), list(shares.values()))[0]
    per_turn = _DENSE_TURN if rng.random() < _DENSE else _TOKENS_PER_TURN
    most = max(1, min(MAX_TURNS, room // per_turn))
    num_turns = 1 if rng.random() < 0.3 else log_uniform(rng, max(1, most // 2), most + 1)
    if name == "ruler_variables" and rng.random() < 0.4:
        num_turns = min(num_turns, 3)  # with few chains the solved one is the nearest mistake
    wanted = room
    for _ in range(_ATTEMPTS):
        exercise = EXERCISES[name](rng, source, wanted, num_turns)
        if exercise is not None:
            piece = encode_exercise(source, exercise)
            if len(piece) <= room:
                return piece
            wanted -= len(piece) - room
        wanted = max(MIN_LENGTH - 64, int(0.98 * wanted))
        num_turns = max(1, num_turns * 3 // 4)
    return None


def encode_exercise(source: Source, exercise: Exercise) -> Piece:
    """Return a conversation in ChatML: only replies are answers, and of a reply's sentence only
    what it says, the rest repeats the question."""
    parts: list[Part] = []
    for number, turn in enumerate(exercise.turns):
        text = turn.question
        if not number:
            text = exercise.document.rstrip() + exercise.joint + text
        parts.append((f"{IM_START}user\n{text}{IM_END}\n{IM_START}assistant\n", Kind.TEXT))
        gold = turn.gold
        before = gold.frame.partition("{}")[0] if gold.items else ""
        if before:
            parts.append((before, Kind.COPY))
        parts += [(gold.right[len(before):] + IM_END, Kind.ANSWER), ("\n", Kind.TEXT)]
    return source.table.encode([parts])[0]
