"""Vertical-slash selection for one prefill segment: which columns and windows each head attends to.

Two modes share the probe scores (probe queries against all keys, continuous positions, one softmax
over the whole row; report sections 5.1 and 5.4):

* ``paper``: MInference's rules. The last queries of the segment are the probe; the first ``sink``
  columns and the last ``local`` diagonals are forced; top-k of column and of diagonal sums, each
  diagonal buying a 64-key window for each 64-row tile, windows coalesced as the public index
  kernel does.
* ``tile``: diagonals are bought as whole tiles by triangular-weighted probe mass, so cost is what
  is bought; probes are the last rows and rows strided over the segment; forced sink columns do
  not count as diagonal mass, and mass inside a bought window does not count as column mass
  (spec: selection findings).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from longspan.ops.attend import scores_fp32
from longspan.ops.eager_dense import ordered_kv
from longspan.ops.geometry import continuous_query_position, spans
from longspan.ops.reference import rotate
from longspan.ops.types import PagedKV, QueryRotary, Selection

PAPER_TILE_LEN = 64


class Budget(NamedTuple):
    """How much each head may keep, and how the pattern is estimated."""

    vertical: tuple[int, ...]
    """Columns for each head."""
    slash: tuple[int, ...]
    """Diagonals for each head, tokens; in tile mode ceil(slash / tile_len) tile diagonals."""
    mode: str
    """``paper`` or ``tile``."""
    probe_last: int
    """Probe queries at the end of the segment."""
    probe_strided: int
    """Probe queries spread over the segment (tile mode)."""
    sink: int
    """First columns, always kept."""
    local: int
    """Most recent diagonals, always kept, tokens."""


class _Probe(NamedTuple):
    """Rows at positions first, first + step, ...: their place in a segment."""

    first: int
    step: int
    num_rows: int

    @property
    def last(self) -> int:
        return self.first + self.step * (self.num_rows - 1)


def select_vertical_slash(
    q: Tensor, cache: PagedKV, block_table: Tensor, cached_len: int, rotary: QueryRotary,
    scale: float, budget: Budget,
) -> Selection:
    """Choose columns and windows for queries at cached_len ... cached_len + T - 1.

    q: [T, H, D] not rotated, all in one DCA chunk. Memory: probe rows x S fp32 for one head.
    """
    num_queries, num_heads, _ = q.shape
    context_len = cached_len + num_queries
    k, _ = ordered_kv(cache, block_table, context_len)
    probes = _probes(cached_len, num_queries, budget)
    columns, offsets = [], []
    tile_len = cache.k.shape[1] if budget.mode == "tile" else PAPER_TILE_LEN
    for head in range(num_heads):
        keys = k[:, head // (num_heads // k.shape[1])]
        rows = [_probe_mass(q[:, head], keys, probe, cached_len, rotary, scale) for probe in probes]
        choose = _choose_tiles if budget.mode == "tile" else _choose_paper
        head_columns, head_offsets = choose(
            rows, probes, context_len, budget, head, tile_len)
        columns.append(head_columns)
        offsets.append(head_offsets)
    pad = torch.nn.utils.rnn.pad_sequence
    return Selection(pad(columns, batch_first=True, padding_value=-1),
                     pad(offsets, batch_first=True, padding_value=tile_len), tile_len,
                     aligned=budget.mode == "tile")


def _probes(start: int, num_queries: int, budget: Budget) -> list[_Probe]:
    last = min(budget.probe_last, num_queries)
    probes = [_Probe(start + num_queries - last, 1, last)]
    strided = min(budget.probe_strided, num_queries - last) if budget.mode == "tile" else 0
    if strided > 0:
        step = (num_queries - last) // strided
        probes.append(_Probe(start + step // 2, step, strided))
    return probes


def _probe_mass(
    q: Tensor, k: Tensor, probe: _Probe, start: int, rotary: QueryRotary, scale: float
) -> Tensor:
    """Attention weights of the probe rows, [rows, left + S] fp32 with left = last - first.

    q: [T, D] of one head; k: [S, D]. The left padding is zero: it lets a strided view line rows up
    by distance (see `_diagonal_sums`).
    """
    positions = probe.first + probe.step * torch.arange(probe.num_rows, device=q.device)
    rows = q[positions - start]
    left = probe.last - probe.first
    mass = torch.empty(probe.num_rows, left + k.shape[0], device=q.device)
    mass[:, :left] = 0
    scores = mass[:, left:]
    for span in spans(start, start + q.shape[0], rotary.stride):
        continuous = continuous_query_position(positions, span.zone, rotary.stride, rotary.clamp)
        angles = continuous.float()[:, None] * rotary.inv_freq
        rotated = rotate(rows[:, None], angles.cos() * scale, angles.sin() * scale)[:, 0]
        _scores_into(scores[:, span.start : span.stop], rotated, k[span.start : span.stop])
    future = torch.arange(probe.first, k.shape[0], device=q.device) > positions[:, None]
    scores[:, probe.first :].masked_fill_(future, -math.inf)
    torch.softmax(scores, -1, out=scores)
    return mass


def _scores_into(out: Tensor, q: Tensor, k: Tensor) -> None:
    """out: [n, S] fp32, rows apart in memory, is set to q k^T; q: [n, D], k: [S, D]."""
    if q.dtype == torch.float32:
        torch.mm(q, k.T, out=out)
    else:
        out.copy_(scores_fp32(q[None], k[None])[0])


def _diagonal_sums(mass: Tensor, probe: _Probe) -> Tensor:
    """Mass by distance: entry o is the sum over rows of the weight on the key o before the row.

    Row r starts ``last - position(r)`` entries further left in a view whose row stride is one row
    plus ``step``, so that equal distances share a column. Returns [last + 1] fp32.
    """
    width = mass.shape[1]
    aligned = mass.as_strided((probe.num_rows, probe.last + 1), (width + probe.step, 1))
    return aligned.sum(0).flip(0)


def _choose_tiles(
    rows: list[Tensor], probes: list[_Probe], context_len: int, budget: Budget, head: int,
    tile_len: int,
) -> tuple[Tensor, Tensor]:
    """Columns [V] ascending and window offsets [W] descending, tile mode."""
    num_tiles = -(-context_len // tile_len)
    sums = rows[0].new_zeros(num_tiles + 2)
    column_sums = rows[0].new_zeros(context_len)
    sink = min(budget.sink, context_len)
    for mass, probe in zip(rows, probes, strict=True):
        mass[:, : mass.shape[1] - context_len + sink] = 0  # sinks are columns, never diagonals
        sums += _tile_sums(_diagonal_sums(mass, probe), tile_len, len(sums))
    forced = 1 + -(-budget.local // tile_len)
    _force(sums, forced)
    count = min(num_tiles, max(forced, -(-budget.slash[head] // tile_len)))
    windows = torch.topk(sums[:num_tiles], count).indices.sort().values
    for mass, probe in zip(rows, probes, strict=True):
        column_sums += _mass_outside(mass, probe, windows, context_len, tile_len)
    _force(column_sums, sink)
    return _top_columns(column_sums, budget.vertical[head]), -windows * tile_len


def _tile_sums(by_distance: Tensor, tile_len: int, num_tiles: int) -> Tensor:
    """Distance sums to tile diagonals. A query at a random row of its tile finds a key at distance
    o on diagonal o // P with weight 1 - f, on the next with weight f = (o % P) / P."""
    padded = torch.nn.functional.pad(by_distance, (0, -len(by_distance) % tile_len))
    tiles = padded.unflatten(0, (-1, tile_len))
    fraction = torch.arange(tile_len, device=tiles.device) / tile_len
    sums = by_distance.new_zeros(num_tiles)
    sums[: len(tiles)] += tiles @ (1 - fraction)
    sums[1 : len(tiles) + 1] += tiles @ fraction
    return sums


def _mass_outside(
    mass: Tensor, probe: _Probe, windows: Tensor, context_len: int, tile_len: int
) -> Tensor:
    """Column sums [S] of the mass that no window covers. Changes ``mass`` in place."""
    positions = probe.first + probe.step * torch.arange(probe.num_rows, device=mass.device)
    tiles = (positions // tile_len)[:, None] - windows
    start = mass.shape[1] - context_len
    scores = mass[:, start:]
    keys = (tiles[..., None] * tile_len + torch.arange(tile_len, device=mass.device)).flatten(1)
    index = keys.clamp(0, context_len - 1)
    index = torch.where(keys == index, index, positions[:, None])  # the row's own tile: a window
    scores.scatter_(1, index, 0.0)
    return scores.sum(0)


def _choose_paper(
    rows: list[Tensor], probes: list[_Probe], context_len: int, budget: Budget, head: int,
    tile_len: int,
) -> tuple[Tensor, Tensor]:
    """Columns [V] ascending and window offsets [W] descending, MInference's rules."""
    mass, probe = rows[0], probes[0]
    diagonals = _diagonal_sums(mass, probe)
    _force(diagonals, budget.local)
    count = min(max(1, budget.slash[head]), len(diagonals))
    distances = torch.topk(diagonals, count).indices
    column_sums = mass[:, mass.shape[1] - context_len :].sum(0)
    _force(column_sums, budget.sink)
    return (_top_columns(column_sums, budget.vertical[head]),
            coalesce_windows(distances, tile_len).to(mass.device))


def coalesce_windows(distances: Tensor, tile_len: int) -> Tensor:
    """Disjoint windows that cover every diagonal, as MInference's index kernel builds them.

    A diagonal at distance d covers keys [t - d, t - d + P) for the tile that starts at t. From the
    farthest on: a window that ends more than P after the current range opens a new range,
    otherwise the range grows by P (so it may cover a little more than asked).
    Returns offsets [W] from the tile's start, descending; the last range may reach past the tile,
    where the causal mask cuts it.
    """
    ends = tile_len - torch.sort(distances.cpu(), descending=True).values
    offsets, position, range_end = [], 0, None
    while position < len(ends):
        end = int(ends[position])
        range_end = end if range_end is None or end > range_end + tile_len else range_end + tile_len
        offsets.append(range_end - tile_len)
        position = int(torch.searchsorted(ends, range_end, right=True))
    return torch.tensor(offsets[::-1], dtype=torch.int64)


def _force(sums: Tensor, count: int) -> None:
    """Rank the first entries above all others, in order: a budget below the forced count then
    keeps the nearest. Probe mass is below 1e6, and integers below 2^24 are exact."""
    count = min(count, len(sums))
    sums[:count] = 2e6 - torch.arange(count, device=sums.device)


def _top_columns(sums: Tensor, count: int) -> Tensor:
    return torch.topk(sums, min(count, len(sums))).indices.sort().values
