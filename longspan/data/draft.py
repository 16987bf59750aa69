"""A sample of a task: its tokens, and where its answers are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from longspan.data.tokens import Kind, Part, Piece, TokenTable, concat, filler


@dataclass(frozen=True, slots=True)
class Answer:
    """Tokens [start, stop) of a sample that answer a question."""

    start: int
    stop: int
    distance: int
    """Tokens from the beginning of the farthest place that holds the answer; 0: from nowhere, the
    text does not hold it."""

    def moved(self, by: int) -> Answer:
        """Return the same, so many tokens further on."""
        return Answer(self.start + by, self.stop + by, self.distance)


@dataclass(frozen=True, slots=True)
class Sample:
    """One instance of a task."""

    task: str
    piece: Piece
    answers: tuple[Answer, ...]


class Draft:
    """A sample as it grows, piece by piece."""

    def __init__(self, table: TokenTable) -> None:
        self.table = table
        self.pieces: list[Piece] = []
        self.answers: list[Answer] = []
        self._len = 0

    def __len__(self) -> int:
        return self._len

    def add(self, piece: Piece) -> int:
        """Append tokens; returns where they begin."""
        start = self._len
        if len(piece):
            self.pieces.append(piece)
            self._len += len(piece)
        return start

    def natural(self, ids: np.ndarray, kind: Kind = Kind.FILLER) -> int:
        """Append tokens of natural text."""
        return self.add(filler(ids, kind))

    def text(self, *parts: Part) -> int:
        """Append marked text, on a new line; returns where it begins."""
        if self._len and not self._ends_line():
            parts = (("\n", Kind.TEXT), *parts)
        return self.add(self.table.encode([parts])[0])

    def line(self, text: str) -> int:
        """Append one line."""
        return self.text((text + "\n", Kind.TEXT))

    def answer(self, ids: np.ndarray, evidence: int, kind: Kind = Kind.COPY) -> None:
        """Append the tokens of an answer that repeats or follows from those at ``evidence``."""
        start = self.add(filler(ids, kind))
        self.answers.append(Answer(start, self._len, start - evidence))

    def sample(self, task: str) -> Sample:
        """Return what was appended, as one sample."""
        return Sample(task, concat(self.pieces), tuple(self.answers))

    def _ends_line(self) -> bool:
        return bool(self.table.ends_newline[self.pieces[-1].ids[-1]])
