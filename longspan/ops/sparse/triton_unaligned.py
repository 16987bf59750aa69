"""Vertical-slash prefill with windows at any token offset (``paper`` mode): the parity path.

Query tiles begin at the first query, not at multiples of the KV block size, and a window may reach
over two blocks or two DCA zones: keys are looked up one by one, and each zone masks what is not
its own. Columns are gathered beforehand as in tile mode; a map by distance tells which of them a
window of the tile covers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.sparse.layout import SparseWork
from longspan.ops.tiles.triton import add_sparse_tile, finish, scores_of
from longspan.ops.types import PagedKV, Selection

_LANES = 128
_COVER_ROWS = 16


def launch_paper_segment(
    variants: Tensor, cache: PagedKV, block_table: Tensor, work: SparseWork, selection: Selection,
    out: Tensor, lse: Tensor, cached_len: int, start: int, stop: int, zones: int,
) -> None:
    """Attend for queries start ... stop - 1 of one DCA chunk; adds the kept pairs to ``work.kept``.

    variants: [Z, H, T, D], row 0 is position ``cached_len``, where query tiles begin. out, lse: of
    the whole call. Two launches and a fill; H * stop bytes of workspace.
    """
    _, num_heads, num_rows, head_dim = variants.shape
    _, block_size, num_kv_heads, _ = cache.k.shape
    tile_len, num_windows = selection.tile_len, selection.offsets.shape[1]
    covered = torch.zeros(num_heads, stop + tile_len, dtype=torch.int8, device=variants.device)
    _cover_kernel[num_heads, triton.cdiv(num_windows, _COVER_ROWS)](
        selection.offsets, covered, num_windows, covered.shape[1], TILE=tile_len, ROWS=_COVER_ROWS)
    first_tile = (start - cached_len) // tile_len
    num_query_tiles = triton.cdiv(stop - cached_len, tile_len) - first_tile
    _paper_kernel[(num_query_tiles * num_heads,)](
        variants, cache.k, cache.v, block_table, out, lse, selection.offsets, covered,
        work.column_rank, work.k_cols, work.v_cols, work.col_tile, work.column_tiles,
        work.head_order, work.kept, cached_len, start, stop, num_rows, num_heads, num_kv_heads,
        num_windows, covered.shape[1], work.column_rank.shape[1] - 1, first_tile, num_query_tiles,
        zones, *work.borders, GROUP=num_heads // num_kv_heads, BLOCK=block_size, TILE=tile_len,
        COLUMNS=min(block_size, 64), LANES=_LANES, HEAD_DIM=head_dim, num_warps=4, num_stages=2)


@triton.jit(do_not_specialize=["num_windows", "length"])
def _cover_kernel(
    offsets, covered, num_windows, length, TILE: tl.constexpr, ROWS: tl.constexpr,
):
    """Mark the keys of ROWS windows of one head, by their distance from the query tile's end."""
    head = tl.program_id(0)
    window = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    offset = tl.load(offsets + head * num_windows + window, window < num_windows, other=TILE)
    distance = TILE - 1 - offset[:, None] - tl.arange(0, TILE)
    inside = (offset < TILE)[:, None] & (distance >= 0) & (distance < length)
    one = tl.full([ROWS, TILE], 1, tl.int8)
    tl.store(covered + head.to(tl.int64) * length + distance, one, mask=inside)


@triton.jit
def _count_at_least(offsets, num_windows, bound, TILE: tl.constexpr, LANES: tl.constexpr):
    """Return how many offsets, descending and padded with TILE at the end, are ``bound`` or
    more."""
    count = bound * 0
    for first in range(0, num_windows, LANES):
        at = first + tl.arange(0, LANES)
        offset = tl.load(offsets + at, mask=at < num_windows, other=TILE)
        count += tl.sum(((offset >= bound) & (offset < TILE)).to(tl.int32), 0)
    return count


@triton.jit(do_not_specialize=[
    "cached_len", "start", "stop", "num_rows", "num_heads", "num_kv_heads", "num_windows",
    "length", "num_tiles", "first_tile", "num_query_tiles", "num_zones", "succ", "intra"])
def _paper_kernel(
    q, k, v, block_table, out, lse, offsets, covered, column_rank, k_cols, v_cols, col_position,
    column_tiles, head_order, kept, cached_len, start, stop, num_rows, num_heads, num_kv_heads,
    num_windows, length, num_tiles, first_tile, num_query_tiles, num_zones, succ, intra,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
    LANES: tl.constexpr, HEAD_DIM: tl.constexpr,
):
    """Compute one query tile of one head. Rows may see no key at all."""
    item = tl.program_id(0)
    head = tl.load(head_order + item // num_query_tiles)
    tile = first_tile + num_query_tiles - 1 - item % num_query_tiles
    tile_start = cached_len + tile * TILE
    column_rank += head * (num_tiles + 1)
    offsets += head * num_windows
    covered += head.to(tl.int64) * length

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

        begin = _count_at_least(offsets, num_windows, stop_key - tile_start, TILE, LANES)
        end = _count_at_least(
            offsets, num_windows, first_key - tile_start - TILE + 1, TILE, LANES)
        for window in range(begin, end):
            at = tile_start + tl.load(offsets + window) + lanes
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
            distance = tile_start + TILE - 1 - at  # negative in padding
            taken = tl.load(covered + distance, mask=distance >= 0, other=1)
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
