"""Batches made by worker processes, each step's from its own seed, so that a run can resume."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from longspan.errors import LongspanError
from longspan.train.batch import Batch
from longspan.train.phases import Phase, Shape
from longspan.train.state import digest

NUM_KINDS = 256


class RowMaker(Protocol):
    """Makes the rows of one step."""

    def __call__(
        self, *, seed: Sequence[int], num_rows: int, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and kinds, both [num_rows, length]; the same ones for the same seed."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ComposedFeed:
    """Rows that are composed while training, from a corpus."""

    open_rows: Callable[[Phase], RowMaker]
    """Opens what the rows of a phase are made from; called once in each worker process."""
    kind_weights: Mapping[int, float]
    """Loss weight of each token kind; a kind that is not named weighs 1."""
    inputs: Mapping[str, Path] = field(default_factory=dict)
    """What the rows are made from, by name; a resumed run must find the same content there."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """How they are made, likewise."""
    seed: int = 0
    num_workers: int = 0
    held_out: Batch | None = None
    """Rows of text that no step has."""

    def __post_init__(self) -> None:
        wrong = [kind for kind in self.kind_weights if not 0 <= kind < NUM_KINDS]
        if wrong:
            raise LongspanError(f"kind_weights names kind {wrong[0]}: kinds are 0 to "
                                f"{NUM_KINDS - 1}")

    @property
    def identity(self) -> Mapping[str, str]:
        """Digests of the inputs, and the settings. Raises `LongspanError` if one is missing."""
        weights = {int(kind): weight for kind, weight in sorted(self.kind_weights.items())}
        return {**{name: digest(path) for name, path in self.inputs.items()}, **self.settings,
                "kind_weights": str(weights), "data seed": str(self.seed)}

    def schedule(self, index: int, phase: Phase) -> Sequence[Shape]:
        """Rows and row length of every step of a phase."""
        return phase.schedule(self.seed)

    def batches(self, index: int, phase: Phase, first: int) -> Iterator[Batch]:
        """Batches of the steps from ``first`` on; without workers made in this process."""
        weights = np.ones(NUM_KINDS, np.float32)
        for kind, weight in self.kind_weights.items():
            weights[kind] = weight
        steps = StepDataset(partial(self.open_rows, phase), (self.seed, index),
                            self.schedule(index, phase), weights)
        return step_loader(steps, first, self.num_workers)


class StepDataset(Dataset[Batch]):
    """Batches by step number, so that any worker can make any step.

    Args:
        weights: loss weight of each kind, fp32 [`NUM_KINDS`].
    """

    def __init__(
        self, open_rows: Callable[[], RowMaker], seed: Sequence[int], shapes: Sequence[Shape],
        weights: np.ndarray,
    ) -> None:
        self.open_rows, self.seed, self.shapes = open_rows, tuple(seed), shapes
        self.weights = weights
        self.rows: RowMaker | None = None

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, step: int) -> Batch:
        # Each worker opens what it reads itself: memory maps and tokenizers do not travel well.
        self.rows = self.rows or self.open_rows()
        num_rows, length = self.shapes[step]
        ids, kinds = self.rows(seed=(*self.seed, step), num_rows=num_rows, length=length)
        return Batch(torch.from_numpy(ids.astype(np.int32)),
                     torch.from_numpy(self.weights[kinds]), torch.from_numpy(kinds))


def step_loader(steps: Dataset[Batch], first: int, num_workers: int) -> Iterator[Batch]:
    """Batches of a data set of steps, in order from step ``first`` on."""
    loader = DataLoader(
        steps, batch_size=None, sampler=range(first, len(steps)),  # type: ignore[arg-type]
        num_workers=num_workers, prefetch_factor=4 if num_workers else None,
        pin_memory=torch.cuda.is_available(), worker_init_fn=_leave_signals_to_the_loop)
    return iter(loader)


def _leave_signals_to_the_loop(worker: int) -> None:
    """Ignore what ends a run by saving it: schedulers and terminals signal all processes at once,
    and a loop without its workers could not take the step that is under way to its end."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
