"""Vertical-slash prefill over PyTorch's fused attention, for CPUs and any GPU.

In tile mode each head is four kinds of work, merged by LSE, none of which materialises scores:

* the local band (windows 0, -P, -2P, ... without a gap) reads keys through overlapping views;
* the other windows gather whole tiles of keys, once for each query tile;
* so do the key tiles that single query tiles list, one query tile after another: few have any;
* columns and tile means are one short key list that all query tiles share, with a bias for each
  (query tile, key) that drops keys already seen through a window or a listed tile.

Unaligned windows (``paper`` mode) take a plain gather with materialised scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from longspan.ops.geometry import COARSE, INTRA, Span, near_border, segments, spans
from longspan.ops.reference import listed_tiles
from longspan.ops.sparse.eager_unaligned import gathered_attention
from longspan.ops.tiles.attend import (
    Partial,
    attend,
    attend_biased,
    merge,
    ordered_kv,
    rotated_queries,
)
from longspan.ops.types import PagedKV, QueryRotary, Selection

GATHERED_TILES = 8
"""Query tiles whose windows are gathered at a time on CPUs: their keys and values stay in cache."""


def sparse_prefill_attention(
    q: Tensor, cache: PagedKV, block_table: Tensor, cached_len: int, rotary: QueryRotary,
    scale: float, selection: Selection, correction: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.sparse_prefill_attention`.

    In tile mode the queries are whole tiles at absolute multiples of the tile length, which is the
    KV block size and divides the stride (the layer computes ragged ends densely).
    """
    if not selection.aligned:
        return gathered_attention(q, cache, block_table, cached_len, rotary, scale, selection)
    tile_len, block_size = selection.tile_len, cache.k.shape[1]
    assert tile_len == block_size and cached_len % tile_len == 0 == q.shape[0] % tile_len
    assert rotary.stride % tile_len == 0 or cached_len + q.shape[0] <= rotary.stride
    context_len = cached_len + q.shape[0]
    k, v = ordered_kv(cache, block_table, context_len)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    kept = torch.zeros((), dtype=torch.float64, device=q.device)
    for start, stop in segments(cached_len, context_len, rotary.stride):
        rows = slice(start - cached_len, stop - cached_len)
        segment = _Segment(
            q[rows], k, v, cache, block_table, start, rotary, scale, selection, correction)
        for head in range(q.shape[1]):
            part, part_lse, pairs = segment.attend_head(head)
            out[rows, head], lse[rows, head] = part.flatten(0, 1), part_lse.flatten()
            kept += pairs
    return out, lse, kept


class _Segment:
    """Queries [start, stop) of one DCA chunk: what their heads share."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, cache: PagedKV, block_table: Tensor, start: int,
        rotary: QueryRotary, scale: float, selection: Selection, correction: bool,
    ) -> None:
        self.k, self.v, self.start, self.scale, self.selection = k, v, start, scale, selection
        self.tile_len = cache.k.shape[1]
        self.num_tiles = q.shape[0] // self.tile_len
        self.first_tile = start // self.tile_len
        self.group = q.shape[1] // k.shape[1]
        self.spans = spans(start, start + q.shape[0], rotary.stride)
        self.queries = {
            span.zone: rotated_queries(q, start, span.zone, rotary).unflatten(
                0, (-1, self.tile_len))
            for span in self.spans
        }
        self.means: tuple[Tensor, Tensor] | None = None
        self.coarse_means: tuple[Tensor, Tensor] | None = None
        self.border = torch.tensor([  # first tile with a mean of its own, by query tile
            near_border(tile, selection.near_tiles)
            for tile in range(self.first_tile, self.first_tile + self.num_tiles)], device=q.device)
        if correction:
            assert cache.k_mean is not None and cache.v_mean is not None
            near = block_table[: self.first_tile + self.num_tiles - 1]
            num_far = int(self.border[-1]) // COARSE
            far = near[: num_far * COARSE]
            self.means = cache.k_mean[near], cache.v_mean[near]
            k, v = (x[far].unflatten(0, (num_far, COARSE)).float().mean(1).to(x.dtype)
                    for x in (cache.k_mean, cache.v_mean))
            self.coarse_means = k, v
        self.tile_gap = self._query_tiles()[:, None] - torch.arange(
            self.first_tile + self.num_tiles, device=q.device)
        self.listed = listed_tiles(
            selection, self._query_tiles() * self.tile_len, self.tile_gap.shape[1])

    def attend_head(self, head: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return out [n, P, D], lse [n, P] over n query tiles, and the number of pairs kept."""
        kv_head, offsets = head // self.group, self.selection.offsets[head]
        windows = (-offsets[offsets < self.tile_len] // self.tile_len).tolist()
        band = next((i for i, w in enumerate(windows) if w != i), len(windows))
        assert band > 0, "the diagonal tile is always a window"
        listed = self.listed[head]
        parts = [self._diagonal(head, kv_head), *self._listed_tiles(head, kv_head, listed)]
        if self._single_zone:
            parts += self._band(head, kv_head, band)
            parts += self._gathered_windows(head, kv_head, windows[band:])
        else:
            parts += self._zoned_windows(head, kv_head, windows[1:])
        columns = self.selection.columns[head]
        columns = columns[(columns >= 0) & (columns < self.start + self.num_tiles * self.tile_len)]
        free = (self.tile_gap > 0) & ~self._is_window(windows) & ~listed
        shared, pairs = self._shared_keys(head, kv_head, columns, free)
        out, lse = merge([*parts, *shared])
        return out[:, 0], lse[:, 0], pairs + self._tile_pairs(windows, listed)

    @property
    def _single_zone(self) -> bool:
        return len(self.spans) == 1

    def _query_tiles(self) -> Tensor:
        return self.first_tile + torch.arange(self.num_tiles, device=self.k.device)

    def _is_window(self, windows: list[int]) -> Tensor:
        """Return [n, all tiles] bool, true as well for tiles ahead."""
        num_tiles = self.tile_gap.shape[1]
        is_window = torch.zeros(num_tiles, dtype=torch.bool, device=self.k.device)
        is_window[torch.tensor([w for w in windows if w < num_tiles])] = True
        return is_window[self.tile_gap.clamp(min=0)]

    def _query(self, head: int, zone: int) -> Tensor:
        return self.queries[zone][:, None, :, head]  # [n, 1, P, D]

    def _key_tiles(self, kv_head: int) -> tuple[Tensor, Tensor]:
        """Return two of [all tiles, P, D], views of the ordered keys and values."""
        return (self.k[:, kv_head].unflatten(0, (-1, self.tile_len)),
                self.v[:, kv_head].unflatten(0, (-1, self.tile_len)))

    def _diagonal(self, head: int, kv_head: int) -> Partial:
        own = slice(self.first_tile, self.first_tile + self.num_tiles)
        k, v = (x[own, None] for x in self._key_tiles(kv_head))
        return attend(self._query(head, INTRA), k, v, self.scale, causal=True)

    def _band(self, head: int, kv_head: int, band: int) -> list[Partial]:
        """Attend to windows 1 .. band-1 as one overlapping view; tiles near the prompt's start go
        apart."""
        width = band - 1
        if width == 0:
            return []
        skipped = min(self.num_tiles, max(0, width - self.first_tile))
        q = self._query(head, INTRA)
        parts = []
        if skipped < self.num_tiles:
            first_key = (self.first_tile + skipped - width) * self.tile_len
            k, v = (self._sliding(x[first_key:, kv_head], self.num_tiles - skipped, width)
                    for x in (self.k, self.v))
            parts.append(_pad_front(attend(q[skipped:], k, v, self.scale), skipped))
        if skipped:
            short = self._short_band(q[:skipped], kv_head)
            parts.append(_pad_back(short, self.num_tiles - skipped))
        return parts

    def _sliding(self, x: Tensor, num_tiles: int, width: int) -> Tensor:
        """Return [n, 1, width * P, D]: entry i is rows i*P ... (i + width)*P of x, without a
        copy."""
        row, last = x.stride()
        size = (num_tiles, 1, width * self.tile_len, x.shape[1])
        return x.as_strided(size, (row * self.tile_len, 0, row, last))

    def _short_band(self, q: Tensor, kv_head: int) -> Partial:
        """Attend to the band of query tiles so early that it reaches position 0: all earlier
        tiles."""
        last_key = (self.first_tile + q.shape[0] - 1) * self.tile_len
        if last_key == 0:
            return torch.zeros_like(q), q.new_full(q.shape[:3], -math.inf, dtype=torch.float32)
        k, v = (x[None, None, :last_key, kv_head] for x in (self.k, self.v))
        key_tile = torch.arange(last_key, device=q.device) // self.tile_len
        visible = key_tile < (self.first_tile + torch.arange(q.shape[0], device=q.device))[:, None]
        return attend_biased(q, k, v, self.scale, _log(visible)[:, None, None])

    def _gathered_windows(self, head: int, kv_head: int, windows: list[int]) -> list[Partial]:
        """Attend to windows away from the band: whole tiles gathered for each query tile."""
        windows = [w for w in windows if w < self.first_tile + self.num_tiles]
        if not windows:
            return []
        tiles = self._query_tiles()[:, None] - torch.tensor(windows, device=self.k.device)
        q = self._query(head, INTRA)
        step = GATHERED_TILES if q.device.type == "cpu" else self.num_tiles
        parts = [
            self._attend_tiles(q[i : i + step], tiles[i : i + step], kv_head,
                               all_exist=windows[-1] <= self.first_tile + i)
            for i in range(0, self.num_tiles, step)
        ]
        return [(torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts]))]

    def _attend_tiles(
        self, q: Tensor, tiles: Tensor, kv_head: int, *, all_exist: bool
    ) -> Partial:
        """Attend with each query tile to its own whole key tiles. q: [n, 1, P, D]; tiles: [n, W],
        negative before the prompt's start."""
        k, v = (x[tiles.clamp(min=0)].flatten(1, 2)[:, None] for x in self._key_tiles(kv_head))
        if all_exist:
            return attend(q, k, v, self.scale)
        bias = _log(tiles >= 0).repeat_interleave(self.tile_len, 1)
        return attend_biased(q, k, v, self.scale, bias[:, None, None])

    def _zoned_windows(self, head: int, kv_head: int, windows: list[int]) -> list[Partial]:
        """Attend to all windows but the diagonal where several zones exist: one fused call for each
        window and zone over the run of query tiles that sees it there."""
        keys, values = self._key_tiles(kv_head)
        parts = []
        for window in windows:
            for span in self.spans:
                first = max(self.first_tile, span.start // self.tile_len + window)
                stop = min(self.first_tile + self.num_tiles, span.stop // self.tile_len + window)
                if first >= stop:
                    continue
                rows = slice(first - self.first_tile, stop - self.first_tile)
                tiles = slice(first - window, stop - window)
                part = attend(self._query(head, span.zone)[rows], keys[tiles, None],
                              values[tiles, None], self.scale)
                parts.append(_place(part, rows, self.num_tiles))
        return parts

    def _listed_tiles(self, head: int, kv_head: int, listed: Tensor) -> list[Partial]:
        """Attend to key tiles that single query tiles list: a fused call for each of those and
        zone."""
        parts = []
        for span in self.spans:
            tiles = slice(span.start // self.tile_len, -(-span.stop // self.tile_len))
            k, v = (x[tiles] for x in self._key_tiles(kv_head))
            q = self._query(head, span.zone)
            rows = listed[:, tiles].any(1).nonzero().flatten().tolist()
            out, lse = torch.zeros_like(q), q.new_full(q.shape[:3], -math.inf, dtype=torch.float32)
            for row in rows:
                here = listed[row, tiles]
                out[row], lse[row] = attend(
                    q[row][None], k[here].flatten(0, 1)[None, None],
                    v[here].flatten(0, 1)[None, None], self.scale)
            parts += [(out, lse)] if rows else []
        return parts

    def _shared_keys(
        self, head: int, kv_head: int, columns: Tensor, free: Tensor
    ) -> tuple[list[Partial], Tensor]:
        """Attend to columns and tile means, zone by zone; also returns the number of column pairs.
        free: [n, all tiles] bool, the query tile sees the key tile through these alone."""
        tile = columns // self.tile_len
        parts, pairs = [], torch.zeros((), dtype=torch.float64, device=columns.device)
        taken = torch.bincount(tile, minlength=self.tile_gap.shape[1])
        for span in self.spans:
            in_span = columns[(columns >= span.start) & (columns < span.stop)]
            visible = free[:, in_span // self.tile_len]
            pairs += visible.sum(dtype=torch.float64) * self.tile_len
            k, v, bias = self.k[in_span, kv_head], self.v[in_span, kv_head], _log(visible)
            for means, places, weight in self._mean_parts(span, taken, free):
                k = torch.cat((k, means[0][places, kv_head]))
                v = torch.cat((v, means[1][places, kv_head]))
                bias = torch.cat((bias, weight.log()), 1)
            if k.shape[0]:
                parts.append(attend_biased(self._query(head, span.zone), k[None, None],
                                           v[None, None], self.scale, bias[:, None, None]))
        return parts, pairs

    def _mean_parts(
        self, span: Span, taken: Tensor, free: Tensor
    ) -> Iterator[tuple[tuple[Tensor, Tensor], slice, Tensor]]:
        """Yield means of single tiles, then of `COARSE` together: keys and values, which of them
        lie in the span, and for how many keys each stands, [n, means] fp32. taken: [all tiles]."""
        if self.means is None or self.coarse_means is None:
            return
        border = self.border[:, None]
        first = max(span.start // self.tile_len, int(self.border[0]))
        stop = min(span.stop // self.tile_len, len(self.means[0]))
        tiles = slice(min(first, stop), stop)
        near = torch.arange(tiles.start, tiles.stop, device=free.device) >= border
        left = (self.tile_len - taken).clamp(min=0)
        yield self.means, tiles, (free[:, tiles] & near) * left[tiles].float()
        first = -(-span.start // (COARSE * self.tile_len))
        stop = min(span.stop // (COARSE * self.tile_len), len(self.coarse_means[0]))
        groups = slice(min(first, stop), stop)
        tiles = slice(groups.start * COARSE, groups.stop * COARSE)
        far = torch.arange(tiles.start, tiles.stop, COARSE, device=free.device) < border
        shape = groups.stop - groups.start, COARSE
        share = free[:, tiles].unflatten(1, shape).float().mean(2) * far
        yield self.coarse_means, groups, share * left[tiles].unflatten(0, shape).sum(1)

    def _tile_pairs(self, windows: list[int], listed: Tensor) -> float:
        """Count the pairs kept through whole tiles: half of one on the diagonal."""
        last_tile = self.first_tile + self.num_tiles
        whole = sum(last_tile - max(self.first_tile, w) for w in windows if 0 < w < last_tile)
        whole += int(listed.sum())
        return whole * self.tile_len**2 + self.num_tiles * self.tile_len * (self.tile_len + 1) / 2


def _log(visible: Tensor) -> Tensor:
    """Return 0 where visible, -inf elsewhere."""
    return torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, -math.inf)


def _place(part: Partial, rows: slice, num_tiles: int) -> Partial:
    """Spread a result over some query tiles to all of them (out 0, lse -inf elsewhere)."""
    return _pad_back(_pad_front(part, rows.start), num_tiles - rows.stop)


def _pad_front(part: Partial, count: int) -> Partial:
    return _pad(part, count, 0)


def _pad_back(part: Partial, count: int) -> Partial:
    return _pad(part, 0, count)


def _pad(part: Partial, front: int, back: int) -> Partial:
    out, lse = part
    if front == 0 == back:
        return part
    pad = torch.nn.functional.pad
    return (pad(out, (0, 0, 0, 0, 0, 0, front, back)),
            pad(lse, (0, 0, 0, 0, front, back), value=-math.inf))


