"""Rows and batches of training data: the mixture of tasks, by seed, at exact lengths."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from longspan.data.draft import Sample
from longspan.data.source import Source
from longspan.data.tasks import TASKS, plain_text
from longspan.data.tasks.needles import FOCI
from longspan.data.tasks.paragraphs import log_uniform
from longspan.data.tokens import Kind, concat, filler
from longspan.errors import LongspanError

PACK_MAX_LENGTH = 4096
"""Rows up to this length may be packs of several short rows."""
MIN_ROW = 128
_ATTEMPTS = 8

WEIGHTS: Mapping[str, float] = {
    "needle": 20, "key_value": 6, "multi_query": 8, "multi_value": 8, "absent": 8, "variables": 8,
    "counting": 4, "recall": 24, "fim": 8, "keywords": 8, "position": 8, "reorder": 5, "copy": 5,
    "plain": 4}
"""Shares of the tasks, unless others are asked for."""
SHORT_TASKS: Mapping[str, int] = {"recall": 8192}
"""Tasks whose evidence is near, and the longest rows with a share of them: in longer ones their
many answers would outweigh those that are far from their evidence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """Which rows there are."""

    weights: Mapping[str, float] = field(default_factory=lambda: WEIGHTS)
    """Shares of tasks by name; any scale."""
    packed: float = 0.20
    """Share of rows up to PACK_MAX_LENGTH that are packs of short rows."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.weights) - set(TASKS))
        if unknown:
            raise LongspanError(f"no task named {unknown[0]}: choose from {', '.join(TASKS)}")
        if min(self.weights.values(), default=0) < 0 or not sum(self.weights.values()):
            raise LongspanError("the weights of tasks are positive numbers: give one to a task")

    def of(self, tasks: Mapping[str, float] | None) -> Mixture:
        """Return the mixture of these tasks; ``None``: itself."""
        return self if tasks is None else replace(self, weights=tasks)

    def draw(self, rng: random.Random, length: int) -> str:
        """Return the name of a row's task."""
        fitting = {name: weight for name, weight in self.weights.items()
                   if length <= SHORT_TASKS.get(name, length)}
        weights = fitting if sum(fitting.values()) else self.weights
        return rng.choices(list(weights), list(weights.values()))[0]


def check_row_length(length: int) -> None:
    """Raise `LongspanError` for rows that are too short for a question."""
    if length < MIN_ROW:
        raise LongspanError(f"row length {length} is below {MIN_ROW}: use longer rows")


def compose_row(
    seed: Sequence[int], source: Source, length: int, mixture: Mixture | None = None
) -> Sample:
    """Return the row of a seed, exactly ``length`` tokens of one task; natural text before it where
    it is shorter. A row whose text allows no such task is ``plain``."""
    check_row_length(length)
    mixture = mixture or Mixture()
    rng = random.Random(repr(tuple(seed)))
    if length <= PACK_MAX_LENGTH and rng.random() < mixture.packed:
        row = _compose_pack(rng, source, length, mixture)
    else:
        row = _compose_task(rng, source, length, mixture.draw(rng, length))
    assert len(row.piece.ids) == length == len(row.piece.kinds), "a row has the length asked for"
    return row


def compose_batch(
    seed: Sequence[int], source: Source, num_rows: int, length: int, mixture: Mixture | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """``ids`` uint32 and ``kinds`` uint8, both [num_rows, length]; row i has seed (*seed, i)."""
    rows = [compose_row((*seed, i), source, length, mixture).piece for i in range(num_rows)]
    return np.stack([r.ids for r in rows]), np.stack([r.kinds for r in rows])


def _compose_task(rng: random.Random, source: Source, length: int, name: str) -> Sample:
    """Return samples of a task, one for the whole row in half of all rows, else of several lengths;
    each is followed by the tokenizer's end of a document."""
    if name == "plain":
        return plain_text(rng, source, length)
    ending = _ending(source)
    samples: list[Sample] = []
    missing = length
    while missing >= MIN_ROW:
        room = missing
        if name not in FOCI and rng.random() < 0.5:
            room = min(missing, log_uniform(rng, 400, length))
        sample = _try(rng, source, room - len(ending), name)
        if sample is None and room < missing:
            sample = _try(rng, source, missing - len(ending), name)
        if sample is None:
            break
        samples += [sample, *ending]
        missing -= len(sample.piece) + len(ending)
    if not samples:
        return plain_text(rng, source, length)
    if missing > len(ending):
        samples = [plain_text(rng, source, missing - len(ending)), *ending, *samples]
    elif missing:
        samples = [*ending, *samples]
    return _join(name, samples)


def _ending(source: Source) -> list[Sample]:
    """Return what follows a sample: one token, or nothing where the tokenizer has no such token."""
    end = source.table.end
    return [] if end is None else [Sample("", filler(np.array([end]), Kind.TEXT), ())]


def _try(rng: random.Random, source: Source, room: int, name: str) -> Sample | None:
    """Return a sample of at most ``room`` tokens from one of a few draws."""
    for _ in range(_ATTEMPTS):
        sample = TASKS[name](rng, source, room)
        if sample is not None and len(sample.piece) <= room:
            return sample
    return None


def _compose_pack(
    rng: random.Random, source: Source, length: int, mixture: Mixture
) -> Sample:
    """Short rows of random lengths and tasks."""
    samples: list[Sample] = []
    missing = length
    while missing > 0:
        size = log_uniform(rng, 160, 2048)
        size = missing if missing - size < MIN_ROW else size
        samples.append(_compose_task(rng, source, size, mixture.draw(rng, size)))
        missing -= size
    return _join("packed", samples)


def _join(name: str, samples: Sequence[Sample]) -> Sample:
    """Join samples, one behind the other, to one."""
    answers, start = [], 0
    for sample in samples:
        answers += [answer.moved(start) for answer in sample.answers]
        start += len(sample.piece)
    return Sample(name, concat([sample.piece for sample in samples]), tuple(answers))
