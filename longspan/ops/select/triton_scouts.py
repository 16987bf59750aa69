"""Scouts on the device: `scouts.add_scouts` in Triton, with the same rules and nothing to wait for.

One pass of the scouts over all keys gives, for each scout, its largest logit in each key tile among
those that it does not keep, and the LSE of those that it keeps: columns by a kernel of their own,
windows on the way. Then each query tile lists the key tiles with the largest excess over its
scouts. Scores carry scale * log2(e), as in `triton_tiles`. On Hopper the pass is `hopper_scouts`.

Heads are taken as many at a time as the workspace allows.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.geometry import num_scouts
from longspan.ops.select import top_k
from longspan.ops.select import triton_tiles as probe
from longspan.ops.select.top_k import chosen_of, count_above, threshold_of
from longspan.ops.select.triton_tiles import SPANS, load_keys, load_rows, zone_tiles
from longspan.ops.types import Budget, PagedKV, QueryRotary, Selection

WORKSPACE_BYTES = 72 << 20
"""For the largest logits of scouts in key tiles, and which keys are columns: seven heads with 256
scouts each over a million keys."""
ROW_BLOCK = 128
"""Scouts in one matrix product."""
COLUMN_ROWS, COLUMN_BLOCK = 64, 64
"""Scouts and columns in one matrix product."""
WAVES = 4
"""Programs over the device, in waves: one wave of heads times row blocks would leave many places
empty."""


class _Scouts(NamedTuple):
    """The scouts of all heads, for one segment."""

    rows: Tensor
    """[H, R] int32, ascending, from the segment's first query on"""
    queries: Tensor
    """[zones, H, RP, D] rotated, scale * log2(e) in them"""
    start: int
    zones: tuple[int, int, int, int]
    """How many there are, all key tiles, and where the inter and the succ zone end."""


def add_scouts(
    selection: Selection, q: Tensor, cache: PagedKV, block_table: Tensor, start: int,
    rotary: QueryRotary, scale: float, budget: Budget, num_programs: int,
) -> Selection:
    """See `scouts.add_scouts`. num_programs: as many as the device runs at once."""
    num_heads, tile_len = q.shape[1], selection.tile_len
    count = num_scouts(len(q), start + len(q), budget.num_scouts, budget.most_scouts)
    padded = max(16, triton.next_power_of_2(max(count, budget.num_scouts)))
    scouts = _rotated(q, _place(q, count), start, rotary, scale, tile_len, padded)
    num_tiles, first_tile = scouts.zones[1], start // tile_len
    tiles = torch.empty(num_heads, num_tiles - first_tile, budget.scout_tiles, dtype=torch.int32,
                        device=q.device)
    group = num_heads // cache.k.shape[2]
    bytes_per_group = group * num_tiles * (4 * padded + tile_len + 1)
    at_once = max(1, min(num_heads // group, WORKSPACE_BYTES // bytes_per_group)) * group
    for first in range(0, num_heads, at_once):
        part = slice(first, min(num_heads, first + at_once))
        missed, kept = _score(selection, scouts, cache, block_table, part, num_programs)
        list_tiles[tiles.shape[1], part.stop - first](
            missed, kept, scouts.rows, tiles, first, scouts.rows.shape[1], start, num_tiles,
            tiles.shape[2], budget.scout_threshold * math.log2(math.e), RP=padded,
            P=tile_len, BLOCK=max(1024, triton.next_power_of_2(num_tiles)),
            WIDTH=triton.next_power_of_2(tiles.shape[2]), num_warps=8)
        del missed  # or the next heads' would be allocated beside them
    return selection._replace(tiles=tiles, first_tile=first_tile, scouts=scouts.rows)


def _place(q: Tensor, count: int) -> Tensor:
    """Return `scouts.place_scouts` of all heads: [H, R] int32."""
    num_queries, num_heads, head_dim = q.shape
    count = min(count, num_queries)
    mean = _mean(q)
    differences = torch.empty(num_heads, num_queries, dtype=torch.float32, device=q.device)
    mean_differences[(triton.cdiv(num_queries, 64), num_heads)](
        q, mean, differences, q.stride(0), q.stride(1), num_queries, D=head_dim, BLOCK=64)
    rows = torch.empty(num_heads, count, dtype=torch.int32, device=q.device)
    top_k.select_largest(
        differences, top_k.on_device((count,) * num_heads, q.device), rows, 0, floor=0,
        backwards=False)
    return rows


def _mean(q: Tensor) -> Tensor:
    """Mean query of each head, [H, D] fp32. PyTorch's own mean over so many rows takes twice the
    workspace of all the rest for its partial sums."""
    num_queries, num_heads, head_dim = q.shape
    sums = torch.empty(triton.cdiv(num_queries, 128), num_heads, head_dim, dtype=torch.float32,
                       device=q.device)
    sum_queries[(len(sums), num_heads)](
        q, sums, q.stride(0), q.stride(1), num_queries, num_heads, D=head_dim, BLOCK=128)
    return sums.sum(0) / num_queries


def _rotated(
    q: Tensor, rows: Tensor, start: int, rotary: QueryRotary, scale: float, tile_len: int,
    padded: int,
) -> _Scouts:
    """Rotate the rows for every zone, padded to a power of two and to as many as there are at a
    million keys also where a short segment has fewer: kernels are not compiled anew for it."""
    num_heads, count = rows.shape
    chunk_start = start // rotary.stride * rotary.stride
    zones = min(3, 1 + chunk_start // rotary.stride)
    queries = torch.empty(zones, num_heads, padded, q.shape[2], dtype=q.dtype, device=q.device)
    probe.rotate_listed[(padded // 16, num_heads)](
        q, rotary.inv_freq, queries, rows, q.stride(0), q.stride(1), start, chunk_start,
        rotary.stride if zones > 1 else 0, rotary.clamp if zones > 2 else 0,
        scale * math.log2(math.e), count, num_heads, RP=padded, HALF=q.shape[2] // 2, ZONES=zones,
        BLOCK=16)
    borders = max(0, chunk_start - rotary.stride) // tile_len, chunk_start // tile_len
    return _Scouts(rows, queries, start, (zones, -(-(start + q.shape[0]) // tile_len), *borders))


def _score(
    selection: Selection, scouts: _Scouts, cache: PagedKV, block_table: Tensor, heads: slice,
    num_programs: int,
) -> tuple[Tensor, Tensor]:
    """Return the largest logits that are not kept, [heads here, tiles, RP], and log2 of the kept
    mass, [heads here, RP]; base 2."""
    num_zones, num_tiles, *_ = scouts.zones
    _, num_heads, padded, head_dim = scouts.queries.shape
    tile_len, num_here, k = selection.tile_len, heads.stop - heads.start, cache.k
    group = num_heads // k.shape[2]
    flags = _flags(selection, heads, num_tiles)
    missed = torch.empty(num_here, num_tiles, padded, dtype=torch.float32, device=k.device)
    on_hopper = _on_hopper(scouts.queries, k)
    block = min(ROW_BLOCK, padded)
    programs = (
        _hopper().num_parts(scouts.queries, k, num_here // group) if on_hopper
        else min(num_tiles, max(1, WAVES * num_programs // (padded // block * num_here))))
    shape = programs + 1, num_here, padded  # the last part is the columns'
    kept = torch.empty(*shape, dtype=torch.float32, device=k.device)
    constants = {"GROUP": group, "RP": padded, "P": tile_len, "D": head_dim,
                 "PRECISION": "ieee" if k.dtype == torch.float32 else "tf32"}
    few = min(COLUMN_ROWS, padded)
    score_columns[(padded // few, num_here)](
        scouts.queries, k, block_table, scouts.rows, selection.columns, kept,
        *k.stride()[:3], heads.start, num_heads, *scouts.zones, scouts.start, scouts.rows.shape[1],
        selection.columns.shape[1], programs, BM=few, BLOCK=COLUMN_BLOCK, **constants)
    if on_hopper:
        _hopper().score(
            scouts.queries, scouts.rows, k, block_table, _hopper().Flags(*flags), missed, kept,
            (heads.start // group, num_here // group), scouts.zones, scouts.start)
    else:
        score_scouts[(programs, padded // block, num_here)](
            scouts.queries, k, block_table, scouts.rows, *flags, missed, kept,
            *k.stride()[:3], heads.start, num_heads, *scouts.zones, scouts.start,
            scouts.rows.shape[1], BM=block, **constants, num_warps=8, num_stages=3)
    return missed, _combined(kept, scouts)


def _combined(partial: Tensor, scouts: _Scouts) -> Tensor:
    """Combine the programs' log-sums, [programs, heads here, RP], to [heads here, RP]."""
    programs, num_here, padded = partial.shape
    lse = torch.empty(num_here, padded, dtype=torch.float32, device=partial.device)
    probe.combine_logs[(triton.cdiv(lse.numel(), 32),)](
        partial, lse, programs, lse.numel(), scouts.rows.shape[1], RP=padded,
        NP=triton.next_power_of_2(programs), BLOCK=32)
    return lse


def _on_hopper(queries: Tensor, k: Tensor) -> bool:
    """Return whether Hopper's kernel takes the rotated scouts, [zones, H, RP, D]."""
    return k.is_cuda and bool(_hopper().supports(queries, k, queries.shape[2]))


def _hopper() -> ModuleType:
    """Import Gluon's kernels with the first CUDA tensor: they cannot be interpreted."""
    from longspan.ops.select import hopper_scouts

    return hopper_scouts


def _flags(selection: Selection, heads: slice, num_tiles: int) -> tuple[Tensor, Tensor]:
    """Return which tile gaps are windows, [heads here, tiles] int8, and which keys columns, [heads
    here, tiles + 1, P] int8, of which the last tile takes the padding."""
    offsets, columns = selection.offsets[heads], selection.columns[heads]
    tile_len = selection.tile_len
    is_window = columns.new_zeros(len(offsets), num_tiles, dtype=torch.int8)
    is_window.scatter_(1, (-offsets // tile_len).clamp(min=0), 1)  # gap 0 is always one
    return is_window, column_flags(columns, num_tiles, tile_len)


def column_flags(columns: Tensor, num_tiles: int, tile_len: int) -> Tensor:
    """Return which keys are columns, [H, (tiles + 1) * P] int8; the last tile takes the padding.
    columns: [H, V]."""
    is_column = columns.new_zeros(len(columns), (num_tiles + 1) * tile_len, dtype=torch.int8)
    return is_column.scatter_(1, columns.where(columns >= 0, num_tiles * tile_len), 1)


@triton.jit(do_not_specialize=["num_queries", "num_heads"])
def sum_queries(
    q, sums, stride_token, stride_head, num_queries, num_heads, D: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Sum BLOCK queries of one head. q: [T, H, D]; sums: [T / BLOCK, H, D] fp32. Grid
    (T / BLOCK, H)."""
    block, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row, d = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, D)
    source = q + row[:, None] * stride_token + head * stride_head + d[None, :]
    x = tl.load(source, mask=(row < num_queries)[:, None], other=0.0).to(tl.float32)
    tl.store(sums + (block * num_heads + head) * D + d, tl.sum(x, 0))


@triton.jit(do_not_specialize=["num_queries"])
def mean_differences(
    q, mean, differences, stride_token, stride_head, num_queries, D: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Compute 1 - cosine of each query to its head's mean. q: [T, H, D]; mean: [H, D] fp32;
    differences: [H, T]. Grid (T / BLOCK, H)."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1).to(tl.int64)
    d, exists = tl.arange(0, D), row < num_queries
    source = q + row.to(tl.int64)[:, None] * stride_token + head * stride_head + d[None, :]
    x = tl.load(source, mask=exists[:, None], other=0.0).to(tl.float32)
    m = tl.load(mean + head * D + d)
    length = tl.sqrt(tl.sum(x * x, 1) * tl.sum(m * m, 0))
    cosine = tl.sum(x * m[None, :], 1) / tl.maximum(length, 1e-30)
    tl.store(differences + head * num_queries + row, tl.maximum(1.0 - cosine, 0.0), mask=exists)


@triton.jit
def _add(top, total, scores):
    """Add a tile's mass to the rows' running one, relative to their largest logit."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    mass = tl.sum(tl.exp2(scores - new_top[:, None]), 1)
    return new_top, total * tl.exp2(top - new_top) + mass


@triton.jit(do_not_specialize=["first_head", *SPANS[1:], "start", "num_rows"])
def score_scouts(
    queries, keys, table, rows, is_window, is_column, missed, kept, stride_block,
    stride_token, stride_head, first_head, num_heads, num_zones, num_tiles, inter_end, succ_end,
    start, num_rows,
    GROUP: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Score BM scouts of one head over every n-th key tile, without columns: their largest logit in
    the tile unless they keep it, and the log2 of the mass of the tiles that they keep.

    missed: [heads here, tiles, RP]; kept: [programs + 1, heads here, RP]. Grid (programs,
    RP / BM, heads here).
    """
    program, local = tl.program_id(0), tl.program_id(2).to(tl.int64)
    head = first_head + local
    keys += head // GROUP * stride_head
    is_window += local * num_tiles
    is_column += local * (num_tiles + 1) * P
    missed += local * num_tiles * RP
    row, lane = tl.program_id(1) * BM + tl.arange(0, BM), tl.arange(0, P)
    place = tl.load(rows + head * num_rows + row, mask=row < num_rows, other=-1)
    position = tl.where(place < 0, -1, start + place)
    top = tl.full([BM], -1e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    for zone in range(num_zones):
        first, stop = zone_tiles(zone, program, tl.num_programs(0), num_tiles, inter_end, succ_end)
        q = load_rows(queries, (zone * num_heads + head) * RP, row, RP, D)
        for tile in range(first, stop, tl.num_programs(0)):
            k = load_keys(keys, table, tile, stride_block, stride_token, P, D)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            key = tile * P + lane
            if tile >= start // P:  # slots past the context may hold anything
                scores = tl.where(key[None, :] <= position[:, None], scores, float("-inf"))
            scores = tl.where(tl.load(is_column + key)[None, :] != 0, float("-inf"), scores)
            gap = tl.where(place < 0, -1, position // P - tile)
            window = tl.load(is_window + gap, mask=gap >= 0, other=0) != 0
            if tl.max(window.to(tl.int32), 0) != 0:
                top, total = _add(
                    top, total, tl.where(window[:, None], scores, float("-inf")))
                scores = tl.where(window[:, None], float("-inf"), scores)
            tl.store(missed + tile * RP + row, tl.max(scores, 1))
    target = (program * tl.num_programs(2) + local) * RP + row
    tl.store(kept + target, top + tl.log2(total))


@triton.jit(do_not_specialize=[
    "first_head", *SPANS[1:], "start", "num_rows", "num_columns", "part"])
def score_columns(
    queries, keys, table, rows, columns, kept, stride_block, stride_token, stride_head,
    first_head, num_heads, num_zones, num_tiles, inter_end, succ_end, start, num_rows, num_columns,
    part, GROUP: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr,
    P: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
) -> None:
    """Compute log2 of the mass that BM scouts of one head have on its columns: entry ``part`` of
    kept, see `score_scouts`. columns: [H, V]. Grid (RP / BM, heads here)."""
    local = tl.program_id(1).to(tl.int64)
    head = first_head + local
    keys += head // GROUP * stride_head
    columns += head * num_columns
    row, lane, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BLOCK), tl.arange(0, D)
    place = tl.load(rows + head * num_rows + row, mask=row < num_rows, other=-1)
    position = tl.where(place < 0, -1, start + place)
    top = tl.full([BM], -1e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    for zone in range(num_zones):
        q = load_rows(queries, (zone * num_heads + head) * RP, row, RP, D)
        first = tl.where(zone == 0, succ_end, tl.where(zone == 1, inter_end, 0)) * P
        stop = tl.where(zone == 0, num_tiles, tl.where(zone == 1, succ_end, inter_end)) * P
        for begin in range(0, num_columns, BLOCK):
            column = tl.load(columns + begin + lane, mask=begin + lane < num_columns, other=-1)
            here = (column >= first) & (column < stop)
            if tl.max(here.to(tl.int32), 0) != 0:
                block = tl.load(table + column // P, mask=here, other=0).to(tl.int64)
                source = block * stride_block + column % P * stride_token
                k = tl.load(keys + source[:, None] + d[None, :], mask=here[:, None], other=0.0)
                scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                seen = here[None, :] & (column[None, :] <= position[:, None])
                top, total = _add(top, total, tl.where(seen, scores, float("-inf")))
    target = (part * tl.num_programs(1) + local) * RP + row
    tl.store(kept + target, top + tl.log2(total))


@triton.jit(do_not_specialize=["first_head", "num_rows", "start", "num_tiles", "width"])
def list_tiles(
    missed, lse, rows, tiles, first_head, num_rows, start, num_tiles, width, least,
    RP: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
) -> None:
    """List the key tiles of one query tile: those where a logit of one of its scouts exceeds the
    scout's kept mass by more than ``least``, the largest ``width`` ones. tiles: [H, n, width]. Grid
    (n, heads here)."""
    local = tl.program_id(1).to(tl.int64)
    head = first_head + local
    row = tl.arange(0, RP)
    exists = row < num_rows
    place = tl.load(rows + head * num_rows + row, mask=exists, other=0)
    query_tile = start // P + tl.program_id(0)
    scout_tile = (start + place) // P
    first = tl.sum((exists & (scout_tile < query_tile)).to(tl.int32), 0)
    count = tl.sum((exists & (scout_tile == query_tile)).to(tl.int32), 0)
    tiles += (head * tl.num_programs(0) + tl.program_id(0)) * width
    i = tl.arange(0, WIDTH)
    if count == 0:  # as for most query tiles
        tl.store(tiles + i, tl.full([WIDTH], -1, tl.int32), mask=i < width)
        return
    tile = tl.arange(0, BLOCK)
    excess = tl.full([BLOCK], float("-inf"), tl.float32)
    source = missed + (local * num_tiles + tile) * RP
    for scout in range(first, first + count):
        logit = tl.load(source + scout, mask=tile < num_tiles, other=float("-inf"))
        excess = tl.maximum(excess, logit - tl.load(lse + local * RP + scout))
    excess -= least
    bits = tl.where(excess > 0, excess.to(tl.int32, bitcast=True), 0)
    k = tl.minimum(tl.sum((bits > 0).to(tl.int32), 0), width)
    bound = threshold_of(bits, None, BLOCK, k, k, BLOCK)
    chosen, target = chosen_of(bits, bound, k - count_above(bits, None, BLOCK, bound, BLOCK))
    tl.store(tiles + target - 1, tile, mask=chosen)
    tl.store(tiles + i, tl.full([WIDTH], -1, tl.int32), mask=(i >= k) & (i < width))
