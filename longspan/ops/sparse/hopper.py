"""Vertical-slash prefill on Hopper, in Gluon: `tile` mode. See `hopper_tile` for how it works.

Windows and the tiles that the query tile lists are whole KV blocks and come first. Then come keys
with a bias, gathered columns and tile means as `layout` prepares them: the producer works out
which of them a query tile does not see, and writes their biases beside the tile.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from longspan.ops.sparse.hopper_loads import (
    COARSE_TILES,
    column_bias,
    cover,
    far_mean_bias,
    load_biased,
    load_whole,
    near_mean_bias,
)
from longspan.ops.sparse.layout import SparseWork, TileLists, prepare
from longspan.ops.tiles.hopper import (
    HALF,
    STAGES,
    TILE,
    TILE_LEN,
    ZONES,
    as_they_are,
    causal,
    finish,
    first_step,
    key_tiles,
    load_queries,
    query_halves,
    step,
    wait_for_queries,
)
from longspan.ops.tiles.rotary import rotated_query_variants
from longspan.ops.types import PagedKV, QueryRotary, Selection


def sparse_prefill_attention(
    q: Tensor, cache: PagedKV, block_table: Tensor, cached_len: int, rotary: QueryRotary,
    scale: float, selection: Selection, correction: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.sparse_prefill_attention`; `tile` mode, whole tiles. No host sync."""
    num_queries, num_heads, _ = q.shape
    context_len = cached_len + num_queries
    assert selection.aligned and cached_len % TILE_LEN == 0 == context_len % TILE_LEN
    work = prepare(
        selection, cache, block_table, cached_len, context_len, rotary.stride, correction)
    variants = rotated_query_variants(q, cached_len, rotary, scale, TILE_LEN)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(num_queries, num_heads, dtype=torch.float32, device=q.device)
    launch(variants, cache, block_table, work, out, lse, cached_len)
    return out, lse, work.kept


def launch(
    variants: Tensor, cache: PagedKV, block_table: Tensor, work: SparseWork, out: Tensor,
    lse: Tensor, cached_len: int,
) -> None:
    """Launch the attention itself. variants: [Z, H, T, D]; out: [T, H, D]; lse: [T, H]."""
    num_queries, num_heads, _ = out.shape
    k_cols, v_cols, k_means, v_means = _scratch(work, cache)
    lists = work.lists or TileLists(work.windows, work.windows, work.windows)  # not read
    _sparse_kernel[(num_queries // TILE_LEN * num_heads,)](
        query_halves(variants), key_tiles(cache.k), key_tiles(cache.v), key_tiles(k_cols),
        key_tiles(v_cols), key_tiles(k_means), key_tiles(v_means), block_table, work.windows,
        work.window_flag, work.window_rank, work.column_rank, work.column_tiles, work.col_tile,
        work.mean_bias, work.head_order, *lists, out, lse, num_queries // TILE_LEN,
        cached_len // TILE_LEN, (cached_len + num_queries) // TILE_LEN, work.borders[1],
        work.borders[0], num_heads, num_heads // cache.k.shape[2], work.windows.shape[1],
        lists.tiles.shape[-1], len(work.k_means), work.mean_counts[0], work.first_mean,
        work.near_tiles, variants.shape[0], CORRECTED=len(work.k_means) > 0,
        LISTED=work.lists is not None, num_warps=4)


def _scratch(work: SparseWork, cache: PagedKV) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return columns and means; where there are none, something that a descriptor can name."""
    columns, means = work.k_cols.shape[0] > 0, work.k_means.shape[0] > 0
    width = TILE_LEN * cache.k.shape[2]
    spare_k, spare_v = cache.k.view(-1, width), cache.v.view(-1, width)
    return (work.k_cols if columns else spare_k, work.v_cols if columns else spare_v,
            work.k_means if means else spare_k, work.v_means if means else spare_v)


@gluon.jit
def _num_means(first, end, border):
    """Return how many means a zone's tiles [first, end) have, of single tiles and of groups."""
    near = gl.maximum(end - gl.maximum(first, border), 0)
    return near, gl.maximum(gl.minimum(end, border) - first, 0) // COARSE_TILES


@gluon.jit
def _mean_steps(first, end, border):
    """Return how many steps a zone's means take."""
    near, far = _num_means(first, end, border)
    return cover(near) + cover(far)


@gluon.jit
def _sparse_item(
    head_order, window_rank, column_rank, list_ends, num_tiles, first_tile, num_key_tiles, start,
    previous, near_tiles, CORRECTED: gl.constexpr, LISTED: gl.constexpr,
):
    """Find this program's query tile, head, and how its steps lie: windows and listed tiles of the
    zones intra, succ, inter (each bound is where the zone ends), then the biased keys of the same
    zones. Before them, where the zones' windows end, and the list's parts.

    Heavy heads come first; a head's query tiles are neighbours, since they share its columns.
    """
    pid = gl.program_id(0)
    head = gl.load(head_order + pid // num_tiles)
    tile = first_tile + num_tiles - 1 - pid % num_tiles
    windows = window_rank + head * (num_key_tiles + 1) + tile + 1  # [-x]: gaps up to tile - x
    columns = column_rank + head * (num_key_tiles + 1)
    own_windows = gl.load(windows - start)
    near_windows = gl.load(windows - previous)
    all_windows = gl.load(windows)
    inter = gl.load(columns + previous)
    succ = gl.load(columns + start) - inter
    intra = gl.load(columns + tile) - inter - succ
    own_whole, near_whole, all_whole = own_windows, near_windows, all_windows
    inter_list, succ_list, whole_list = tile * 0, tile * 0, tile * 0
    if LISTED:
        ends = list_ends + (head * num_tiles + tile - first_tile) * 3
        inter_list, succ_list, whole_list = gl.load(ends), gl.load(ends + 1), gl.load(ends + 2)
        own_whole += whole_list - succ_list
        near_whole += whole_list - inter_list
        all_whole += whole_list
    own_steps = all_whole + cover(intra)
    near_steps = own_steps + cover(succ)
    steps = near_steps + cover(inter)
    if CORRECTED:
        border = gl.maximum(tile - near_tiles, 0) // COARSE_TILES * COARSE_TILES
        own_means = _mean_steps(start, tile, border)
        near_means = own_means + _mean_steps(previous, start, border)
        own_steps += own_means
        near_steps += near_means
        steps += near_means + _mean_steps(previous * 0, previous, border)
    return (tile, head, own_windows, near_windows, all_windows, inter_list, succ_list, whole_list,
            own_whole, near_whole, all_whole, intra, succ, inter, own_steps, near_steps, steps)


@gluon.jit
def _sparse_producer(
    q_desc, k_desc, v_desc, k_col_desc, v_col_desc, k_mean_desc, v_mean_desc, block_table, windows,
    window_flag, window_rank, column_rank, column_tiles, column_tile, mean_bias, head_order, lists,
    list_ends, list_bits, q_smem, k_smem, v_smem, bias_smem, flag_smem, q_full, k_full, k_empty,
    v_full, v_empty, num_tiles, first_tile, num_key_tiles, start, previous, num_heads, group,
    max_windows, list_width, mean_rows, num_near, first_mean, near_tiles, num_zones,
    CORRECTED: gl.constexpr, LISTED: gl.constexpr,
):
    (tile, head, own_windows, near_windows, all_windows, inter_list, succ_list, whole_list,
     own_whole, near_whole, all_whole, intra, succ, inter, own_steps, near_steps, steps) = (
        _sparse_item(head_order, window_rank, column_rank, list_ends, num_tiles, first_tile,
                     num_key_tiles, start, previous, near_tiles, CORRECTED, LISTED))
    row = (head * num_tiles + tile - first_tile) * TILE
    load_queries(q_desc, q_smem, q_full, row, num_heads * num_tiles * TILE, num_zones)
    column = head // group * TILE
    windows += head * max_windows
    i = tile * 0
    if LISTED:
        list_row = head * num_tiles + tile - first_tile
        lists += list_row * list_width
        list_bits += list_row.to(gl.int64) * ((num_key_tiles + 31) // 32)
        for zone in gl.static_range(ZONES):
            if zone == 0:
                first, stop, begin, end = tile * 0, own_windows, succ_list, whole_list
            elif zone == 1:
                first, stop, begin, end = own_windows, near_windows, inter_list, succ_list
            else:
                first, stop, begin, end = near_windows, all_windows, tile * 0, inter_list
            i = load_whole(i, k_desc, v_desc, block_table, windows, tile, -1, first, stop, column,
                            k_smem, v_smem, k_full, k_empty, v_full, v_empty)
            i = load_whole(i, k_desc, v_desc, block_table, lists, 0, 1, begin, end, column, k_smem,
                            v_smem, k_full, k_empty, v_full, v_empty)
    else:
        i = load_whole(i, k_desc, v_desc, block_table, windows, tile, -1, 0, all_windows, column,
                        k_smem, v_smem, k_full, k_empty, v_full, v_empty)
    flags = window_flag + head * num_key_tiles
    bias = mean_bias + head * mean_rows
    for zone in gl.static_range(ZONES):
        part = gl.load(column_tiles + head * 4 + 2 - zone) * TILE
        if zone == 0:
            first, end, count = start, tile, intra
        elif zone == 1:
            first, end, count = previous, start, succ
        else:
            first, end, count = previous * 0, previous, inter
        i = load_biased(
            i, k_col_desc, v_col_desc, (flags, list_bits, tile, column_tile), part, count, 0,
            k_smem, v_smem, bias_smem, flag_smem, k_full, k_empty, v_full, v_empty, column_bias,
            LISTED)
        if CORRECTED:
            border = gl.maximum(tile - near_tiles, 0) // COARSE_TILES * COARSE_TILES
            near, far = _num_means(first, end, border)
            near_tile = gl.maximum(first, border)
            i = load_biased(
                i, k_mean_desc, v_mean_desc, (flags, list_bits, tile, bias, near_tile),
                near_tile - first_mean, near, column, k_smem, v_smem, bias_smem, flag_smem, k_full,
                k_empty, v_full, v_empty, near_mean_bias, LISTED)
            group = first // COARSE_TILES
            ranks = window_rank + head * (num_key_tiles + 1)
            i = load_biased(
                i, k_mean_desc, v_mean_desc, (ranks, list_bits, tile, bias, group),
                num_near + group, far, column, k_smem, v_smem, bias_smem, flag_smem, k_full,
                k_empty, v_full, v_empty, far_mean_bias, LISTED)


@gluon.jit
def _biased(s, slot, facts, SCORES: gl.constexpr):
    """Add the biases of a slot's keys where its flag says that they have any."""
    bias_smem, flag_smem = facts
    flag = gl.sum(flag_smem.index(slot).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
    if flag > 0:
        bias = bias_smem.index(slot).load(gl.SliceLayout(0, SCORES))
        s = s + bias[None, :]
    return s


@gluon.jit
def _sparse_consumer(
    out, lse, head_order, window_rank, column_rank, list_ends, q_smem, k_smem, v_smem, bias_smem,
    flag_smem, q_full, k_full, k_empty, v_full, v_empty, num_tiles, first_tile, num_key_tiles,
    start, previous, near_tiles, num_heads, num_zones, CORRECTED: gl.constexpr,
    LISTED: gl.constexpr, Q_HALF: gl.constexpr,
):
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    PROBS: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    (tile, head, own_windows, near_windows, all_windows, inter_list, succ_list, whole_list,
     own_whole, near_whole, all_whole, intra, succ, inter, own_steps, near_steps, steps) = (
        _sparse_item(head_order, window_rank, column_rank, list_ends, num_tiles, first_tile,
                     num_key_tiles, start, previous, near_tiles, CORRECTED, LISTED))
    row = tile * TILE + Q_HALF * HALF
    wait_for_queries(q_full, num_zones)
    p, m, total = first_step(q_smem.index(Q_HALF), k_smem, k_full, k_empty, v_full,
                             (tile * TILE, row), causal, SCORES, PROBS)
    acc = gl.zeros([HALF, TILE], gl.float32, SCORES)
    for i in range(1, all_whole):
        zone = (i >= own_whole).to(gl.int32) + (i >= near_whole).to(gl.int32)
        p, acc, m, total = step(
            i, q_smem.index(2 * zone + Q_HALF), k_smem, v_smem, k_full, k_empty, v_full, v_empty,
            p, acc, m, total, (), as_they_are, SCORES, PROBS)
    for i in range(all_whole, steps):
        zone = (i >= own_steps).to(gl.int32) + (i >= near_steps).to(gl.int32)
        p, acc, m, total = step(
            i, q_smem.index(2 * zone + Q_HALF), k_smem, v_smem, k_full, k_empty, v_full, v_empty,
            p, acc, m, total, (bias_smem, flag_smem), _biased, SCORES, PROBS)
    finish(out, lse, v_smem, steps - 1, p, acc, m, total, row, first_tile * TILE,
            (first_tile + num_tiles) * TILE, head, num_heads, SCORES)


@gluon.jit(do_not_specialize=[
    "num_tiles", "first_tile", "num_key_tiles", "start", "previous", "num_heads", "group",
    "max_windows", "list_width", "mean_rows", "num_near", "first_mean", "near_tiles", "num_zones"])
def _sparse_kernel(
    q_desc, k_desc, v_desc, k_col_desc, v_col_desc, k_mean_desc, v_mean_desc, block_table, windows,
    window_flag, window_rank, column_rank, column_tiles, column_tile, mean_bias, head_order, lists,
    list_ends, list_bits, out, lse, num_tiles, first_tile, num_key_tiles, start, previous,
    num_heads, group, max_windows, list_width, mean_rows, num_near, first_mean, near_tiles,
    num_zones, CORRECTED: gl.constexpr, LISTED: gl.constexpr,
):
    """Compute one query tile of one head over its windows, listed tiles, columns and tile means."""
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [2 * ZONES, HALF, TILE], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, TILE, TILE], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, TILE, TILE], v_desc.layout)
    bias_smem = gl.allocate_shared_memory(
        gl.float32, [STAGES, TILE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    flag_smem = gl.allocate_shared_memory(
        gl.int32, [STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [ZONES, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for zone in gl.static_range(ZONES):
        mbarrier.init(q_full.index(zone), count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), count=2)  # the keys' copy and their bias
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(k_empty.index(slot), count=2)  # both consumers
        mbarrier.init(v_empty.index(slot), count=2)
    fence_async_shared()
    gl.warp_specialize([
        (_sparse_consumer, (
            out, lse, head_order, window_rank, column_rank, list_ends, q_smem, k_smem, v_smem,
            bias_smem, flag_smem, q_full, k_full, k_empty, v_full, v_empty, num_tiles, first_tile,
            num_key_tiles, start, previous, near_tiles, num_heads, num_zones,
            gl.constexpr(CORRECTED), gl.constexpr(LISTED), gl.constexpr(0))),
        (_sparse_consumer, (
            out, lse, head_order, window_rank, column_rank, list_ends, q_smem, k_smem, v_smem,
            bias_smem, flag_smem, q_full, k_full, k_empty, v_full, v_empty, num_tiles, first_tile,
            num_key_tiles, start, previous, near_tiles, num_heads, num_zones,
            gl.constexpr(CORRECTED), gl.constexpr(LISTED), gl.constexpr(1))),
        (_sparse_producer, (
            q_desc, k_desc, v_desc, k_col_desc, v_col_desc, k_mean_desc, v_mean_desc, block_table,
            windows, window_flag, window_rank, column_rank, column_tiles, column_tile, mean_bias,
            head_order, lists, list_ends, list_bits, q_smem, k_smem, v_smem, bias_smem, flag_smem,
            q_full, k_full, k_empty, v_full, v_empty, num_tiles, first_tile, num_key_tiles, start,
            previous, num_heads, group, max_windows, list_width, mean_rows, num_near,
            first_mean, near_tiles, num_zones, gl.constexpr(CORRECTED), gl.constexpr(LISTED))),
    ], [4, 1], [232, 40])
