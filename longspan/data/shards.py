"""Rows as Parquet files that any trainer reads; each file is whole or not there.

Columns: ``input_ids`` list<uint32>, ``loss_weights`` list<float32> of the same length, ``length``,
``task``, and, one entry an answer, ``answer_starts``, ``answer_stops`` (tokens [start, stop)) and
``distances`` (tokens from the evidence; 0: the text does not hold it). A file depends on the seed,
the corpus and its place only, so a run that was cut goes on with the files that are missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from longspan.data.draft import Sample
from longspan.data.rows import Mixture, check_row_length, compose_row
from longspan.data.source import Source
from longspan.data.tokens import Kind
from longspan.errors import LongspanError
from longspan.files.parquet import arrow
from longspan.files.whole import replaced

SHARD_TOKENS = 1 << 21
"""Tokens of a file, at most, unless one row has more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowPlanner:
    """Which rows there shall be."""

    num_rows: Mapping[int, int]
    """Training rows by length."""
    mixture: Mixture
    seed: int
    answer_weight: float = 5.0
    copy_weight: float = 2.0
    held_out: float = 0.02
    """Held-out rows for each training row, one at least; 0: none."""

    def __post_init__(self) -> None:
        for length in self.num_rows:
            check_row_length(length)

    def shards(self, num_held_out_tokens: int) -> list[Shard]:
        """All files, shortest rows first. No held-out row is longer than all held-out text."""
        found = []
        for length, count in sorted(self.num_rows.items()):
            found += _cut("train", length, count)
            if self.held_out and length <= num_held_out_tokens:
                found += _cut("held_out", length, max(1, round(count * self.held_out)))
        return found

    def kind_weights(self) -> np.ndarray:
        """Loss weight of each `Kind`; a value that is random at its first mention has none."""
        weights = {Kind.PLANTED: 0.0, Kind.ANSWER: self.answer_weight, Kind.COPY: self.copy_weight}
        return np.array([weights.get(kind, 1.0) for kind in Kind], np.float32)


@dataclass(frozen=True, slots=True)
class Shard:
    """One file: consecutive rows of a split and length."""

    split: str
    length: int
    index: int
    first: int
    num_rows: int

    @property
    def name(self) -> str:
        """The file's name."""
        return f"{self.split}-{self.length:07d}-{self.index:05d}.parquet"


def _cut(split: str, length: int, count: int) -> list[Shard]:
    most = max(1, SHARD_TOKENS // length)
    return [Shard(split, length, i, first, min(most, count - first))
            for i, first in enumerate(range(0, count, most))]


def write_shard(shard: Shard, source: Source, planner: RowPlanner, folder: Path) -> None:
    """Compose the rows of a file and write it."""
    salt = 1 if shard.split == "held_out" else 0
    rows = [compose_row((planner.seed, salt, shard.length, shard.first + i), source, shard.length,
                        planner.mixture) for i in range(shard.num_rows)]
    pyarrow = arrow()
    table = _table(rows, planner.kind_weights())
    with replaced(folder / shard.name) as part:
        pyarrow.parquet.write_table(table, part, compression="zstd")


def _table(rows: Sequence[Sample], kind_weights: np.ndarray) -> object:
    pyarrow = arrow()
    weights = [kind_weights[row.piece.kinds] for row in rows]
    # What nothing came before cannot be predicted.
    for row_weights in weights:
        row_weights[0] = 0.0
    lists = {
        "input_ids": ([row.piece.ids for row in rows], pyarrow.uint32()),
        "loss_weights": (weights, pyarrow.float32()),
        "answer_starts": ([[a.start for a in row.answers] for row in rows], pyarrow.int32()),
        "answer_stops": ([[a.stop for a in row.answers] for row in rows], pyarrow.int32()),
        "distances": ([[a.distance for a in row.answers] for row in rows], pyarrow.int32())}
    columns = {name: pyarrow.array(values, pyarrow.list_(kind))
               for name, (values, kind) in lists.items()}
    columns["length"] = pyarrow.array([len(row.piece) for row in rows], pyarrow.int32())
    columns["task"] = pyarrow.array([row.task for row in rows], pyarrow.string())
    return pyarrow.table(columns)


def check_lengths(source: Source, planner: RowPlanner, tasks: Sequence[str]) -> None:
    """Raise `LongspanError` when rows are longer than all text, or a task needs longer documents
    than there are."""
    longest, total = int(source.corpus.lengths[-1]), int(source.corpus.lengths.sum())
    wanted = [name for name in tasks if planner.mixture.weights.get(name)]
    length = max(planner.num_rows)
    if total < length:
        raise LongspanError(f"rows of {length:,} tokens: all training text has {total:,}; add text "
                            "or ask for shorter rows")
    if wanted and not source.may_join and 2 * longest < length:
        raise LongspanError(
            f"{', '.join(wanted)} in rows of {length:,} tokens: a document of {length // 2:,} is "
            f"needed, the longest has {longest:,}; ask for shorter rows, or --join-short")
