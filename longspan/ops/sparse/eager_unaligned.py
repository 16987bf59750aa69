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
_NO_KEY = 1 << 40
"""Where a padded list of windows goes on: behind every key."""


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
        num_keys = min(len(offsets) * selection.tile_len, context_len + selection.tile_len)
        num_keys += len(columns)
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
    starts = window_starts(tile_starts, offsets, tile_len)
    windows = (starts[:, :, None] + within).flatten(1)
    columns = columns.expand(len(tile_starts), -1).contiguous()
    index = torch.searchsorted(starts, columns, right=True) - 1
    nearest = starts.gather(1, index.clamp(min=0))
    covered = (index >= 0) & (columns - nearest < tile_len)
    return torch.cat((windows, columns), 1), torch.cat((windows < _NO_KEY, ~covered), 1)


def window_starts(tile_starts: Tensor, offsets: Tensor, tile_len: int) -> Tensor:
    """Return `reference.paper_windows` of all tiles at once: [n, W], padded with `_NO_KEY`."""
    offsets = offsets.flip(0).contiguous()
    tile_starts, starts = tile_starts[:, None], []
    index = torch.searchsorted(offsets, -tile_starts - tile_len, right=True)  # the first in reach
    farthest = tile_starts + offsets[index.clamp(max=len(offsets) - 1)]
    start = farthest.clamp(min=0).masked_fill(index == len(offsets), _NO_KEY)
    while bool((start < _NO_KEY).any()):
        starts.append(start)
        index = torch.searchsorted(offsets, start - tile_starts, right=True)
        following = tile_starts + offsets[index.clamp(max=len(offsets) - 1)]
        start = torch.where(following > start + tile_len, following, start + tile_len)
        start = start.masked_fill(index == len(offsets), _NO_KEY)
    return torch.cat(starts, 1) if starts else torch.full_like(tile_starts, _NO_KEY)
