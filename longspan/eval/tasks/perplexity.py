"""How well a model predicts real text, by position: nats a token in bins that double in length."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from longspan.errors import LongspanError
from longspan.eval.prompt import (
    Frame,
    Materials,
    Prompt,
    TooShortError,
    count_tokens,
    open_prompt,
)
from longspan.eval.task import Answer, Example, Gold, Model, Task, Verdict
from longspan.eval.text import Piece

FIRST_BIN = 256
"""Positions below this are one bin."""


@dataclass(frozen=True, kw_only=True)
class PerplexityTask(Task):
    """Whole files one after another, without a question. Needs a model that gives
    log-probabilities of its prompt."""

    name: str = "perplexity"
    max_tokens: int = 1
    scores_text: ClassVar[bool] = False

    @property
    def is_binary(self) -> bool:
        """Nats are not right or wrong."""
        return False

    def build(
        self, materials: Materials, num_tokens: int, index: int, rng: random.Random
    ) -> list[Example]:
        """Build one document of exactly the length. Raises `TooShortError`."""
        plain = Frame("", "", materials.frame.prefix_in)
        start = open_prompt(replace(materials, frame=plain), "")
        room = num_tokens - self.max_tokens - count_tokens(start)
        if room < 2:
            raise TooShortError(num_tokens, num_tokens - room + 2, "a token behind another")
        pieces = _cut(materials.bank.take(rng, room), room)
        return [Example(prompt=Prompt([*start, *pieces], plain), gold=Gold(answers=()))]

    def ask(self, model: Model, examples: Sequence[Example]) -> Sequence[Answer]:
        """Return log-probabilities. Raises `LongspanError` where there are none to be had."""
        if model.score is None:
            raise LongspanError(f"{self.name} needs log-probabilities of the prompt, which this "
                                "model does not give; leave the task out")
        return model.score([example.prompt for example in examples])

    def score(self, gold: Gold, answer: Answer) -> Verdict:
        """Return the mean nats a token: over everything, and by position."""
        assert answer.logprobs is not None
        nats = -np.asarray(answer.logprobs, np.float64)
        values = {f"{low}-{high}": float(nats[low:high].mean())
                  for low, high in position_bins(len(nats))}
        return Verdict(score=float(nats.mean()), values=values)


def position_bins(num_positions: int) -> list[tuple[int, int]]:
    """Return (first, past the last) position of each bin."""
    borders = [0, min(FIRST_BIN, num_positions)]
    while borders[-1] < num_positions:
        borders.append(min(2 * borders[-1], num_positions))
    return list(zip(borders, borders[1:], strict=False))


def _cut(pieces: Sequence[Piece], num_tokens: int) -> list[Piece]:
    """Return the first `num_tokens` tokens. The last piece is cut anywhere, so its text is left
    out."""
    kept: list[Piece] = []
    room = num_tokens
    for piece in pieces:
        if room > 0:
            is_whole = len(piece.ids) <= room
            kept.append(piece if is_whole else Piece("", piece.ids[:room]))
            room -= len(piece.ids)
    return kept
