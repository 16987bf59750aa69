"""Probe rows of a prefill segment: the queries that selection estimates attention from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longspan.ops.types import Budget

PAPER_TILE_LEN = 64
"""Rows of a query tile, and keys of a window, in ``paper`` mode."""


class Probe(NamedTuple):
    """Rows at positions first, first + step, ...: their place in a segment."""

    first: int
    step: int
    num_rows: int

    def positions(self, device: torch.device) -> Tensor:
        """[rows] int64"""
        return self.first + self.step * torch.arange(self.num_rows, device=device)


def place_probes(start: int, num_queries: int, tile_len: int, budget: Budget) -> list[Probe]:
    """The last rows and, in tile mode, the strided ones. Both are spread over the places of a tile
    as evenly as their number and the segment allow."""
    last, step = min(budget.probe_last, num_queries), 1
    if budget.mode == "tile" and last * (tile_len // last) <= num_queries:
        step = max(1, tile_len // last)
    rest = num_queries - 1 - step * (last - 1)
    probes = [Probe(start + rest, step, last)]
    strided = min(budget.probe_strided, rest) if budget.mode == "tile" else 0
    if strided > 0:
        step, apart = rest // strided, max(1, tile_len // strided)
        if step > tile_len:  # else neighbouring rows would often stand at the same place
            step -= (step + apart) % tile_len
        probes.append(Probe(start + (rest - step * (strided - 1)) // 2, step, strided))
    return probes
