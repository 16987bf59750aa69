"""Vertical-slash prefill with windows at any offset (``paper`` mode), by gathering keys.

For a run of query tiles the keys of each tile are listed (windows, then columns), gathered, and
scored with the rotation of each pair's zone. Scores of one head and a few tiles at a time are in
memory. Simple and general; the fast path for aligned windows is `eager_sparse`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longspan.ops.geometry import segments, spans
from longspan.ops.tiles.attend import ordered_kv, rotated_queries, scores_fp32
from longspan.ops.types import PagedKV, QueryRotary, Selection

_SCORE_BYTES = 1 << 27


def gathered_attention(
    q: Tensor, cache: PagedKV, block_table: Tensor, cached_len: int, rotary: QueryRotary,
    scale: float, selection: Selection,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.sparse_prefill_attention`, without the mean correction."""
    context_len = cached_len + q.shape[0]
    k, v = ordered_kv(cache, block_table, context_len)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    kept = torch.zeros((), dtype=torch.float64, device=q.device)
    base = 0 if selection.aligned else cached_len
    for head in range(q.shape[1]):
        offsets, columns = _lists(selection, head)
        num_keys = len(offsets) * selection.tile_len + len(columns)
        step = max(1, _SCORE_BYTES // (4 * selection.tile_len * num_keys)) * selection.tile_len
        for start, stop in _runs(cached_len, context_len, base, step, rotary.stride):
            rows = slice(start - cached_len, stop - cached_len)
            part, part_lse, pairs = _attend_run(
                q[rows, head], k[:, head // (q.shape[1] // k.shape[1])],
                v[:, head // (q.shape[1] // k.shape[1])], start, base, rotary, scale,
                offsets, columns, selection.tile_len)
            out[rows, head], lse[rows, head] = part, part_lse
            kept += pairs
    return out, lse, kept


def _lists(selection: Selection, head: int) -> tuple[Tensor, Tensor]:
    offsets, columns = selection.offsets[head], selection.columns[head]
    return offsets[offsets < selection.tile_len], columns[columns >= 0]


def _runs(start: int, stop: int, base: int, step: int, stride: int) -> list[tuple[int, int]]:
    """Cut queries at DCA borders and at every ``step`` rows counted from ``base``."""
    runs = []
    for first, last in segments(start, stop, stride):
        while first < last:
            end = min(last, base + ((first - base) // step + 1) * step)
            runs.append((first, end))
            first = end
    return runs


def _attend_run(
    q: Tensor, k: Tensor, v: Tensor, start: int, base: int, rotary: QueryRotary, scale: float,
    offsets: Tensor, columns: Tensor, tile_len: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend with q: [T, D] of one head, in one DCA chunk; k, v: [S, D]. Returns out [T, D], lse
    [T], pairs."""
    positions = start + torch.arange(q.shape[0], device=q.device)
    first_tile = (start - base) // tile_len
    tile = (positions - base) // tile_len - first_tile
    tile_starts = base + (first_tile + torch.arange(int(tile[-1]) + 1, device=q.device)) * tile_len
    keys, listed = _tile_keys(tile_starts, offsets, columns, tile_len)
    inside = keys.clamp(0, k.shape[0] - 1)
    # rows of a tile share its key list; pad the rows to whole tiles so that one bmm does it
    slot = (tile * tile_len + (positions - base) % tile_len)
    zone_q = q.new_zeros(len(tile_starts) * tile_len, q.shape[1])
    scores = torch.zeros(len(tile_starts), tile_len, keys.shape[1], device=q.device)
    for span in spans(start, start + q.shape[0], rotary.stride):
        zone_q[slot] = rotated_queries(q[:, None], start, span.zone, rotary)[:, 0]
        part = scores_fp32(zone_q.unflatten(0, (-1, tile_len)), k[inside])
        in_span = (keys >= span.start) & (keys < span.stop)
        scores = torch.where(in_span[:, None], part, scores)
    scores = scores.flatten(0, 1)[slot] * scale
    visible = listed[tile] & (keys[tile] <= positions[:, None])
    scores.masked_fill_(~visible, -math.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.zeros(len(zone_q), keys.shape[1], device=q.device, dtype=v.dtype)
    finite = lse.clamp(min=torch.finfo(torch.float32).min)  # rows without keys: out 0, lse -inf
    weights[slot] = torch.exp(scores - finite[:, None]).to(v.dtype)
    out = (weights.unflatten(0, (-1, tile_len)) @ v[inside]).flatten(0, 1)[slot]
    return out.to(q.dtype), lse, visible.sum(dtype=torch.float64)


def _tile_keys(
    tile_starts: Tensor, offsets: Tensor, columns: Tensor, tile_len: int
) -> tuple[Tensor, Tensor]:
    """List the key positions for each tile, [n, W * P + V], and which entries count: positions that
    exist, and columns that no window of the tile covers."""
    within = torch.arange(tile_len, device=tile_starts.device)
    windows = (tile_starts[:, None, None] + offsets[:, None] + within).flatten(1)
    covered = torch.zeros(len(tile_starts), len(columns), dtype=torch.bool, device=offsets.device)
    for row, first in enumerate(tile_starts):
        starts = (first + offsets).flip(0)  # ascending
        index = torch.searchsorted(starts, columns, right=True) - 1
        covered[row] = (index >= 0) & (columns - starts[index.clamp(min=0)] < tile_len)
    keys = torch.cat((windows, columns.expand(len(tile_starts), -1)), 1)
    return keys, torch.cat((windows >= 0, ~covered), 1)
