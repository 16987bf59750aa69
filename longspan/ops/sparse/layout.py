"""What the vertical-slash kernels read besides the KV cache: one segment's selection, made ready.

All on the device, without a host sync: sizes follow from bounds that the host knows. Windows of
all heads get ranks and flags by tile gap; columns of each head are gathered once for all query
tiles, DCA zone by zone, so that kernels read them as contiguous tiles; tile means are put in
logical order, eight together far before the queries; the key tiles that query tiles list get bits
beside their lists. Six launches, one less each without the correction and without lists.

n is the number of key tiles up to the segment's last query, P the tile length.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.geometry import COARSE, INTER, near_border
from longspan.ops.types import PagedKV, Selection

NO_TILE = 1 << 30
"""Tile gap or key tile of padding: past everything."""
_LANES = 128


class TileLists(NamedTuple):
    """Key tiles that the segment's m query tiles list."""

    tiles: Tensor
    """[H, m, X] int32, part by part; padded with -1."""
    ends: Tensor
    """[H, m, 3] int32: where each part ends in ``tiles``."""
    bits: Tensor
    """[H, m, ceil(n / 32)] int32: bit i of word w says that key tile 32 w + i is listed."""


class SparseWork(NamedTuple):
    """One segment's selection. Parts 0, 1, 2 are keys of the zones inter, succ, intra in this
    order (part = 2 - zone); each part fills whole tiles of P rows, so no tile mixes zones."""

    borders: tuple[int, int]
    """First key tile of the succ part and of the intra part, host integers."""
    windows: Tensor
    """[H, W] int32 tile gaps, ascending; padded with `NO_TILE`."""
    window_rank: Tensor
    """[H, n + 1] int32: windows with a gap below g, so also where gap g stands in ``windows``."""
    window_flag: Tensor
    """[H, n] int8: gap g is a window."""
    column_rank: Tensor
    """[H, n + 1] int32: columns before key tile i."""
    k_cols: Tensor
    """[rows, D] keys of the columns, head by head, part by part; padding is 0."""
    v_cols: Tensor
    """[rows, D]"""
    col_tile: Tensor
    """[rows] int32 key tile of each row (windows at any offset: its position), or `NO_TILE`."""
    column_tiles: Tensor
    """[H, 4] int32: where each part begins and the last one ends in ``k_cols``, in tiles of P rows.
    In tile mode columns in or after the last query tile are left out: no query sees them so."""
    head_order: Tensor
    """[H] int32 heads, the one with most windows and column tiles first."""
    kept: Tensor
    """[] fp64 kept (query, key) pairs of all heads; 0 in paper mode, whose kernel adds them."""
    k_means: Tensor
    """[rows, K, D] mean keys: of ``mean_counts[0]`` tiles from ``first_mean`` to before the last
    query tile, then of ``mean_counts[1]`` times `COARSE` tiles from the first one on, then P rows
    of 0 and more. Empty without the correction."""
    v_means: Tensor
    """As ``k_means``."""
    mean_bias: Tensor
    """[H, rows] fp32: log2 of the tile's keys that are not columns, of `COARSE` tiles' less that of
    `COARSE`; padding -inf."""
    mean_counts: tuple[int, int]
    first_mean: int
    """First tile with a mean of its own: `near_border` of the first query tile."""
    near_tiles: int
    """`Selection.near_tiles`; where all tiles have their own mean, more than there are."""
    lists: TileLists | None
    """What query tiles list; None: nothing."""


def prepare(
    selection: Selection, cache: PagedKV, block_table: Tensor, start: int, stop: int, stride: int,
    correction: bool,
) -> SparseWork:
    """Prepare one segment, queries start ... stop - 1, which lie in one DCA chunk.

    cache: k, v [N, P, K, D] contiguous; block_table: [>= n]; stride: a multiple of P, unless no
    position reaches it.
    """
    tile_len, num_heads = cache.k.shape[1], selection.columns.shape[0]
    num_tiles = -(-stop // tile_len)
    chunk_start = start // stride * stride
    borders = max(chunk_start - stride, 0) // tile_len, chunk_start // tile_len
    own_pairs = num_heads * (_own_pairs(stop, tile_len) - _own_pairs(start, tile_len))
    if not selection.aligned:
        own_pairs = 0
    ints = cache.k.new_empty(0, dtype=torch.int32)
    k_cols, v_cols = _column_rows(selection, cache, min(start // stride, INTER) + 1)
    near_tiles = selection.near_tiles
    assert near_tiles is None or stride % (COARSE * tile_len) == 0 or stop <= stride, (
        "a coarse mean lies in one zone")
    first_mean = near_border(start // tile_len, near_tiles)
    mean_counts = num_tiles - 1 - first_mean, near_border(num_tiles - 1, near_tiles) // COARSE
    mean_rows = (-(-sum(mean_counts) // tile_len) + 1) * tile_len if correction else 0
    k_means, v_means = (x.new_empty(mean_rows, *x.shape[2:]) for x in (cache.k, cache.v))
    work = SparseWork(
        borders=borders,
        windows=ints.new_empty(selection.offsets.shape),
        window_rank=ints.new_empty(num_heads, num_tiles + 1),
        window_flag=ints.new_empty(num_heads, num_tiles, dtype=torch.int8),
        column_rank=ints.new_empty(num_heads, num_tiles + 1),
        k_cols=k_cols, v_cols=v_cols, col_tile=ints.new_empty(k_cols.shape[0]),
        column_tiles=ints.new_empty(num_heads, 4), head_order=ints.new_empty(num_heads),
        kept=torch.full((), own_pairs, dtype=torch.float64, device=cache.k.device),
        k_means=k_means, v_means=v_means,
        mean_bias=ints.new_empty(num_heads, k_means.shape[0], dtype=torch.float32),
        mean_counts=mean_counts, first_mean=first_mean,
        near_tiles=NO_TILE if near_tiles is None else near_tiles,
        lists=_lists(selection, start, num_tiles))
    _launch(work, selection, cache, block_table, start, stop)
    return work


def column_tile_bound(selection: Selection, tile_len: int, num_zones: int) -> int:
    """Return the largest number of tiles of P rows that all heads' columns fill, each zone's part
    rounded up."""
    num_heads, width = selection.columns.shape
    counts = selection.max_columns or (width,) * num_heads
    return sum(min(count, (count + num_zones * (tile_len - 1)) // tile_len) for count in counts)


def _own_pairs(position: int, tile_len: int) -> int:
    """Count the causal pairs inside their own tiles of all queries before ``position``."""
    tiles, rest = divmod(position, tile_len)
    return tiles * tile_len * (tile_len + 1) // 2 + rest * (rest + 1) // 2


def _column_rows(selection: Selection, cache: PagedKV, num_zones: int) -> tuple[Tensor, Tensor]:
    tile_len, head_dim = cache.k.shape[1], cache.k.shape[3]
    rows = column_tile_bound(selection, tile_len, num_zones) * tile_len
    return cache.k.new_empty(rows, head_dim), cache.v.new_empty(rows, head_dim)


def _lists(selection: Selection, start: int, num_tiles: int) -> TileLists | None:
    if selection.tiles is None:
        return None
    rows = slice(start // selection.tile_len - selection.first_tile,
                 num_tiles - selection.first_tile)
    tiles = selection.tiles[:, rows].contiguous()
    ends, bits = (tiles.new_empty(*tiles.shape[:2], size) for size in (3, -(-num_tiles // 32)))
    return TileLists(tiles, ends, bits)


def _launch(
    work: SparseWork, selection: Selection, cache: PagedKV, block_table: Tensor, start: int,
    stop: int,
) -> None:
    num_heads, width = selection.columns.shape
    num_windows = selection.offsets.shape[1]
    _, tile_len, num_kv_heads, head_dim = cache.k.shape
    num_tiles = work.column_rank.shape[1] - 1
    succ, intra = work.borders
    heads = triton.next_power_of_2(num_heads)
    # columns of the last tile are seen only where windows do not begin at tiles
    num_visible = num_tiles - 1 if selection.aligned else num_tiles
    _index_kernel[num_heads, triton.cdiv(num_tiles + 1, _LANES)](
        selection.offsets, selection.columns, work.windows, work.window_rank, work.window_flag,
        work.column_rank, work.kept, num_windows, width, width.bit_length(), num_tiles, start, stop,
        TILE=tile_len, LANES=_LANES, ALIGNED=selection.aligned)
    _plan_kernel[(1,)](
        work.window_rank, work.column_rank, work.column_tiles, work.head_order, num_heads,
        num_tiles, num_visible, succ, intra, TILE=tile_len, HEADS=heads)
    shape = {"GROUP": num_heads // num_kv_heads, "TILE": tile_len, "HEAD_DIM": head_dim}
    if work.col_tile.numel():
        _gather_columns_kernel[(work.col_tile.numel() // tile_len,)](
            cache.k, cache.v, block_table, selection.columns, work.column_tiles, work.column_rank,
            work.window_rank, work.window_flag, work.k_cols, work.v_cols, work.col_tile, work.kept,
            num_heads, num_kv_heads, width, num_tiles, num_visible, succ, intra, start,
            stop, HEADS=heads, ALIGNED=selection.aligned, **shape)
    if work.k_means.numel():
        assert cache.k_mean is not None and cache.v_mean is not None
        _gather_means_kernel[len(work.k_means) // tile_len, num_heads](
            cache.k_mean, cache.v_mean, block_table, work.column_rank, work.k_means, work.v_means,
            work.mean_bias, num_kv_heads, num_tiles, work.first_mean, *work.mean_counts,
            COARSE=COARSE, **shape)
    if work.lists is not None:
        tiles, ends, bits = work.lists
        _list_kernel[tiles.shape[1], num_heads](
            tiles, ends, bits, work.column_rank, work.kept, tiles.shape[2], bits.shape[2],
            num_tiles, succ, intra, start, stop, TILE=tile_len,
            WIDTH=triton.next_power_of_2(tiles.shape[2]), WORDS=32)


@triton.jit(do_not_specialize=[
    "num_windows", "num_columns", "num_steps", "num_tiles", "start", "stop"])
def _index_kernel(
    offsets, columns, windows, window_rank, window_flag, column_rank, kept, num_windows,
    num_columns, num_steps, num_tiles, start, stop, TILE: tl.constexpr, LANES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Count for one head and LANES values of i: windows with a gap below i, and columns before key
    tile i."""
    head = tl.program_id(0)
    tile = tl.program_id(1) * LANES + tl.arange(0, LANES)
    inside = tile <= num_tiles
    if ALIGNED:
        rank = tl.zeros([LANES], tl.int32)
        flag = tl.zeros([LANES], tl.int32)
        for first in range(0, num_windows, LANES):
            at = first + tl.arange(0, LANES)
            offset = tl.load(offsets + head * num_windows + at, at < num_windows, other=TILE)
            gap = tl.where(offset < TILE, -offset // TILE, 1 << 30).to(tl.int32)
            rank += tl.sum((gap[None, :] < tile[:, None]).to(tl.int32), 1)
            flag += tl.sum((gap[None, :] == tile[:, None]).to(tl.int32), 1)
            if tl.program_id(1) == 0:
                tl.store(windows + head * num_windows + at, gap, mask=at < num_windows)
                # rows whose tile has the window; the own tile is counted on the host
                rows = stop - tl.maximum(gap.to(tl.int64) * TILE, start)
                pairs = tl.where(gap > 0, tl.maximum(rows, 0) * TILE, 0)
                tl.atomic_add(kept, tl.sum(pairs, 0).to(tl.float64))
        tl.store(window_rank + head * (num_tiles + 1) + tile, rank, mask=inside)
        tl.store(window_flag + head * num_tiles + tile, flag.to(tl.int8), mask=tile < num_tiles)
    else:
        tl.store(window_rank + head * (num_tiles + 1) + tile, num_windows + tile * 0, mask=inside)
    # binary search: how many columns, ascending and padded with -1 at the end, lie before the tile
    row = columns + head.to(tl.int64) * num_columns
    count = tl.zeros([LANES], tl.int32)
    for step in range(num_steps):
        probe = count + (1 << (num_steps - 1 - step))
        exists = inside & (probe <= num_columns)
        value = tl.load(row + probe - 1, mask=exists, other=-1)
        count = tl.where((value >= 0) & (value < tile.to(tl.int64) * TILE), probe, count)
    tl.store(column_rank + head * (num_tiles + 1) + tile, count, mask=inside)


@triton.jit(do_not_specialize=["num_heads", "num_tiles", "num_visible", "succ", "intra"])
def _plan_kernel(
    window_rank, column_rank, column_tiles, head_order, num_heads, num_tiles, num_visible, succ,
    intra, TILE: tl.constexpr, HEADS: tl.constexpr,
):
    """Plan in one program where each head's columns go, and which head has most to do."""
    head = tl.arange(0, HEADS)
    exists = head < num_heads
    row = column_rank + head * (num_tiles + 1)
    before_succ = tl.load(row + succ, mask=exists, other=0)
    before_intra = tl.load(row + intra, mask=exists, other=0)
    visible = tl.load(row + num_visible, mask=exists, other=0)
    inter_tiles = tl.cdiv(before_succ, TILE)
    succ_tiles = tl.cdiv(before_intra - before_succ, TILE)
    tiles = inter_tiles + succ_tiles + tl.cdiv(visible - before_intra, TILE)
    end = tl.cumsum(tiles, 0)
    begin = end - tiles
    tl.store(column_tiles + head * 4, begin, mask=exists)
    tl.store(column_tiles + head * 4 + 1, begin + inter_tiles, mask=exists)
    tl.store(column_tiles + head * 4 + 2, begin + inter_tiles + succ_tiles, mask=exists)
    tl.store(column_tiles + head * 4 + 3, end, mask=exists)
    windows = tl.load(window_rank + head * (num_tiles + 1) + num_tiles, mask=exists, other=0)
    # unequal keys, so that ranks are a permutation
    work = tl.where(exists, (windows + tiles + 1) * HEADS - head, -head)
    rank = tl.sum((work[None, :] > work[:, None]).to(tl.int32), 1)
    tl.store(head_order + rank, head, mask=exists)


@triton.jit(do_not_specialize=[
    "num_heads", "num_kv_heads", "num_columns", "num_tiles", "num_visible", "succ", "intra",
    "start", "stop"])
def _gather_columns_kernel(
    k, v, block_table, columns, column_tiles, column_rank, window_rank, window_flag, k_cols,
    v_cols, col_tile, kept, num_heads, num_kv_heads, num_columns, num_tiles, num_visible, succ,
    intra, start, stop, GROUP: tl.constexpr, TILE: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr, ALIGNED: tl.constexpr,
):
    """Gather one tile of the columns: P keys and values of one head and zone."""
    tile = tl.program_id(0)
    heads = tl.arange(0, HEADS)
    ends = tl.load(column_tiles + heads * 4 + 3, mask=heads < num_heads, other=1 << 30)
    head = tl.sum((ends <= tile).to(tl.int32), 0)
    if head >= num_heads:
        return  # the bound on the number of tiles was not reached
    rank = column_rank + head * (num_tiles + 1)
    begin = tl.load(column_tiles + head * 4)
    first, last = 0, tl.load(rank + succ)
    if tile >= tl.load(column_tiles + head * 4 + 2):
        begin = tl.load(column_tiles + head * 4 + 2)
        first, last = tl.load(rank + intra), tl.load(rank + num_visible)
    elif tile >= tl.load(column_tiles + head * 4 + 1):
        begin = tl.load(column_tiles + head * 4 + 1)
        first, last = tl.load(rank + succ), tl.load(rank + intra)
    row = tl.arange(0, TILE)
    index = first + (tile - begin) * TILE + row
    exists = index < last
    position = tl.load(columns + head.to(tl.int64) * num_columns + index, mask=exists, other=0)
    block = tl.load(block_table + position // TILE, mask=exists, other=0)
    dims = tl.arange(0, HEAD_DIM)
    slot = (block * TILE + position % TILE) * num_kv_heads + head // GROUP
    source = slot[:, None] * HEAD_DIM + dims
    target = (tile.to(tl.int64) * TILE + row)[:, None] * HEAD_DIM + dims
    tl.store(k_cols + target, tl.load(k + source, mask=exists[:, None], other=0.0))
    tl.store(v_cols + target, tl.load(v + source, mask=exists[:, None], other=0.0))
    if ALIGNED:
        key_tile = (position // TILE).to(tl.int32)
        # kept pairs: query tiles after the key's whose gap is no window
        nearest = tl.maximum(start // TILE - key_tile, 1)
        farthest = num_tiles - 1 - key_tile
        seen = window_rank + head * (num_tiles + 1)
        taken = (tl.load(seen + farthest + 1, mask=exists, other=0)
                 - tl.load(seen + nearest, mask=exists, other=0))
        pairs = (farthest - nearest + 1 - taken).to(tl.int64) * TILE
        # rows of the first and the last query tile that are no queries
        flags = window_flag + head * num_tiles
        gap = start // TILE - key_tile
        free = tl.load(flags + gap, mask=exists & (gap > 0), other=1) == 0
        pairs -= tl.where(free, start % TILE, 0)
        free = tl.load(flags + farthest, mask=exists, other=1) == 0
        pairs -= tl.where(free, num_tiles * TILE - stop, 0)
        tl.atomic_add(kept, tl.sum(tl.where(exists, pairs, 0), 0).to(tl.float64))
        tl.store(col_tile + tile * TILE + row, tl.where(exists, key_tile, 1 << 30))
    else:
        tl.store(col_tile + tile * TILE + row, tl.where(exists, position.to(tl.int32), 1 << 30))


@triton.jit(do_not_specialize=[
    "num_kv_heads", "num_tiles", "first_mean", "num_near", "num_far"])
def _gather_means_kernel(
    k_mean, v_mean, block_table, column_rank, k_means, v_means, mean_bias, num_kv_heads, num_tiles,
    first_mean, num_near, num_far, GROUP: tl.constexpr, TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr, COARSE: tl.constexpr,
):
    """Gather P means: their bias for one query head; the first head of a group copies. Rows behind
    the ``num_near`` ones are means of COARSE tiles."""
    part, head = tl.program_id(0), tl.program_id(1)
    row = part * TILE + tl.arange(0, TILE)
    far = row - num_near
    is_near, is_far = far < 0, (far >= 0) & (far < num_far)
    tile = tl.where(is_near, first_mean + row, far * COARSE)
    size = tl.where(is_near, 1, COARSE)
    rank = column_rank + head * (num_tiles + 1) + tile
    exists = is_near | is_far
    taken = tl.load(rank + size, mask=exists, other=0) - tl.load(rank, mask=exists, other=0)
    left = tl.where(exists, size * TILE - taken, 0).to(tl.float32) / size
    bias = tl.where(left > 0, tl.math.log2(tl.maximum(left, 1e-6)), float("-inf"))
    tl.store(mean_bias + head.to(tl.int64) * tl.num_programs(0) * TILE + row, bias)
    if head % GROUP == 0:
        dims = tl.arange(0, HEAD_DIM)
        kv_head = head // GROUP
        key = tl.zeros([TILE, HEAD_DIM], tl.float32)
        value = tl.zeros([TILE, HEAD_DIM], tl.float32)
        for i in range(tl.where(part * TILE + TILE > num_near, COARSE, 1)):
            here = is_far | (is_near & (i == 0))
            block = tl.load(block_table + tile + i, mask=here, other=0)
            source = (block * num_kv_heads + kv_head)[:, None] * HEAD_DIM + dims
            key += tl.load(k_mean + source, here[:, None], other=0.0).to(tl.float32)
            value += tl.load(v_mean + source, here[:, None], other=0.0).to(tl.float32)
        share = 1.0 / size.to(tl.float32)
        target = (row.to(tl.int64) * num_kv_heads + kv_head)[:, None] * HEAD_DIM + dims
        tl.store(k_means + target, (key * share[:, None]).to(k_means.dtype.element_ty))
        tl.store(v_means + target, (value * share[:, None]).to(v_means.dtype.element_ty))


@triton.jit(do_not_specialize=[
    "width", "num_words", "num_tiles", "succ", "intra", "start", "stop"])
def _list_kernel(
    tiles, ends, bits, column_rank, kept, width, num_words, num_tiles, succ, intra, start, stop,
    TILE: tl.constexpr, WIDTH: tl.constexpr, WORDS: tl.constexpr,
):
    """List the parts, the bits and the pairs of one query tile and head."""
    row, head = tl.program_id(0), tl.program_id(1)
    place = head.to(tl.int64) * tl.num_programs(0) + row
    lane = tl.arange(0, WIDTH)
    tile = tl.load(tiles + place * width + lane, mask=lane < width, other=-1)
    exists = tile >= 0
    tl.store(ends + place * 3, tl.sum((exists & (tile < succ)).to(tl.int32), 0))
    tl.store(ends + place * 3 + 1, tl.sum((exists & (tile < intra)).to(tl.int32), 0))
    tl.store(ends + place * 3 + 2, tl.sum(exists.to(tl.int32), 0))
    for first in range(0, num_words, WORDS):
        word = first + tl.arange(0, WORDS)
        here = exists[None, :] & (tile[None, :] // 32 == word[:, None])
        found = tl.sum(tl.where(here, 1 << (tile % 32)[None, :], 0), 1)
        tl.store(bits + place * num_words + word, found, mask=word < num_words)
    # columns in these tiles are counted with the columns
    rank = column_rank + head.to(tl.int64) * (num_tiles + 1) + tile
    taken = tl.load(rank + 1, mask=exists, other=0) - tl.load(rank, mask=exists, other=0)
    first_query = (start // TILE + row) * TILE
    rows = tl.minimum(stop, first_query + TILE) - tl.maximum(start, first_query)
    keys = tl.sum(tl.where(exists, TILE - taken, 0), 0)
    tl.atomic_add(kept, (keys * rows).to(tl.float64))
