"""Rows from Parquet files, as ``longspan synth`` and others write them.

Columns: ``input_ids``, ``loss_weights`` of the same lengths (or ``labels``, -100 where nothing is
learnt), and where there are any ``answer_starts`` and ``answer_stops``, for the log. Each row is
used once at most.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longspan.errors import LongspanError
from longspan.files.parquet import arrow
from longspan.train.batch import ANSWER, FILLER, Batch
from longspan.train.phases import Phase, Shape
from longspan.train.state import digest

OTHER = 1
"""Kind of tokens that are neither natural text nor an answer."""


def is_rows_folder(path: Path) -> bool:
    """Whether a folder has training rows."""
    return path.is_dir() and any(path.glob("train-*.parquet"))


@dataclass(frozen=True, kw_only=True, slots=True)
class RowsFeed:
    """Rows of Parquet files, by length."""

    files: tuple[Path, ...]
    places: Mapping[int, Sequence[tuple[int, int]]]
    """By row length: (file, row in it) of each row, in the order of their use."""
    phases: tuple[Phase, ...]
    seed: int
    identity: Mapping[str, str]
    held_out: Batch | None = None

    @classmethod
    def open(
        cls, folder: Path, phases: Sequence[Phase], *, seed: int, vocab_size: int,
        held_out: Batch | None = None, identity: Mapping[str, str] | None = None,
    ) -> RowsFeed:
        """Find the rows. Raises `LongspanError` where a phase needs more than there are, or rows
        are of another vocabulary."""
        files = tuple(sorted(folder.glob("train-*.parquet")))
        places: dict[int, list[tuple[int, int]]] = {}
        for number, file in enumerate(files):
            for row, (length, largest) in enumerate(_facts(file)):
                if largest >= vocab_size:
                    raise LongspanError(f"{file}: token {largest:,} is beyond the model's "
                                        f"{vocab_size:,}: make rows with its tokenizer")
                places.setdefault(length, []).append((number, row))
        for length, found in places.items():
            random.Random(f"{seed}/{length}").shuffle(found)
        feed = cls(
            files=files, places=places, phases=tuple(phases), seed=seed, held_out=held_out,
            identity={**(identity or {}), "data seed": str(seed),
                      "data": " ".join(digest(file) for file in files)})
        feed._check()
        return feed

    def _check(self) -> None:
        for length, count in sorted(self._used(len(self.phases)).items()):
            there = len(self.places.get(length, ()))
            if count > there:
                raise LongspanError(
                    f"the phases need {count:,} rows of {length:,} tokens, there are {there:,}: "
                    f"make more (longspan synth --rows {length}={count}), or train on fewer tokens")

    def _used(self, num_phases: int) -> Counter[int]:
        """Rows of each length that the first phases use."""
        used: Counter[int] = Counter()
        for index, phase in enumerate(self.phases[:num_phases]):
            for rows, length in self.schedule(index, phase):
                used[length] += rows
        return used

    def schedule(self, index: int, phase: Phase) -> Sequence[Shape]:
        """Rows and row length of every step of a phase."""
        return phase.schedule(self.seed)

    def batches(self, index: int, phase: Phase, first: int) -> Iterator[Batch]:
        """Batches of the steps from ``first`` on of a phase."""
        used = self._used(index)
        tables: dict[int, Any] = {}
        for step, (rows, length) in enumerate(self.schedule(index, phase)):
            chosen = self.places[length][used[length] : used[length] + rows]
            used[length] += rows
            if step >= first:
                yield _batch([self._row(tables, *place) for place in chosen])

    def _row(self, tables: dict[int, Any], file: int, row: int) -> dict[str, Any]:
        if file not in tables:
            if len(tables) > 8:
                tables.pop(next(iter(tables)))
            tables[file] = arrow().parquet.read_table(self.files[file])
        found: dict[str, Any] = {
            name: tables[file][name][row].as_py() for name in tables[file].column_names}
        return found


def _facts(file: Path) -> Iterator[tuple[int, int]]:
    """Length and largest token of each row. Raises `LongspanError` for a file that is not whole or
    has not the columns."""
    pyarrow = arrow()
    try:
        names = pyarrow.parquet.read_schema(file).names
        if "input_ids" not in names or not {"loss_weights", "labels"} & set(names):
            raise LongspanError(f"{file} has columns {', '.join(names)}: input_ids and "
                                "loss_weights (or labels) are needed")
        for ids in pyarrow.parquet.read_table(file, columns=["input_ids"])["input_ids"]:
            values = ids.values.to_numpy()
            yield len(values), int(values.max())
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise LongspanError(f"{file} cannot be read ({str(error)[:120]}): make it again") from None


def _batch(rows: Sequence[Mapping[str, Any]]) -> Batch:
    ids = np.array([row["input_ids"] for row in rows], np.int32)
    if "loss_weights" in rows[0]:
        weights = np.array([row["loss_weights"] for row in rows], np.float32)
    else:
        weights = (np.array([row["labels"] for row in rows]) >= 0).astype(np.float32)
    kinds = np.where(weights == 1, FILLER, OTHER).astype(np.uint8)
    for row, of_row in zip(rows, kinds, strict=True):
        starts, stops = row.get("answer_starts") or (), row.get("answer_stops") or ()
        for start, stop in zip(starts, stops, strict=True):
            of_row[start:stop] = ANSWER
    return Batch(torch.from_numpy(ids), torch.from_numpy(weights), torch.from_numpy(kinds))
