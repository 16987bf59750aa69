"""Vertical-slash prefill with windows at any token offset (``paper`` mode): the parity path.

Query tiles begin at the first query, not at multiples of the KV block size, and a window may reach
over two blocks or two DCA zones: keys are looked up one by one, and each zone masks what is not
its own. One program for each query tile and head first walks the diagonals and writes the tile's
windows (`reference.paper_windows`), as many tiles at a time as the workspace holds. Columns are
gathered beforehand as in tile mode, and drop out where a binary search finds them in a window.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.sparse.layout import SparseWork
from longspan.ops.tiles.triton import add_sparse_tile, finish, scores_of
from longspan.ops.types import PagedKV, Selection

WORKSPACE_BYTES = 64 << 20
"""For the windows of query tiles."""
_LANES = 128


def launch_paper_segment(
    variants: Tensor, cache: PagedKV, block_table: Tensor, work: SparseWork, selection: Selection,
    out: Tensor, lse: Tensor, cached_len: int, start: int, stop: int, zones: int,
) -> None:
    """Attend for queries start ... stop - 1 of one DCA chunk; adds the kept pairs to ``work.kept``.

    variants: [Z, H, T, D], row 0 is position ``cached_len``, where query tiles begin. out, lse: of
    the whole call. Two launches for as many query tiles as `WORKSPACE_BYTES` holds windows of.
    """
    _, num_heads, num_rows, head_dim = variants.shape
    _, block_size, num_kv_heads, _ = cache.k.shape
    tile_len, num_diagonals = selection.tile_len, selection.offsets.shape[1]
    end_tile = triton.cdiv(stop - cached_len, tile_len)
    width = min(num_diagonals, triton.cdiv(stop, tile_len) + 1)  # windows of a tile never overlap
    at_once = max(1, WORKSPACE_BYTES // (4 * num_heads * width))
    for first_tile in range((start - cached_len) // tile_len, end_tile, at_once):
        num_tiles = min(at_once, end_tile - first_tile)
        windows, counts = (torch.empty(num_heads, num_tiles, size, dtype=torch.int32,
                                       device=variants.device) for size in (width, 1))
        _window_kernel[num_tiles, num_heads](
            selection.offsets, windows, counts, cached_len, first_tile, num_diagonals, width,
            TILE=tile_len, num_warps=1)
        _paper_kernel[(num_tiles * num_heads,)](
            variants, cache.k, cache.v, block_table, out, lse, windows, counts, work.column_rank,
            work.k_cols, work.v_cols, work.col_tile, work.column_tiles, work.head_order, work.kept,
            cached_len, start, stop, num_rows, num_heads, num_kv_heads, width, width.bit_length(),
            work.column_rank.shape[1] - 1, first_tile, num_tiles, zones, *work.borders,
            GROUP=num_heads // num_kv_heads, BLOCK=block_size, TILE=tile_len,
            COLUMNS=min(block_size, 64), LANES=_LANES, HEAD_DIM=head_dim, num_warps=4, num_stages=2)
        del windows, counts  # or the next tiles' would be allocated beside them


@triton.jit(do_not_specialize=["cached_len", "first_tile", "num_diagonals", "width"])
def _window_kernel(
    offsets, windows, counts, cached_len, first_tile, num_diagonals, width, TILE: tl.constexpr,
):
    """Write the first keys of one query tile's windows, ascending, and how many there are.

    offsets: [H, num_diagonals], descending, padded with TILE at the end; windows: [H, n, width];
    counts: [H, n]. Grid (n, H).
    """
    head = tl.program_id(1).to(tl.int64)
    place = head * tl.num_programs(0) + tl.program_id(0)
    tile_start = cached_len + (first_tile + tl.program_id(0)) * TILE
    offsets += head * num_diagonals
    windows += place * width
    count, last = 0, tile_start * 0 - 2 * TILE
    for i in range(num_diagonals):
        offset = tl.load(offsets + num_diagonals - 1 - i).to(tl.int32)
        start = tl.maximum(tile_start + offset, 0)
        reaches = (offset < TILE) & (tile_start + offset + TILE > 0)
        is_new = reaches & (start > last)
        last = tl.where(is_new, tl.maximum(start, last + TILE), last)
        tl.store(windows + count, last, mask=is_new)
        count += is_new.to(tl.int32)
    tl.store(counts + place, count)


@triton.jit
def _count_below(windows, num_windows, bound, LANES: tl.constexpr):
    """Return how many windows begin before key ``bound``."""
    count = bound * 0
    for first in range(0, num_windows, LANES):
        at = first + tl.arange(0, LANES)
        start = tl.load(windows + at, mask=at < num_windows, other=1 << 30)
        count += tl.sum((start < bound).to(tl.int32), 0)
    return count


@triton.jit
def _is_covered(windows, num_windows, num_steps, at, TILE: tl.constexpr):
    """Return whether keys ``at`` lie in windows, ascending, by binary search."""
    count = at * 0
    for step in range(num_steps):
        probe = count + (1 << (num_steps - 1 - step))
        start = tl.load(windows + probe - 1, mask=probe <= num_windows, other=1 << 30)
        count = tl.where((probe <= num_windows) & (start <= at), probe, count)
    nearest = tl.load(windows + count - 1, mask=count > 0, other=-TILE)
    return at - nearest < TILE


@triton.jit(do_not_specialize=[
    "cached_len", "start", "stop", "num_rows", "num_heads", "num_kv_heads", "width", "num_steps",
    "num_tiles", "first_tile", "num_query_tiles", "num_zones", "succ", "intra"])
def _paper_kernel(
    q, k, v, block_table, out, lse, windows, counts, column_rank, k_cols, v_cols, col_position,
    column_tiles, head_order, kept, cached_len, start, stop, num_rows, num_heads, num_kv_heads,
    width, num_steps, num_tiles, first_tile, num_query_tiles, num_zones, succ, intra,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
    LANES: tl.constexpr, HEAD_DIM: tl.constexpr,
):
    """Compute one query tile of one head. Rows may see no key at all."""
    item = tl.program_id(0)
    head = tl.load(head_order + item // num_query_tiles)
    tile = first_tile + num_query_tiles - 1 - item % num_query_tiles
    tile_start = cached_len + tile * TILE
    column_rank += head * (num_tiles + 1)
    place = head.to(tl.int64) * num_query_tiles + tile - first_tile
    windows += place * width
    num_windows = tl.load(counts + place)

    dims = tl.arange(0, HEAD_DIM)
    lanes = tl.arange(0, TILE)
    column_lanes = tl.arange(0, COLUMNS)
    position = tile_start + lanes
    is_query = (position >= start) & (position < stop)
    first_row, stop_row = tl.maximum(tile_start, start), tl.minimum(tile_start + TILE, stop)
    q_row = head.to(tl.int64) * num_rows + tile * TILE + lanes
    q += q_row[:, None] * HEAD_DIM + dims
    zone_size = num_heads.to(tl.int64) * num_rows * HEAD_DIM
    column_tile = column_lanes[:, None] * HEAD_DIM + dims
    acc = tl.zeros([TILE, HEAD_DIM], tl.float32)
    total = tl.zeros([TILE], tl.float32)
    top = tl.full([TILE], float("-inf"), tl.float32)
    window_pairs = tl.zeros([TILE], tl.int32)
    column_pairs = tl.zeros([COLUMNS], tl.int32)
    for zone in range(num_zones):
        zone_tile, stop_tile = succ * 0, succ
        if zone == 0:  # up to the tile's last query
            zone_tile, stop_tile = intra, tl.cdiv(stop_row, BLOCK)
        elif zone == 1:
            zone_tile, stop_tile = succ, intra
        first_key, stop_key = zone_tile * BLOCK, tl.minimum(stop_tile * BLOCK, stop_row)
        query = tl.load(q + zone * zone_size, mask=is_query[:, None], other=0.0)

        begin = _count_below(windows, num_windows, first_key - TILE + 1, LANES)
        end = _count_below(windows, num_windows, stop_key, LANES)
        for window in range(begin, end):
            at = tl.load(windows + window) + lanes
            exists = (at >= first_key) & (at < stop_key)
            block = tl.load(block_table + at // BLOCK, mask=exists, other=0)
            slot = (block * BLOCK + at % BLOCK) * num_kv_heads + head // GROUP
            source = slot[:, None] * HEAD_DIM + dims
            key = tl.load(k + source, mask=exists[:, None], other=0.0)
            value = tl.load(v + source, mask=exists[:, None], other=0.0)
            seen = exists[None, :] & (at[None, :] <= position[:, None])
            scores = tl.where(seen, scores_of(query, key), float("-inf"))
            acc, total, top = add_sparse_tile(acc, total, top, scores, value)
            rows = stop_row - tl.maximum(at, first_row)
            window_pairs += tl.where(exists, tl.maximum(rows, 0), 0).to(tl.int32)

        begin = tl.load(column_tiles + head * 4 + 2 - zone).to(tl.int64) * BLOCK
        count = tl.load(column_rank + stop_tile) - tl.load(column_rank + zone_tile)
        for part in range(tl.cdiv(count, COLUMNS)):
            columns = begin * HEAD_DIM + part * COLUMNS * HEAD_DIM
            key = tl.load(k_cols + columns + column_tile)
            value = tl.load(v_cols + columns + column_tile)
            at = tl.load(col_position + begin + part * COLUMNS + column_lanes)
            taken = _is_covered(windows, num_windows, num_steps, at, TILE)
            seen = (taken == 0)[None, :] & (at[None, :] <= position[:, None])
            scores = tl.where(seen, scores_of(query, key), float("-inf"))
            acc, total, top = add_sparse_tile(acc, total, top, scores, value)
            rows = stop_row - tl.maximum(at, first_row)
            column_pairs += tl.where(taken == 0, tl.maximum(rows, 0), 0)

    tl.atomic_add(
        kept, (tl.sum(window_pairs, 0) + tl.sum(column_pairs, 0)).to(tl.float64))
    result, row_lse = finish(acc, total, top)
    row = (position - cached_len).to(tl.int64) * num_heads + head
    tl.store(out + row[:, None] * HEAD_DIM + dims, result.to(out.dtype.element_ty),
             mask=is_query[:, None])
    tl.store(lse + row, row_lse, mask=is_query)
