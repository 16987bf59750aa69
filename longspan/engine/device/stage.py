"""Pipeline stages: slices of the layers, in one process or one for each rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from longspan.attention.ranks import RankGroup
from longspan.model import CausalLM
from longspan.ops.types import PagedKV


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineStage:
    """A slice of the layers and the keys and values of those layers."""

    model: CausalLM
    caches: tuple[PagedKV, ...]


class StageLink(ABC):
    """A rank's place in a ring of stages. Rows go on to the next rank, and from the last one to the
    first, in the order in which they are sent."""

    def __init__(self, index: int, count: int) -> None:
        self.index, self.count = index, count
        self._fetched = deque[Tensor]()

    @abstractmethod
    def send(self, rows: Tensor) -> None:
        """Send rows [n, M] to the next rank, without a wait; they must not change any more."""

    def fetch(self, num_rows: int) -> None:
        """Receive rows for `receive`: what follows is then computed without a wait for others."""
        self._fetched.append(self._receive(num_rows))

    def receive(self, num_rows: int) -> Tensor:
        """Return the next rows [n, M] of the rank before; on GPUs without a wait of the host."""
        rows = self._fetched.popleft() if self._fetched else self._receive(num_rows)
        assert rows.shape[0] == num_rows, "both ranks think of the same step"
        return rows

    @abstractmethod
    def _receive(self, num_rows: int) -> Tensor:
        """Return rows that were sent, in order."""


class StagePlace(NamedTuple):
    """A process's part among several."""

    link: StageLink | None = None
    """Its place in a pipeline; None: it has all layers."""
    layers: range | None = None
    """Its layers in a pipeline."""
    heads: RankGroup | None = None
    """Ranks that share the heads of each layer; None: this one has all of them."""


ALONE = StagePlace()
