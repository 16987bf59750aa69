"""Vertical-slash prefill in one Triton kernel for each mode, Ampere and later.

In tile mode a program takes one query tile of one head and walks, zone by zone and in one online
softmax: the windows and the tiles it lists, whole KV blocks; the gathered columns, which drop out
where one of those covers them; and with the correction the means of all other tiles. Heads with
most to do go first, and in each head the late query tiles. `paper` mode (windows at any offset) is
in `triton_unaligned`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.geometry import COARSE, INTER, segments
from longspan.ops.sparse.layout import SparseWork, prepare
from longspan.ops.sparse.triton_unaligned import launch_paper_segment
from longspan.ops.tiles.rotary import rotated_query_variants
from longspan.ops.tiles.splits import launch_options
from longspan.ops.tiles.triton import add_tile, finish, scores_of
from longspan.ops.types import PagedKV, QueryRotary, Selection

_KEYS = 64  # at once: three loops and their biases leave no registers for more


def sparse_prefill_attention(
    q: Tensor, cache: PagedKV, block_table: Tensor, cached_len: int, rotary: QueryRotary,
    scale: float, selection: Selection, correction: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.sparse_prefill_attention`, for what `splits.supports`. No host sync.

    One launch for the queries, then for each DCA chunk that they touch six to prepare (see
    `layout`) and one to attend.
    """
    assert selection.aligned or not correction, "tile means belong to tile mode"
    assert not selection.aligned or selection.tile_len == cache.k.shape[1], "windows are KV blocks"
    num_queries, num_heads, _ = q.shape
    context_len = cached_len + num_queries
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
    launch = _launch_tile_segment if selection.aligned else launch_paper_segment
    variants = rotated_query_variants(
        q, cached_len, rotary, scale, cache.k.shape[1] if selection.aligned else 1)
    kept = []
    for start, stop in segments(cached_len, context_len, rotary.stride):
        work = prepare(selection, cache, block_table, start, stop, rotary.stride, correction)
        zones = min(start // rotary.stride, INTER) + 1
        launch(variants, cache, block_table, work, selection, out, lse, cached_len, start, stop,
               zones)
        kept.append(work.kept)
    return out, lse, kept[0] if len(kept) == 1 else torch.stack(kept).sum()


def _launch_tile_segment(
    variants: Tensor, cache: PagedKV, block_table: Tensor, work: SparseWork, selection: Selection,
    out: Tensor, lse: Tensor, cached_len: int, start: int, stop: int, zones: int,
) -> None:
    _, num_heads, num_rows, head_dim = variants.shape
    _, tile_len, num_kv_heads, _ = cache.k.shape
    num_tiles = work.window_flag.shape[1]
    num_query_tiles = num_tiles - start // tile_len
    options = launch_options(variants.device, tile_len)
    options = {**options, "KEYS": min(options["KEYS"], _KEYS)}
    _tile_kernel[(num_query_tiles * num_heads,)](
        variants, cache.k, cache.v, block_table, out, lse, work.windows, work.window_rank,
        work.window_flag, work.column_rank, work.k_cols, work.v_cols, work.col_tile,
        work.column_tiles, work.head_order, work.k_means, work.v_means, work.mean_bias,
        *(work.lists or (None, None, None)),
        cached_len, start, stop, num_rows, num_heads, num_kv_heads, work.windows.shape[1],
        num_tiles, num_query_tiles, zones, 0 if work.lists is None else work.lists.tiles.shape[2],
        *work.borders, len(work.k_means), work.mean_counts[0], work.first_mean,
        work.near_tiles, GROUP=num_heads // num_kv_heads,
        CORRECTION=len(work.k_means) > 0, COARSE=COARSE, TILE=tile_len, HEAD_DIM=head_dim,
        **options)


@triton.jit
def _free(scores, window_flag, list_bits, tile, key_tile):
    """Keep scores [M, N] of keys whose tile [N] is before the query tile, no window and not listed;
    the others become -inf."""
    gap = tile - key_tile
    taken = tl.load(window_flag + gap, mask=gap > 0, other=1).to(tl.int32)
    if list_bits is not None:
        word = tl.load(list_bits + key_tile // 32, mask=gap > 0, other=0)
        taken |= (word >> (key_tile % 32)) & 1
    return tl.where((taken == 0)[None, :], scores, float("-inf"))


@triton.jit
def _free_of_group(window_rank, list_bits, tile, group, exists, COARSE: tl.constexpr):
    """Count the tiles of each group [N] of COARSE that are no windows of the query tile and not
    listed, fp32; 0 where there is no group."""
    gap = tile - group * COARSE  # of the group's first tile, the largest
    free = COARSE - (tl.load(window_rank + gap + 1, mask=exists, other=COARSE)
                     - tl.load(window_rank + gap + 1 - COARSE, mask=exists, other=0))
    if list_bits is not None:
        word = tl.load(list_bits + group * COARSE // 32, mask=exists, other=0)
        bits = (word >> (group * COARSE % 32)) & (2**COARSE - 1)
        for i in tl.static_range(COARSE):
            free -= (bits >> i) & 1
    return tl.where(exists, free, 0).to(tl.float32)


@triton.jit(do_not_specialize=[
    "cached_len", "start", "stop", "num_rows", "num_heads", "num_kv_heads", "num_windows",
    "num_tiles", "num_query_tiles", "num_zones", "list_width", "succ", "intra", "mean_rows",
    "num_near", "first_mean", "near_tiles"])
def _tile_kernel(
    q, k, v, block_table, out, lse, windows, window_rank, window_flag, column_rank, k_cols, v_cols,
    col_tile, column_tiles, head_order, k_means, v_means, mean_bias, lists, list_ends, list_bits,
    cached_len, start, stop, num_rows, num_heads, num_kv_heads, num_windows, num_tiles,
    num_query_tiles, num_zones, list_width, succ, intra, mean_rows, num_near, first_mean,
    near_tiles, GROUP: tl.constexpr, CORRECTION: tl.constexpr, COARSE: tl.constexpr,
    TILE: tl.constexpr, KEYS: tl.constexpr, HEAD_DIM: tl.constexpr,
):
    """Compute one query tile of one head, zone by zone, the own one first, so that every row has a
    key."""
    SUB: tl.constexpr = TILE // KEYS
    item = tl.program_id(0)
    head = tl.load(head_order + item // num_query_tiles)
    tile = num_tiles - 1 - item % num_query_tiles
    window_rank += head * (num_tiles + 1)
    window_flag += head * num_tiles
    column_rank += head * (num_tiles + 1)
    windows += head * num_windows
    if list_bits is not None:
        list_row = head.to(tl.int64) * num_query_tiles + tile - (num_tiles - num_query_tiles)
        lists += list_row * list_width
        list_ends += list_row * 3
        list_bits += list_row * tl.cdiv(num_tiles, 32)

    dims = tl.arange(0, HEAD_DIM)
    rows = tl.arange(0, TILE)
    lanes = tl.arange(0, KEYS)
    q_row = head.to(tl.int64) * num_rows + (tile - cached_len // TILE) * TILE
    q += (q_row + rows)[:, None] * HEAD_DIM + dims
    zone_size = num_heads.to(tl.int64) * num_rows * HEAD_DIM
    kv_stride = num_kv_heads * HEAD_DIM
    kv_tile = lanes[:, None] * kv_stride + (head // GROUP) * HEAD_DIM + dims
    col_rows = lanes[:, None] * HEAD_DIM + dims
    block_size = kv_stride.to(tl.int64) * TILE
    acc = tl.zeros([TILE, HEAD_DIM], tl.float32)
    total = tl.zeros([TILE], tl.float32)
    top = tl.full([TILE], float("-inf"), tl.float32)
    for zone in range(num_zones):
        query = tl.load(q + zone * zone_size)
        first_key, stop_key = succ * 0, succ
        if zone == 0:
            first_key, stop_key = intra, tile
            base = tl.load(block_table + tile) * block_size
            for part in range(0, TILE, KEYS):
                # slots past the context may hold anything
                exists = (tile * TILE + part + lanes < stop)[:, None]
                key = tl.load(k + base + part * kv_stride + kv_tile, mask=exists, other=0.0)
                value = tl.load(v + base + part * kv_stride + kv_tile, mask=exists, other=0.0)
                scores = scores_of(query, key)
                scores = tl.where(part + lanes[None, :] <= rows[:, None], scores, float("-inf"))
                acc, total, top = add_tile(acc, total, top, scores, value)
        elif zone == 1:
            first_key, stop_key = succ, intra

        begin = tl.load(window_rank + tile - stop_key + 1)
        end = tl.load(window_rank + tile - first_key + 1)
        for part in range(begin * SUB, end * SUB):
            gap = tl.load(windows + part // SUB)
            base = tl.load(block_table + tile - gap) * block_size + part % SUB * KEYS * kv_stride
            key = tl.load(k + base + kv_tile)
            value = tl.load(v + base + kv_tile)
            acc, total, top = add_tile(acc, total, top, scores_of(query, key), value)

        if list_bits is not None:
            begin = tl.load(list_ends + 1 - zone, mask=zone < 2, other=0)
            end = tl.load(list_ends + 2 - zone)
            for part in range(begin * SUB, end * SUB):
                base = tl.load(block_table + tl.load(lists + part // SUB)) * block_size
                base += part % SUB * KEYS * kv_stride
                key = tl.load(k + base + kv_tile)
                value = tl.load(v + base + kv_tile)
                acc, total, top = add_tile(acc, total, top, scores_of(query, key), value)

        begin = tl.load(column_tiles + head * 4 + 2 - zone)
        # columns of later tiles, which stand at the end of the own zone's part, are not seen
        count = tl.load(column_rank + stop_key) - tl.load(column_rank + first_key)
        first_row = begin.to(tl.int64) * TILE
        for part in range(tl.cdiv(count, TILE) * SUB):
            columns = first_row * HEAD_DIM + part * KEYS * HEAD_DIM
            key = tl.load(k_cols + columns + col_rows)
            value = tl.load(v_cols + columns + col_rows)
            key_tile = tl.load(col_tile + first_row + part * KEYS + lanes)
            scores = _free(scores_of(query, key), window_flag, list_bits, tile, key_tile)
            acc, total, top = add_tile(acc, total, top, scores, value)

        if CORRECTION:
            border = tl.maximum(tile - near_tiles, 0) // COARSE * COARSE
            first = tl.maximum(first_key, border)
            for part in range(tl.cdiv(tl.maximum(stop_key - first, 0), KEYS)):
                row = first - first_mean + part * KEYS
                key = tl.load(k_means + row * kv_stride + kv_tile)
                value = tl.load(v_means + row * kv_stride + kv_tile)
                bias = tl.load(mean_bias + head * mean_rows + row + lanes)
                key_tile = first + part * KEYS + lanes
                scores = scores_of(query, key) + bias[None, :]
                scores = tl.where((key_tile < stop_key)[None, :], scores, float("-inf"))
                scores = _free(scores, window_flag, list_bits, tile, key_tile)
                acc, total, top = add_tile(acc, total, top, scores, value)
            first = first_key // COARSE
            stop_group = tl.minimum(stop_key, border) // COARSE
            for part in range(tl.cdiv(tl.maximum(stop_group - first, 0), KEYS)):
                group = first + part * KEYS + lanes
                row = num_near + first + part * KEYS
                key = tl.load(k_means + row * kv_stride + kv_tile)
                value = tl.load(v_means + row * kv_stride + kv_tile)
                bias = tl.load(mean_bias + head * mean_rows + row + lanes)
                bias += tl.log2(_free_of_group(
                    window_rank, list_bits, tile, group, group < stop_group, COARSE))
                acc, total, top = add_tile(
                    acc, total, top, scores_of(query, key) + bias[None, :], value)

    result, row_lse = finish(acc, total, top)
    position = tile * TILE + rows
    exists = (position >= start) & (position < stop)
    row = (position - cached_len).to(tl.int64) * num_heads + head
    tl.store(out + row[:, None] * HEAD_DIM + dims, result.to(out.dtype.element_ty),
             mask=exists[:, None])
    tl.store(lse + row, row_lse, mask=exists)
