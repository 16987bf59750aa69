"""Vertical-slash selection for one prefill segment: which columns and windows each head attends to,
and in tile mode which further key tiles each query tile (`scouts`).

Two modes share the probe scores (probe queries against all keys, continuous positions, one softmax
over the whole row; arXiv 2501.15383, sections 5.1 and 5.4):

* ``paper``: MInference's rules. The last queries of the segment are the probe; the first ``sink``
  columns and the last ``local`` diagonals are forced; top-k of column and of diagonal sums, each
  diagonal buying a 64-key window for each 64-row tile, which attention coalesces as the public
  index kernel does (`reference.paper_windows`).
* ``tile``: whole tiles are the unit of everything but the columns. Probes are rows of the last tile
  and rows strided over the segment, spread evenly over the places of a tile: so the probe mass on
  each tile diagonal is what its queries would keep of it, wherever in its tile a diagonal runs.
  Diagonals are bought as tiles, and cost what is bought. Columns are looked for in the tiles that
  hold most of what no window covers, as many tiles as columns: what is missed stands in no heavier
  a tile. Forced sink columns do not count as diagonal mass, and mass inside a bought window does
  not count as column mass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longspan.ops.select.probes import (
    PAPER_TILE_LEN,
    Probe,
    near_tiles,
    place_probes,
    probe_scores,
)
from longspan.ops.select.scouts import add_scouts
from longspan.ops.tiles.attend import ordered_kv
from longspan.ops.types import Budget, PagedKV, QueryRotary, Selection


def select_vertical_slash(
    q: Tensor, cache: PagedKV, block_table: Tensor, cached_len: int, rotary: QueryRotary,
    scale: float, budget: Budget,
) -> Selection:
    """Choose what queries at cached_len ... cached_len + T - 1 attend to.

    q: [T, H, D] not rotated, all in one DCA chunk. Memory: probe rows x S fp32 for one head.
    """
    args = (q, cache, block_table, cached_len, rotary, scale)
    (selection,) = select_several(*args, [budget])
    if budget.mode == "paper" or budget.num_scouts == 0:
        return selection
    k, _ = ordered_kv(cache, block_table, cached_len + q.shape[0])
    return add_scouts(selection, q, k, cached_len, rotary, scale, budget)


def select_several(
    q: Tensor, cache: PagedKV, block_table: Tensor, cached_len: int, rotary: QueryRotary,
    scale: float, budgets: Sequence[Budget],
) -> list[Selection]:
    """Choose columns and windows for each of several budgets that differ in nothing else, from one
    pass of the probe rows. Arguments as `select_vertical_slash`'s."""
    num_queries, num_heads, _ = q.shape
    context_len, budget = cached_len + num_queries, budgets[0]
    k, _ = ordered_kv(cache, block_table, context_len)
    is_tiles = budget.mode == "tile"
    tile_len = cache.k.shape[1] if is_tiles else PAPER_TILE_LEN
    probes = place_probes(cached_len, num_queries, tile_len, budget)
    choose = _choose_tiles if is_tiles else _choose_paper
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in budgets]
    for head in range(num_heads):
        keys = k[:, head // (num_heads // k.shape[1])]
        rows = [probe_mass(q[:, head], keys, probe, cached_len, rotary, scale) for probe in probes]
        for chosen, each in zip(found, budgets, strict=True):
            chosen.append(choose(rows, probes, context_len, each, head, tile_len))
    near = near_tiles(budget, rotary, context_len, tile_len)
    return [_joined(chosen, tile_len, is_tiles, near) for chosen in found]


def _joined(
    heads: list[tuple[Tensor, Tensor]], tile_len: int, aligned: bool, near: int | None,
) -> Selection:
    """Return the selection of all heads, from each one's columns and offsets."""
    columns, offsets = ([head[part] for head in heads] for part in range(2))
    pad = torch.nn.utils.rnn.pad_sequence
    return Selection(pad(columns, batch_first=True, padding_value=-1),
                     pad(offsets, batch_first=True, padding_value=tile_len), tile_len,
                     aligned=aligned, near_tiles=near)


def probe_mass(
    q: Tensor, k: Tensor, probe: Probe, start: int, rotary: QueryRotary, scale: float
) -> Tensor:
    """Return the attention weights of the probe rows, [rows, S] fp32. q: [T, D] of one head; k:
    [S, D]."""
    scores = probe_scores(q, k, probe.positions(q.device), start, rotary, scale)
    return torch.softmax(scores, -1, out=scores)


def _choose_tiles(
    rows: list[Tensor], probes: list[Probe], context_len: int, budget: Budget, head: int,
    tile_len: int,
) -> tuple[Tensor, Tensor]:
    """Choose columns [V], ascending, and window offsets [W], descending, in tile mode."""
    num_tiles, device = -(-context_len // tile_len), rows[0].device
    sink = min(budget.sink, context_len)
    mass = torch.cat(rows)
    gaps = (torch.cat([probe.positions(device) for probe in probes]) // tile_len)[:, None] - (
        torch.arange(num_tiles, device=device))
    mass[:, :sink] = 0  # sinks are columns, never diagonals
    mass = torch.nn.functional.pad(mass, (0, -context_len % tile_len)).unflatten(1, (-1, tile_len))
    by_tile = mass.sum(2)
    sums = by_tile.new_zeros(num_tiles)
    sums.scatter_add_(0, gaps.clamp(min=0).flatten(), by_tile.flatten())  # none lies ahead
    forced = 1 + -(-budget.local // tile_len)
    _force(sums, forced)
    count = min(num_tiles, max(forced, -(-budget.slash[head] // tile_len)))
    windows = torch.topk(sums, count).indices.sort().values
    is_window = torch.zeros(num_tiles, dtype=torch.bool, device=device)
    is_window[windows] = True
    is_free = ~is_window[gaps.clamp(min=0)]
    weights = (by_tile * is_free).sum(0)
    _force(weights, -(-sink // tile_len))
    tiles = _largest(weights, budget.vertical[head])
    column_sums = torch.einsum("rt,rtk->tk", is_free[:, tiles].float(), mass[:, tiles]).flatten()
    _force(column_sums, sink)
    places = (tiles[:, None] * tile_len + torch.arange(tile_len, device=device)).flatten()
    inside = places < context_len
    chosen = _largest(column_sums[inside], budget.vertical[head])
    return places[inside][chosen], -windows * tile_len


def _diagonal_sums(mass: Tensor) -> Tensor:
    """Sum the mass of consecutive rows by distance: entry o is the sum over rows of the weight on
    the key o before the row. mass: [rows, S], the last row at position S - 1. Returns [S] fp32.

    Each row starts one entry further left in a view whose row stride is one more than a row, so
    that equal distances share a column.
    """
    num_rows, size = mass.shape
    padded = torch.nn.functional.pad(mass, (num_rows - 1, 0))
    return padded.as_strided((num_rows, size), (padded.shape[1] + 1, 1)).sum(0).flip(0)


def _choose_paper(
    rows: list[Tensor], probes: list[Probe], context_len: int, budget: Budget, head: int,
    tile_len: int,
) -> tuple[Tensor, Tensor]:
    """Choose columns [V], ascending, and diagonals as offsets [W], descending, by MInference's
    rules."""
    (mass,) = rows
    diagonals = _diagonal_sums(mass)
    _force(diagonals, budget.local)
    count = min(max(1, budget.slash[head]), len(diagonals))
    distances = torch.topk(diagonals, count).indices.sort().values
    column_sums = mass.sum(0)
    _force(column_sums, budget.sink)
    return _largest(column_sums, budget.vertical[head]), -distances


def _force(sums: Tensor, count: int) -> None:
    """Rank the first entries above all others, in order: a budget below the forced count then
    keeps the nearest. Probe mass is below 1e6, and integers below 2^24 are exact."""
    count = min(count, len(sums))
    sums[:count] = 2e6 - torch.arange(count, device=sums.device)


def _largest(sums: Tensor, count: int) -> Tensor:
    return torch.topk(sums, min(count, len(sums))).indices.sort().values
