"""The scouts' kernels, in Triton: which rows they are, what they keep and miss, lists of key tiles.
Terms and layouts are those of `triton_scouts`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longspan.ops.select.top_k import chosen_of, count_above, threshold_of
from longspan.ops.select.triton_tiles import SPANS, load_keys, load_rows, zone_tiles


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


@triton.jit(do_not_specialize=["first_head", *SPANS[1:]])
def score_scouts(
    queries, keys, table, is_column, missed, stride_block, stride_token, stride_head, first_head,
    num_heads, num_zones, num_tiles, inter_end, succ_end, rp, GROUP: tl.constexpr,
    BM: tl.constexpr, P: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
) -> None:
    """Find the largest logit, columns left out, of BM scouts of one head in every n-th key tile.

    No causal mask: what it would hide, the tile that a scout stands in and later ones, is never
    listed. missed: [heads here, tiles, RP]. Grid (programs, RP / BM, heads here).
    """
    program, local = tl.program_id(0), tl.program_id(2).to(tl.int64)
    head = first_head + local
    keys += head // GROUP * stride_head
    is_column += local * (num_tiles + 1) * P
    missed += local * num_tiles * rp
    row, lane = tl.program_id(1) * BM + tl.arange(0, BM), tl.arange(0, P)
    for zone in range(num_zones):
        first, stop = zone_tiles(zone, program, tl.num_programs(0), num_tiles, inter_end, succ_end)
        q = load_rows(queries, (zone * num_heads + head) * rp, row, rp, D)
        for tile in range(first, stop, tl.num_programs(0)):
            k = load_keys(keys, table, tile, stride_block, stride_token, P, D)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            taken = tl.load(is_column + tile * P + lane)
            scores = tl.where(taken[None, :] != 0, float("-inf"), scores)
            tl.store(missed + tile * rp + row, tl.max(scores, 1))


@triton.jit(do_not_specialize=["first_head", *SPANS[1:], "start", "num_rows", "num_columns"])
def score_columns(
    queries, keys, table, rows, columns, kept, stride_block, stride_token, stride_head,
    first_head, num_heads, num_zones, num_tiles, inter_end, succ_end, start, num_rows, num_columns,
    rp, GROUP: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr,
    D: tl.constexpr, PRECISION: tl.constexpr,
) -> None:
    """Compute log2 of the mass that BM scouts of one head have on a part of its columns.

    columns: [H, V]; kept: [>= parts, heads here, RP]. Grid (RP / BM, heads here, parts).
    """
    local, part = tl.program_id(1).to(tl.int64), tl.program_id(2)
    head = first_head + local
    keys += head // GROUP * stride_head
    columns += head * num_columns
    row, lane, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BLOCK), tl.arange(0, D)
    place = tl.load(rows + head * num_rows + row, mask=row < num_rows, other=-1)
    position = tl.where(place < 0, -1, start + place)
    share = tl.cdiv(tl.cdiv(num_columns, BLOCK), tl.num_programs(2)) * BLOCK
    top = tl.full([BM], -1e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    for zone in range(num_zones):
        q = load_rows(queries, (zone * num_heads + head) * rp, row, rp, D)
        first = tl.where(zone == 0, succ_end, tl.where(zone == 1, inter_end, 0)) * P
        stop = tl.where(zone == 0, num_tiles, tl.where(zone == 1, succ_end, inter_end)) * P
        for begin in range(part * share, tl.minimum(num_columns, (part + 1) * share), BLOCK):
            column = tl.load(columns + begin + lane, mask=begin + lane < num_columns, other=-1)
            here = (column >= first) & (column < stop)
            if tl.max(here.to(tl.int32), 0) != 0:
                block = tl.load(table + column // P, mask=here, other=0).to(tl.int64)
                source = block * stride_block + column % P * stride_token
                k = tl.load(keys + source[:, None] + d[None, :], mask=here[:, None], other=0.0)
                scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                seen = here[None, :] & (column[None, :] <= position[:, None])
                top, total = _add(top, total, tl.where(seen, scores, float("-inf")))
    target = (part * tl.num_programs(1) + local) * rp + row
    tl.store(kept + target, top + tl.log2(total))


@triton.jit(do_not_specialize=[
    "first_head", *SPANS[2:], "start", "num_rows", "num_windows", "part"])
def score_windows(
    queries, keys, table, rows, ends, offsets, is_column, kept, stride_block, stride_token,
    stride_head, first_head, num_heads, num_tiles, inter_end, succ_end, start, num_rows,
    num_windows, part, rp, GROUP: tl.constexpr, BM: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, PRECISION: tl.constexpr,
) -> None:
    """Compute log2 of the mass that the scouts of one query tile have in its windows, columns left
    out: entry ``part`` of kept.

    ends: [H, n + 1]; offsets: [H, W]. Grid (n, heads here).
    """
    index, local = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head = first_head + local
    bounds = ends + head * (tl.num_programs(0) + 1) + index
    first, stop = tl.load(bounds), tl.load(bounds + 1)
    if first == stop:  # as for most query tiles
        return
    keys += head // GROUP * stride_head
    offsets += head * num_windows
    is_column += local * (num_tiles + 1) * P
    kept += (part * tl.num_programs(1) + local) * rp
    tile, lane, i = start // P + index, tl.arange(0, P), tl.arange(0, WIDTH)
    gaps = tl.load(offsets + i, mask=i < num_windows, other=P) // -P  # -1: padding
    count = tl.sum(((gaps >= 0) & (gaps <= tile)).to(tl.int32), 0)
    for begin in range(first, stop, BM):
        row = begin + tl.arange(0, BM)
        place = tl.load(rows + head * num_rows + row, mask=row < stop, other=-1)
        position = tl.where(place < 0, -1, start + place)
        top = tl.full([BM], -1e30, tl.float32)
        total = tl.zeros([BM], tl.float32)
        for window in range(count):  # the nearest ones come first
            key_tile = tile + (tl.load(offsets + window) // P).to(tl.int32)
            zone = (key_tile < succ_end).to(tl.int32) + (key_tile < inter_end).to(tl.int32)
            q = load_rows(queries, (zone * num_heads + head) * rp, row, rp, D)
            k = load_keys(keys, table, key_tile, stride_block, stride_token, P, D)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            key = key_tile * P + lane
            seen = (key[None, :] <= position[:, None]) & (
                tl.load(is_column + key) == 0)[None, :]
            top, total = _add(top, total, tl.where(seen, scores, float("-inf")))
        tl.store(kept + row, top + tl.log2(total), mask=row < stop)


@triton.jit(do_not_specialize=["first_head", "first_tile", "num_tiles", "width"])
def list_tiles(
    missed, lse, is_window, ends, tiles, first_head, first_tile, num_tiles, width, least,
    rp, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
) -> None:
    """List the key tiles of one query tile: those but windows where a logit of one of its scouts
    exceeds the scout's kept mass by more than ``least``, the largest ``width`` ones. tiles: [H, n,
    width]. Grid (n, heads here)."""
    index, local = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head = first_head + local
    bounds = ends + head * (tl.num_programs(0) + 1) + index
    first, stop = tl.load(bounds), tl.load(bounds + 1)
    tiles += (head * tl.num_programs(0) + index) * width
    i = tl.arange(0, WIDTH)
    if first == stop:  # as for most query tiles
        tl.store(tiles + i, tl.full([WIDTH], -1, tl.int32), mask=i < width)
        return
    tile = tl.arange(0, BLOCK)
    excess = tl.full([BLOCK], float("-inf"), tl.float32)
    source = missed + (local * num_tiles + tile) * rp
    for scout in range(first, stop):
        logit = tl.load(source + scout, mask=tile < num_tiles, other=float("-inf"))
        excess = tl.maximum(excess, logit - tl.load(lse + local * rp + scout))
    gap = first_tile + index - tile
    seen = tl.load(is_window + local * num_tiles + gap, mask=gap >= 0, other=1)
    excess = tl.where(seen == 0, excess - least, -1.0)
    bits = tl.where(excess > 0, excess.to(tl.int32, bitcast=True), 0)
    found = tl.sum((bits > 0).to(tl.int32), 0)
    k = tl.minimum(found, width)
    bound = threshold_of(bits, None, found, k, k, BLOCK)  # 0, at once, where there are few
    chosen, target = chosen_of(bits, bound, k - count_above(bits, None, BLOCK, bound, BLOCK))
    tl.store(tiles + target - 1, tile, mask=chosen)
    tl.store(tiles + i, tl.full([WIDTH], -1, tl.int32), mask=(i >= k) & (i < width))
