"""Key tiles that single query tiles need: the third part of a selection, found by scouts.

Columns and windows serve all queries of a segment, chosen by probes that stand for most of them. A
question in the middle of a prompt is a few rows that need a few keys of their own. Such rows tell
themselves apart: they look least like the segment's mean query. The scouts are those rows, for each
head. Each is scored exactly against every key that it may see, and where a logit passes the LSE of
the keys that the scout has already (plus a threshold), the key's tile joins the list of the scout's
own query tile: at threshold 0, where the kept keys hold less mass than that one key. A list holds
the tiles with the largest excess, up to a cap.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longspan.ops.geometry import num_scouts
from longspan.ops.select.probes import probe_scores
from longspan.ops.types import Budget, QueryRotary, Selection

ROWS_AT_ONCE = 64
"""Scouts whose scores are in memory at a time."""


def add_scouts(
    selection: Selection, q: Tensor, k: Tensor, start: int, rotary: QueryRotary, scale: float,
    budget: Budget,
) -> Selection:
    """Return the selection of one segment, in one DCA chunk, with its lists of key tiles.

    q: [T, H, D] not rotated, at ``start`` and behind; k: [S, K, D], S = start + T. Memory:
    `ROWS_AT_ONCE` x S fp32 for one head.
    """
    first_tile, group = start // selection.tile_len, q.shape[1] // k.shape[1]
    count = num_scouts(len(q), k.shape[0], budget.num_scouts, budget.most_scouts)
    lists, rows = [], []
    for head in range(q.shape[1]):
        scouts = place_scouts(q[:, head], count)
        excess = _excess(selection, head, q[:, head], k[:, head // group], start + scouts, start,
                         rotary, scale)
        lists.append(_largest_tiles(excess, budget))
        rows.append(scouts)
    return selection._replace(tiles=torch.stack(lists), first_tile=first_tile,
                              scouts=torch.stack(rows))


def place_scouts(q: Tensor, count: int) -> Tensor:
    """Find the rows with the lowest cosine to the mean query, ascending. q: [T, D] of one head."""
    q = q.float()
    cosines = torch.nn.functional.normalize(q, dim=1) @ q.mean(0)  # but for the mean's length
    return torch.topk(cosines, min(count, len(q)), largest=False).indices.sort().values


def _excess(
    selection: Selection, head: int, q: Tensor, k: Tensor, scouts: Tensor, start: int,
    rotary: QueryRotary, scale: float,
) -> Tensor:
    """Return the largest logit of each key tile less the LSE of what the row keeps, over the scouts
    of each query tile: [n, all tiles] fp32. -inf: no scout, a window, or columns only.

    q: [T, D]; k: [S, D]; scouts: [rows] positions.
    """
    tile_len, first_tile = selection.tile_len, start // selection.tile_len
    num_tiles = -(-k.shape[0] // tile_len)
    tiles = torch.arange(num_tiles, device=k.device)
    offsets, columns = selection.offsets[head], selection.columns[head]
    windows, columns = -offsets[offsets < tile_len] // tile_len, columns[columns >= 0]
    is_window = torch.isin(tiles, windows)  # by gap
    excess = torch.full((num_tiles - first_tile, num_tiles), -math.inf, device=k.device)
    for rows in scouts.split(ROWS_AT_ONCE):
        own = rows[:, None] // tile_len
        scores = probe_scores(q, k, rows, start, rotary, scale)
        if k.shape[0] % tile_len:
            scores = torch.nn.functional.pad(
                scores, (0, -k.shape[0] % tile_len), value=-math.inf)
        seen_alone = scores[:, columns]
        by_tile = scores.index_fill_(1, columns, -math.inf).unflatten(1, (-1, tile_len))
        row, there = torch.arange(len(rows), device=k.device)[:, None], own - windows
        seen = by_tile[row, there.clamp(min=0)].masked_fill_(there[..., None] < 0, -math.inf)
        missed = by_tile.amax(2).masked_fill_(is_window[(own - tiles).clamp(min=0)], -math.inf)
        kept = torch.cat((seen_alone, seen.flatten(1)), 1)
        missed -= torch.logsumexp(kept, 1, keepdim=True)
        excess.scatter_reduce_(0, (own - first_tile).expand_as(missed), missed, "amax")
    return excess


def _largest_tiles(excess: Tensor, budget: Budget) -> Tensor:
    """Return [n, X] int32 tiles above the threshold, the largest where there are more than the cap
    X."""
    num_tiles = excess.shape[1]
    top = torch.topk(excess, min(budget.scout_tiles, num_tiles), dim=1)
    tiles = top.indices.masked_fill(top.values <= budget.scout_threshold, num_tiles)
    tiles = tiles.sort(1).values
    tiles = tiles.masked_fill(tiles == num_tiles, -1).int()
    return torch.nn.functional.pad(tiles, (0, budget.scout_tiles - tiles.shape[1]), value=-1)
