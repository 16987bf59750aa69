"""One step's rows, and where a run gets them from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from longspan.train.phases import Phase, Shape

FILLER, ANSWER = 0, 3
"""Kinds of tokens that a run reports on: natural text, and answers. ``longspan.data`` has the same
numbers."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one optimizer step, or a part of them."""

    ids: Tensor
    """int32 [B, T]."""
    weights: Tensor
    """fp32 [B, T]: what the prediction of this token counts in the loss."""
    kinds: Tensor
    """uint8 [B, T]: `FILLER`, `ANSWER` or anything else; for the log only."""
    reference: Tensor | None = None
    """fp32 [B]: log-probability of the row's answer before preference training."""

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return self._each(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Return the batch where copies to a GPU need not wait."""
        return self._each(Tensor.pin_memory)

    def rows(self, start: int, stop: int) -> Batch:
        """Return rows [start, stop)."""
        return self._each(lambda x: x[start:stop])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        reference = None if self.reference is None else change(self.reference)
        return Batch(change(self.ids), change(self.weights), change(self.kinds), reference)


class Feed(Protocol):
    """Gives a run the rows of every step, the same ones whenever it is asked."""

    @property
    def identity(self) -> Mapping[str, str]:
        """What decides the rows, by name: a run is resumed only with the same."""
        ...

    @property
    def held_out(self) -> Batch | None:
        """Rows of text that no step has, all `FILLER`."""
        ...

    def schedule(self, index: int, phase: Phase) -> Sequence[Shape]:
        """Rows and row length of every step of a phase."""
        ...

    def batches(self, index: int, phase: Phase, first: int) -> Iterator[Batch]:
        """Batches of the steps from ``first`` on of a phase."""
        ...
