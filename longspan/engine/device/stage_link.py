"""Rows of activations between the ranks of a pipeline, by torch.distributed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.engine.device.stage import StageLink


class DistributedLink(StageLink):
    """A rank's place in the ring (`longspan.engine.device.stage.StageLink`).

    Each edge of the ring is a group of its own: what waits on one must not hold up another, and
    with two ranks both edges connect the same pair.

    Args:
        rank: this one.
        rings: of all ranks, each in the order of its stages.
        hidden_size: of a row.
        dtype: of rows.
        device: where they are.

    Made on all ranks at a time, on the thread that computes.
    """

    def __init__(
        self, rank: int, rings: Sequence[Sequence[int]], *, hidden_size: int, dtype: torch.dtype,
        device: str,
    ) -> None:
        ring = next(ring for ring in rings if rank in ring)
        index, count = ring.index(rank), len(ring)
        super().__init__(index, count)
        self._hidden_size, self._dtype, self._device = hidden_size, dtype, device
        pairs = [(one, other) for every in rings
                 for one, other in zip(every, (*every[1:], every[0]), strict=True)]
        edges = {pair: dist.new_group(sorted(pair)) for pair in pairs}
        self._next, self._previous = ring[(index + 1) % count], ring[index - 1]
        self._out, self._in = edges[rank, self._next], edges[self._previous, rank]
        self._sent = deque[tuple[dist.Work, Tensor]]()

    def send(self, rows: Tensor) -> None:
        """Send rows to the next rank; they are kept until they have left."""
        while self._sent and (self._sent[0][0].is_completed() or len(self._sent) > 4 * self.count):
            self._sent.popleft()[0].wait()
        rows = rows.contiguous()
        self._sent.append((_begin(dist.isend, rows, self._next, self._out), rows))

    def _receive(self, num_rows: int) -> Tensor:
        rows = torch.empty(num_rows, self._hidden_size, dtype=self._dtype, device=self._device)
        _begin(dist.irecv, rows, self._previous, self._in).wait()
        return rows


def _begin(op: Callable[..., Any], rows: Tensor, peer: int, group: dist.ProcessGroup) -> dist.Work:
    """Begin to send or receive; as a batch of one, for NCCL warns of any other way."""
    (work,) = dist.batch_isend_irecv([dist.P2POp(op, rows, peer, group)])
    return work
