"""Batches made by worker processes, each step's from its own seed, so that a run can resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from longspan.train.phases import Shape
from longspan.train.pretrain import Batch


class RowMaker(Protocol):
    """Makes the rows of one step."""

    def __call__(
        self, *, seed: Sequence[int], num_rows: int, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and kinds, both [num_rows, length]; the same ones for the same seed."""
        ...


class StepDataset(Dataset[Batch]):
    """Batches by step number, so that any worker can make any step."""

    def __init__(
        self, open_rows: Callable[[], RowMaker], seed: Sequence[int], shapes: Sequence[Shape]
    ) -> None:
        self.open_rows, self.seed, self.shapes = open_rows, tuple(seed), shapes
        self.rows: RowMaker | None = None

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, step: int) -> Batch:
        # Each worker opens what it reads itself: memory maps and tokenizers do not travel well.
        self.rows = self.rows or self.open_rows()
        num_rows, length = self.shapes[step]
        ids, kinds = self.rows(seed=(*self.seed, step), num_rows=num_rows, length=length)
        return torch.from_numpy(ids.astype(np.int32)), torch.from_numpy(kinds)


def loader_batches(
    open_rows: Callable[[], RowMaker], seed: int, num_workers: int, phase: int,
    schedule: Sequence[Shape], first: int,
) -> Iterator[Batch]:
    """Batches of the steps from ``first`` on of a phase; no workers: made in this process."""
    loader = DataLoader(
        StepDataset(open_rows, (seed, phase), schedule), batch_size=None,
        sampler=range(first, len(schedule)), num_workers=num_workers,
        prefetch_factor=4 if num_workers else None, pin_memory=torch.cuda.is_available())
    return iter(loader)
