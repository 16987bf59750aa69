"""Probe rows of a prefill segment: the queries that selection estimates attention from, and their
scores."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from longspan.ops.geometry import COARSE, continuous_query_position, spans
from longspan.ops.reference import rotate
from longspan.ops.tiles.attend import scores_fp32
from longspan.ops.types import Budget, QueryRotary

PAPER_TILE_LEN = 64
"""Rows of a query tile, and keys of a window, in ``paper`` mode."""


def near_tiles(budget: Budget, rotary: QueryRotary, stop: int, tile_len: int) -> int | None:
    """Return `Selection.near_tiles` for queries up to ``stop``: the budget's, unless tiles that
    would share a mean could lie in two zones."""
    whole = rotary.stride % (COARSE * tile_len) == 0 or stop <= rotary.stride
    return budget.near_len // tile_len if whole and budget.near_len is not None else None


class Probe(NamedTuple):
    """Rows at positions first, first + step, ...: their place in a segment."""

    first: int
    step: int
    num_rows: int

    def positions(self, device: torch.device) -> Tensor:
        """Return the rows' positions, [rows] int64."""
        return self.first + self.step * torch.arange(self.num_rows, device=device)


def place_probes(start: int, num_queries: int, tile_len: int, budget: Budget) -> list[Probe]:
    """Choose the last rows and, in tile mode, the strided ones. Both are spread over the places of
    a tile as evenly as their number and the segment allow."""
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


def probe_scores(
    q: Tensor, k: Tensor, positions: Tensor, start: int, rotary: QueryRotary, scale: float
) -> Tensor:
    """Compute the scores of some rows against all keys, [rows, S] fp32; -inf for keys behind the
    row.

    q: [T, D] of one head, queries from ``start`` on; k: [S, D]; positions: [rows] ascending.
    """
    rows = q[positions - start]
    scores = torch.empty(len(rows), k.shape[0], device=q.device)
    for span in spans(start, start + q.shape[0], rotary.stride):
        continuous = continuous_query_position(positions, span.zone, rotary.stride, rotary.clamp)
        angles = continuous.float()[:, None] * rotary.inv_freq
        rotated = rotate(rows[:, None], angles.cos() * scale, angles.sin() * scale)[:, 0]
        _scores_into(scores[:, span.start : span.stop], rotated, k[span.start : span.stop])
    future = torch.arange(start, k.shape[0], device=q.device) > positions[:, None]
    scores[:, start:].masked_fill_(future, -math.inf)
    return scores


def _scores_into(out: Tensor, q: Tensor, k: Tensor) -> None:
    """Set out [n, S] fp32, rows apart in memory, to q k^T; q: [n, D], k: [S, D]."""
    if q.dtype == torch.float32:
        torch.mm(q, k.T, out=out)
    else:
        out.copy_(scores_fp32(q[None], k[None])[0])
