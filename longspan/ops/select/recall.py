"""How much attention mass a selection keeps, measured on a few rows of the segment that it serves.

Two kinds of rows, since a selection can serve nearly all rows well and lose those that look
something up: *typical* ones, spread over the segment and none of them a probe by design, and
*scouts*, the rows least like the mean query (arXiv 2501.15383, section 5.3: recall is the
exponential of lse_sparse - lse_full). Scores are those of attention itself, not at the continuous
positions of selection. Tile means count as nothing kept.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longspan.ops.geometry import query_position, spans
from longspan.ops.reference import rotate
from longspan.ops.tiles.attend import ordered_kv, scores_fp32
from longspan.ops.types import PagedKV, QueryRotary, Selection

ROWS_PER_KIND = 8
"""Rows of each kind that are measured for each head and segment."""


def measure_recall(
    q: Tensor, cache: PagedKV, block_table: Tensor, start: int, rotary: QueryRotary, scale: float,
    selection: Selection,
) -> Tensor:
    """Return the share of their attention mass that the measured rows keep, [H, R] fp32: typical
    rows first, `num_typical` of them, then scouts, if the selection has any (tile mode).

    q: [T, H, D] not rotated, the segment that the selection was made for, from position ``start``
    on. Memory: R x S fp32 for one head.
    """
    keys, _ = ordered_kv(cache, block_table, start + q.shape[0])
    rows = place_rows(q.shape[0], selection)
    group = q.shape[1] // keys.shape[1]
    return torch.stack([
        _head_recall(q[:, head], keys[:, head // group], start, rotary, scale, selection, head,
                     rows[head]) for head in range(q.shape[1])])


def num_typical(num_queries: int) -> int:
    """Return how many typical rows a segment has."""
    return min(ROWS_PER_KIND, num_queries)


def place_rows(num_queries: int, selection: Selection) -> Tensor:
    """Return the measured rows, [H, R] int64, counted from the segment's first query."""
    device, scouts = selection.columns.device, selection.scouts
    typical = _spread(num_queries, device).expand(selection.columns.shape[0], -1)
    if scouts is None:
        return typical
    return torch.cat((typical, scouts[:, _spread(scouts.shape[1], device)].long()), 1)


def _spread(size: int, device: torch.device) -> Tensor:
    """Return `ROWS_PER_KIND` places of ``size``, fewer if there are not as many."""
    count = min(ROWS_PER_KIND, size)
    return (2 * torch.arange(count, device=device) + 1) * size // (2 * count)


def _head_recall(
    q: Tensor, k: Tensor, start: int, rotary: QueryRotary, scale: float, selection: Selection,
    head: int, rows: Tensor,
) -> Tensor:
    """Return the recall of some rows of one head, [R]. q: [T, D]; k: [S, D]; rows: [R]."""
    positions = start + rows
    scores = torch.empty(len(rows), k.shape[0], device=q.device)
    for span in spans(start, start + q.shape[0], rotary.stride):
        place = query_position(positions, span.zone, rotary.stride, rotary.clamp)
        place = place.clamp(max=rotary.cos.shape[0] - 1)
        rotated = rotate(q[rows][:, None], rotary.cos[place], rotary.sin[place])[:, 0]
        keys = slice(span.start, span.stop)
        scores[:, keys] = scores_fp32(rotated[None], k[None, keys])[0] * scale
    future = torch.arange(k.shape[0], device=q.device) > positions[:, None]
    scores.masked_fill_(future, -math.inf)
    weights = torch.softmax(scores, -1)
    kept = kept_tiles(selection, positions, -(-k.shape[0] // selection.tile_len), head)
    columns = selection.columns[head]
    columns = columns[columns >= 0]
    alone = weights[:, columns].clone()
    weights[:, columns] = 0
    weights = torch.nn.functional.pad(weights, (0, -k.shape[0] % selection.tile_len))
    return alone.sum(1) + (weights.unflatten(1, (-1, selection.tile_len)).sum(2) * kept).sum(1)


def kept_tiles(selection: Selection, positions: Tensor, num_tiles: int, head: int) -> Tensor:
    """Return which whole key tiles rows of one head keep: windows and listed tiles, [R, num_tiles]
    bool."""
    own = positions // selection.tile_len
    gaps = own[:, None] - torch.arange(num_tiles, device=positions.device)
    offsets = selection.offsets[head]
    kept = torch.isin(gaps, -offsets[offsets < selection.tile_len] // selection.tile_len)
    if selection.tiles is not None:
        tiles = selection.tiles[head, own - selection.first_tile].long()
        listed = kept.new_zeros(len(own), num_tiles + 1)
        kept |= listed.scatter_(1, tiles.where(tiles >= 0, num_tiles), True)[:, :num_tiles]
    return kept
