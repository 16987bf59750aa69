"""The best that key tiles can do: for each head and query tile those that hold most attention mass.

What no selection can know beforehand, since it takes the whole of dense attention to find them. It
shows in `longspan bench quality` how much of what a policy loses is lost by choosing, and how much
by keeping so little.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.ops.geometry import spans
from longspan.ops.select.probes import near_tiles
from longspan.ops.tiles.attend import ordered_kv, rotated_queries, scores_fp32
from longspan.ops.types import Budget, PagedKV, QueryRotary, Selection

ROWS_AT_ONCE = 1_024
"""Queries whose scores are in memory at a time, of one head."""


@dataclass(frozen=True, slots=True)
class Oracle:
    """Selects as `ops.select_vertical_slash` does, by the true mass.

    Args:
        share: of the key tiles that a query tile may see, its own among them.
    """

    share: float

    def __call__(
        self, q: Tensor, cache: PagedKV, block_table: Tensor, cached_len: int, rotary: QueryRotary,
        scale: float, budget: Budget,
    ) -> Selection:
        """Choose for queries at cached_len ... cached_len + T - 1, whole tiles of one DCA chunk.

        q: [T, H, D] not rotated. Memory: `ROWS_AT_ONCE` x S fp32.
        """
        tile_len, num_heads = cache.k.shape[1], q.shape[1]
        stop = cached_len + q.shape[0]
        first, num_tiles = cached_len // tile_len, stop // tile_len
        keys, _ = ordered_kv(cache, block_table, stop)
        own = torch.arange(first, num_tiles, device=q.device)
        counts = torch.ceil(self.share * (own + 1)).long() - 1
        width = max(1, math.ceil(self.share * num_tiles) - 1)
        found = []
        for head in range(num_heads):
            mass = _tile_masses(q[:, head : head + 1], keys[:, head * keys.shape[1] // num_heads],
                                cached_len, rotary, scale, tile_len)
            mass.masked_fill_(torch.arange(num_tiles, device=q.device) >= own[:, None], -1.0)
            top = torch.topk(mass, min(width, num_tiles), dim=1)
            rank = torch.arange(top.indices.shape[1], device=q.device)
            is_kept = (rank < counts[:, None]) & (top.values >= 0)
            tiles = top.indices.masked_fill(~is_kept, num_tiles).sort(1).values
            found.append(tiles.masked_fill(tiles == num_tiles, -1).int())
        sinks = torch.arange(min(budget.sink, stop), device=q.device).expand(num_heads, -1)
        return Selection(
            sinks.contiguous(), torch.zeros(num_heads, 1, dtype=torch.int64, device=q.device),
            tile_len, aligned=True, tiles=torch.stack(found), first_tile=first,
            near_tiles=near_tiles(budget, rotary, stop, tile_len))


def _tile_masses(
    q: Tensor, k: Tensor, start: int, rotary: QueryRotary, scale: float, tile_len: int,
) -> Tensor:
    """Return the attention mass of each key tile, summed over the rows of each query tile: [n,
    tiles] fp32. q: [T, 1, D]; k: [S, D]."""
    stop = start + q.shape[0]
    keys = torch.arange(k.shape[0], device=q.device)
    queries = {span.zone: rotated_queries(q, start, span.zone, rotary)[:, 0]
               for span in spans(start, stop, rotary.stride)}
    found = []
    for first in range(start, stop, ROWS_AT_ONCE):
        rows = slice(first - start, min(first + ROWS_AT_ONCE, stop) - start)
        scores = torch.cat([
            scores_fp32(queries[span.zone][None, rows], k[None, span.start : span.stop])[0] * scale
            for span in spans(start, stop, rotary.stride)], 1)
        positions = torch.arange(first, first + scores.shape[0], device=q.device)
        scores.masked_fill_(keys > positions[:, None], -math.inf)
        weights = torch.softmax(scores, -1)
        found.append(weights.unflatten(1, (-1, tile_len)).sum(2)
                     .unflatten(0, (-1, tile_len)).sum(1))
    return torch.cat(found)
