"""Rows and batches of training data: the mixture of row kinds, by seed, at exact lengths."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from longspan.data.compose import Source, compose_retrieval
from longspan.data.corpus import Corpus
from longspan.data.tasks import MIN_PARAGRAPHS, draw_task, split_paragraphs
from longspan.data.tokens import END_OF_TEXT, Kind, Piece, TokenTable, concat, filler
from longspan.errors import LongspanError

PACK_MAX_LENGTH = 4096
"""Rows up to this length may be packs of several short rows."""
MIN_ROW = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """Shares of row kinds; the rest is retrieval."""

    tasks: float = 0.13
    plain: float = 0.04
    packed: float = 0.20
    """Share of rows up to PACK_MAX_LENGTH that are packs."""


def load_source(data_dir: Path, split: str = "train") -> Source:
    """Corpus split and token table of a folder that has ``corpus`` and ``tokenizer``."""
    table = TokenTable.load(data_dir / "tokenizer" / "tokenizer.json")
    return Source(Corpus.load(data_dir / "corpus", split), table)


def compose_tasks(rng: random.Random, source: Source, length: int) -> Piece:
    """Long-range tasks one after the other, cut at exactly ``length`` tokens."""
    pieces: list[Piece] = []
    missing = length
    while missing > 0:
        size = int(np.exp(rng.uniform(np.log(400), np.log(max(401, length)))))
        size = min(size, missing)
        ids = source.corpus.stream(rng, max(size, MIN_ROW), source.table)
        paragraphs = split_paragraphs(rng, ids, source.table)
        if len(paragraphs) >= MIN_PARAGRAPHS:
            pieces.append(draw_task(rng, paragraphs, source.table).piece)
        else:
            pieces.append(filler(ids))
        missing -= len(pieces[-1])
    whole = concat(pieces)
    return Piece(whole.ids[-length:], whole.kinds[-length:])


def compose_pack(rng: random.Random, source: Source, length: int, mixture: Mixture) -> Piece:
    """Short rows of random lengths, separated by <|endoftext|>, exactly ``length`` tokens."""
    end = np.array([source.table.tokenizer.token_to_id(END_OF_TEXT)], np.uint32)
    pieces: list[Piece] = []
    missing = length
    while missing > 0:
        size = int(np.exp(rng.uniform(np.log(160), np.log(2048))))
        size = missing - 1 if missing - 1 - size < MIN_ROW else size
        kind = rng.random()
        if kind < mixture.tasks:
            pieces.append(compose_tasks(rng, source, size))
        else:
            pieces.append(compose_retrieval(rng, source, size))
        pieces.append(filler(end, Kind.TEXT))
        missing -= size + 1
    return concat(pieces)


def compose_row(
    seed: Sequence[int], source: Source, length: int, mixture: Mixture | None = None
) -> Piece:
    """Compose the row of a seed: ``ids`` uint32 [length], ``kinds`` uint8 [length]."""
    if length < MIN_ROW:
        raise LongspanError(f"row length {length} is below {MIN_ROW}: use longer rows")
    mixture = mixture or Mixture()
    rng = random.Random(repr(tuple(seed)))
    draw = rng.random()
    if length <= PACK_MAX_LENGTH and rng.random() < mixture.packed:
        piece = compose_pack(rng, source, length, mixture)
    elif draw < mixture.tasks:
        piece = compose_tasks(rng, source, length)
    elif draw < mixture.tasks + mixture.plain:
        piece = filler(source.corpus.stream(rng, length, source.table))
    else:
        piece = compose_retrieval(rng, source, length)
    assert len(piece) == length == len(piece.kinds), "a row has exactly the length asked for"
    return piece


def compose_batch(
    seed: Sequence[int], source: Source, num_rows: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """``ids`` uint32 and ``kinds`` uint8, both [num_rows, length]; row i has seed (*seed, i)."""
    rows = [compose_row((*seed, i), source, length) for i in range(num_rows)]
    return np.stack([r.ids for r in rows]), np.stack([r.kinds for r in rows])
