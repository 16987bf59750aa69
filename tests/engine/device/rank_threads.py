"""Ranks as threads of one process: a group that exchanges tensors by handing them over. What each
rank sees of the others is what torch.distributed would bring."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from longspan.attention.ranks import RankGroup

Result = TypeVar("Result")
WAIT_S = 60.0


class Board:
    """Where ranks put what the others take."""

    def __init__(self, size: int) -> None:
        self.places: list[Any] = [None] * size
        self.barrier = threading.Barrier(size)

    def swap(self, rank: int, value: Any) -> list[Any]:
        """Put a value; returns those of all ranks."""
        self.places[rank] = value
        self.barrier.wait(WAIT_S)
        found = list(self.places)
        self.barrier.wait(WAIT_S)
        return found


class _Later(NamedTuple):
    gathered: Tensor

    def wait(self) -> Tensor:
        return self.gathered


class ThreadGroup(RankGroup):
    """One thread's view of the group."""

    def __init__(self, rank: int, board: Board) -> None:
        super().__init__(rank, len(board.places))
        self._board = board
        self.num_gathered = self.num_exchanges = self.num_merges = self.num_sums = 0

    def begin_gather(self, x: Tensor) -> Any:
        self.num_gathered += 1
        self.num_merges += x.dim() == 1 and x.dtype == torch.float32
        shapes = {(part.shape, part.dtype) for part in self._board.swap(self.rank, x)}
        assert len(shapes) == 1, shapes
        found = torch.stack([part.clone() for part in self._board.swap(self.rank, x)])
        self._board.barrier.wait(WAIT_S)  # nobody writes on where another one still reads
        return _Later(found)

    def begin_swap(
        self, sent: Sequence[Sequence[Tensor]], received: Sequence[Sequence[Tensor]],
    ) -> Any:
        self.num_exchanges += 1
        every = self._board.swap(self.rank, sent)
        for rank, parts in enumerate(received):
            if rank != self.rank:
                for place, part in zip(parts, every[rank][self.rank], strict=True):
                    assert place.is_contiguous() and part.is_contiguous()
                    place.copy_(part)
        self._board.barrier.wait(WAIT_S)
        return _Later(torch.empty(0))

    def begin_sum(self, x: Tensor) -> Any:
        self.num_sums += 1
        return _Later(self.sum(x))

    def sum(self, x: Tensor) -> Tensor:
        total = torch.stack([part.clone() for part in self._board.swap(self.rank, x)]).sum(0)
        self._board.barrier.wait(WAIT_S)
        return x.copy_(total)


class ThreadRanks:
    """Runs the same function on every rank's thread."""

    def __init__(self, size: int) -> None:
        self._board = Board(size)
        self.groups = [ThreadGroup(rank, self._board) for rank in range(size)]
        self._pools = [ThreadPoolExecutor(1) for _ in range(size)]

    def run(self, task: Callable[[int], Result]) -> list[Result]:
        """Call ``task(rank)`` on every rank; one that fails lets the others go."""
        futures = [pool.submit(self._guarded, task, rank) for rank, pool in enumerate(self._pools)]
        errors = [error for error in (future.exception() for future in futures) if error]
        for error in sorted(errors, key=lambda one: isinstance(one, threading.BrokenBarrierError)):
            raise error
        return [future.result() for future in futures]

    def close(self) -> None:
        """End the threads."""
        for pool in self._pools:
            pool.shutdown()

    def _guarded(self, task: Callable[[int], Result], rank: int) -> Result:
        try:
            return task(rank)
        except BaseException:
            self._board.barrier.abort()
            raise
