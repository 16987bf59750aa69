"""Probe rows against all keys, in Triton: the first pass of vertical-slash selection, by tiles, and
what it shares with the second (`probe_keys`).

A probe row is one query position in one head. Heads of one KV head lie side by side, each padded
to RP rows, so that a key tile is loaded once for all of them: ROWS = G * RP rows for each KV head.
Scores carry scale * log2(e), so weights are powers of two. Each program walks every n-th key tile
(one KV block), so that all have the same share of those that need masks, zone after zone, each zone
with its own rotation of the queries.

Workspace for each (row, key tile) is one fp32 number: the log2 of the row's mass in the tile,
sinks left out.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Numbers that change from call to call: a kernel is not compiled anew for those that happen to be 1
# or multiples of 16.
PROBES = ["last", "last_first", "last_step", "strided_first", "step", "num_rows"]
SPANS = ["first_kv_head", "num_zones", "num_tiles", "inter_end", "succ_end"]


@triton.jit
def position_of(row, last, last_first, last_step, strided_first, step, num_rows):
    """Return the position of probe rows: those at the end first, then strided ones; -1 for
    padding."""
    position = tl.where(row < last, last_first + row * last_step,
                        strided_first + (row - last) * step)
    return tl.where(row < num_rows, position, -1)


@triton.jit(do_not_specialize=[
    *PROBES, "start", "chunk_start", "added_succ", "added_inter"])
def rotate_probes(
    q, inv_freq, out, stride_token, stride_head, start, chunk_start, added_succ, added_inter,
    factor, last, last_first, last_step, strided_first, step, num_rows, num_heads, rp,
    HALF: tl.constexpr, BLOCK: tl.constexpr,
) -> None:
    """Gather the probe rows of q [T, H, D] and rotate them for each zone at continuous positions.

    out: [zones, H, RP, D], rows of padding 0. Grid (RP / BLOCK, H, zones).
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1).to(tl.int64)
    position = position_of(row, last, last_first, last_step, strided_first, step, num_rows)
    _rotate(q, inv_freq, out, row, position, head, stride_token, stride_head, start, chunk_start,
            added_succ, added_inter, factor, num_heads, rp, HALF)


@triton.jit(do_not_specialize=["start", "chunk_start", "added_succ", "added_inter", "num_rows"])
def rotate_listed(
    q, inv_freq, out, rows, stride_token, stride_head, start, chunk_start, added_succ, added_inter,
    factor, num_rows, num_heads, rp, HALF: tl.constexpr, BLOCK: tl.constexpr,
) -> None:
    """Do as `rotate_probes`, for the rows of q that each head lists: rows [H, num_rows] int32."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1).to(tl.int64)
    place = tl.load(rows + head * num_rows + row, mask=row < num_rows, other=-1)
    _rotate(q, inv_freq, out, row, tl.where(place < 0, -1, start + place), head, stride_token,
            stride_head, start, chunk_start, added_succ, added_inter, factor, num_heads, rp, HALF)


@triton.jit
def _rotate(q, inv_freq, out, row, position, head, stride_token, stride_head, start, chunk_start,
            added_succ, added_inter, factor, num_heads, rp, HALF: tl.constexpr):
    """Write rows of this program's zone in out [zones, H, RP, D], from the queries at ``position``;
    0 where that is negative."""
    i = tl.arange(0, HALF)[None, :]
    real = (position >= 0)[:, None]
    source = q + (position - start).to(tl.int64)[:, None] * stride_token + head * stride_head + i
    x = tl.load(source, mask=real, other=0.0).to(tl.float32)
    y = tl.load(source + HALF, mask=real, other=0.0).to(tl.float32)
    frequency = tl.load(inv_freq + i)
    zone = tl.program_id(2)
    added = tl.where(zone == 0, 0, tl.where(zone == 1, added_succ, added_inter))
    angle = (position - chunk_start + added).to(tl.float32)[:, None] * frequency
    cos, sin = tl.cos(angle) * factor, tl.sin(angle) * factor
    target = out + ((zone * num_heads + head) * rp + row)[:, None] * (2 * HALF) + i
    tl.store(target, (x * cos - y * sin).to(out.dtype.element_ty))
    tl.store(target + HALF, (y * cos + x * sin).to(out.dtype.element_ty))


@triton.jit
def load_rows(queries, first_row, row, limit, D: tl.constexpr):
    """Load rows [BM, D] of the rotated probes; 0 beyond ``limit``."""
    d = tl.arange(0, D)
    source = queries + (first_row + row)[:, None].to(tl.int64) * D + d[None, :]
    return tl.load(source, mask=(row < limit)[:, None], other=0.0)


@triton.jit
def load_keys(keys, table, tile, stride_block, stride_token, P: tl.constexpr, D: tl.constexpr):
    """Load one KV block of one KV head, [P, D]."""
    token, d = tl.arange(0, P), tl.arange(0, D)
    block = tl.load(table + tile).to(tl.int64)
    return tl.load(keys + block * stride_block + token[:, None] * stride_token + d[None, :])


@triton.jit
def _stack(parts, N: tl.constexpr, NUM: tl.constexpr):
    """Stack a tuple of 1, 2 or 4 tensors [N] to [N, NUM].

    Stored at once, so that the warps of a program, which otherwise drift apart and let one's
    matrix products overlap with another's exponentials, meet once for each key tile.
    """
    if NUM == 1:
        stacked = parts[0]
    elif NUM == 2:
        stacked = tl.join(parts[0], parts[1])
    else:
        stacked = tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3]))
    return tl.reshape(stacked, (N, NUM))


@triton.jit
def zone_tiles(zone, program, num_programs, num_tiles, inter_end, succ_end):
    """Return a program's key tiles of a zone: every ``num_programs``-th one, [first, stop)."""
    start = tl.where(zone == 0, succ_end, tl.where(zone == 1, inter_end, 0))
    stop = tl.where(zone == 0, num_tiles, tl.where(zone == 1, succ_end, inter_end))
    behind = (start - program + num_programs - 1) // num_programs  # of its tiles, before the zone
    return program + tl.maximum(behind, 0) * num_programs, stop


@triton.jit
def _num_before(tile, first, step, most):
    """Return how many of first, first + step, ... lie before ``tile``, at most ``most``."""
    return tl.minimum(tl.maximum((tile - first + step - 1) // step, 0), most)


@triton.jit
def _row_masses(scores, position, tile, sink, P: tl.constexpr, MASKED: tl.constexpr):
    """Return the statistics of one tile for each row: max, sum, and the sum without the sinks."""
    if MASKED:
        key = tile * P + tl.arange(0, P)
        scores = tl.where(key[None, :] <= position[:, None], scores, float("-inf"))
    top = tl.max(scores, 1)
    if MASKED:
        top = tl.maximum(top, -1e30)  # a row before the tile sees none of it
    mass = tl.exp2(scores - top[:, None])
    total = tl.sum(mass, 1)
    beyond = total
    if MASKED:
        beyond = tl.sum(tl.where(key[None, :] >= sink, mass, 0.0), 1)
    return top, total, beyond


@triton.jit
def _add_tile(
    state, queries, k, position, tile, sink, masses, map_row, row, limit,
    P: tl.constexpr, BM: tl.constexpr, QN: tl.constexpr, PRECISION: tl.constexpr,
    WITH_MAP: tl.constexpr, MASKED: tl.constexpr,
):
    """Compute one key tile against all query blocks: store its masses, carry (max, sum) of each
    row."""
    tops, sums = state
    new_tops: tl.tuple = ()
    new_sums: tl.tuple = ()
    logs: tl.tuple = ()
    for block in tl.static_range(QN):
        scores = tl.dot(queries[block], tl.trans(k), input_precision=PRECISION)
        top, total, beyond = _row_masses(scores, position, tile, sink, P, MASKED)
        if WITH_MAP:
            logs = logs + (top + tl.log2(beyond),)
        running = tl.maximum(tops[block], top)
        new_sums = new_sums + (sums[block] * tl.exp2(tops[block] - running)
                               + total * tl.exp2(top - running),)
        new_tops = new_tops + (running,)
    if WITH_MAP:
        here = tl.arange(0, QN)[None, :] * BM + row[:, None]
        tl.store(masses + map_row + here, _stack(logs, BM, QN), mask=here < limit)
    return new_tops, new_sums


@triton.jit(do_not_specialize=[*PROBES, *SPANS, "sink_tiles", "mask_from", "sink"])
def tile_masses(
    queries, keys, table, masses, partial, stride_block, stride_token, stride_head,
    first_kv_head, num_heads, num_zones, num_tiles, inter_end, succ_end, sink_tiles,
    mask_from, sink, last, last_first, last_step, strided_first, step, num_rows,
    ROWS: tl.constexpr, RP: tl.constexpr, P: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
    QN: tl.constexpr, PRECISION: tl.constexpr, WITH_MAP: tl.constexpr, CLEAR: tl.constexpr,
) -> None:
    """Run pass 1: mass of each probe row in each key tile, and its log-sum over this program's
    tiles. Not CLEAR: only tiles that need masks; `hopper_tiles` takes the others.

    queries: [zones, H, RP, D]; masses: [KV heads here, tiles, ROWS] fp32; partial: [programs,
    KV heads here, ROWS]. Grid (programs, row groups, KV heads here).
    """
    program, first_block, kv = tl.program_id(0), tl.program_id(1) * QN, tl.program_id(2)
    step_tiles = tl.num_programs(0)
    keys += (first_kv_head + kv).to(tl.int64) * stride_head
    row = tl.arange(0, BM)
    position = position_of(row % RP, last, last_first, last_step, strided_first, step, num_rows)
    limit = ROWS - first_block * BM
    map_base = kv.to(tl.int64) * num_tiles * ROWS + first_block * BM
    tops: tl.tuple = ()
    sums: tl.tuple = ()
    for _ in tl.static_range(QN):
        tops = tops + (tl.full([BM], -1e30, tl.float32),)
        sums = sums + (tl.zeros([BM], tl.float32),)
    for zone in range(num_zones):
        first, stop = zone_tiles(zone, program, step_tiles, num_tiles, inter_end, succ_end)
        count = _num_before(stop, first, step_tiles, num_tiles)
        blocks: tl.tuple = ()
        first_row = (zone * num_heads + (first_kv_head + kv) * (ROWS // RP)) * RP
        for block in tl.static_range(QN):
            here = (first_block + block) * BM + row
            blocks = blocks + (load_rows(queries, first_row, here, ROWS, D),)
        clear = _num_before(sink_tiles, first, step_tiles, count)
        tail = tl.maximum(_num_before(mask_from, first, step_tiles, count), clear)
        for index in range(clear, tail if CLEAR else clear):
            tile = first + index * step_tiles
            k = load_keys(keys, table, tile, stride_block, stride_token, P, D)
            tops, sums = _add_tile(
                (tops, sums), blocks, k, position, tile, sink, masses,
                map_base + tile * ROWS, row, limit, P, BM, QN, PRECISION, WITH_MAP, False)
        for masked in range(clear + count - tail):  # sink tiles, and those probe rows lie in
            index = tl.where(masked < clear, masked, tail + masked - clear)
            tile = first + index * step_tiles
            k = load_keys(keys, table, tile, stride_block, stride_token, P, D)
            tops, sums = _add_tile(
                (tops, sums), blocks, k, position, tile, sink, masses,
                map_base + tile * ROWS, row, limit, P, BM, QN, PRECISION, WITH_MAP, True)
    target = partial + (program * tl.num_programs(2) + kv) * ROWS + first_block * BM + row
    for block in tl.static_range(QN):
        log_sum = tops[block] + tl.log2(sums[block])
        tl.store(target + block * BM, log_sum, mask=block * BM + row < limit)


@triton.jit(do_not_specialize=["num_programs", "size", "num_rows"])
def combine_logs(
    partial, lse, num_programs, size, num_rows, rp, NP: tl.constexpr, BLOCK: tl.constexpr,
) -> None:
    """Combine the partial sums to log2 of each row's whole mass; +inf for rows of padding, whose
    weights are then 0.

    partial: [programs, size]; lse: [size]. Grid (size / BLOCK).
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    program = tl.arange(0, NP)
    logs = tl.load(partial + program[:, None] * size + i[None, :],
                   mask=(program < num_programs)[:, None] & (i < size)[None, :],
                   other=float("-inf"))
    real = i % rp < num_rows
    top = tl.where(real, tl.max(logs, 0), 0.0)
    total = tl.sum(tl.exp2(logs - top[None, :]), 0)
    tl.store(lse + i, tl.where(real, top + tl.log2(total), float("inf")), mask=i < size)


@triton.jit(do_not_specialize=[*PROBES, "num_tiles"])
def diagonal_masses(
    masses, lse, sums, num_tiles, last, last_first, last_step, strided_first, step, num_rows,
    ROWS: tl.constexpr, RP: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
) -> None:
    """Sum the mass on each tile diagonal over the probe rows of a head. sums: [heads here, tiles].
    Grid (tiles / BLOCK, heads here)."""
    head = tl.program_id(1)
    gap = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, RP)
    position = position_of(row, last, last_first, last_step, strided_first, step, num_rows)
    tile = tl.where(position < 0, -1, position // P)[None, :] - gap[:, None]
    mass = _masses(masses, lse, tile, head, row, num_tiles, ROWS, RP)
    tl.store(sums + head.to(tl.int64) * num_tiles + gap, tl.sum(mass, 1), mask=gap < num_tiles)


@triton.jit
def _masses(masses, lse, tile, head, row, num_tiles, ROWS: tl.constexpr, RP: tl.constexpr):
    """Return the weights of a head's probe rows in key tiles, 0 where ``tile`` is negative. tile:
    [n, RP]."""
    group = ROWS // RP
    base = (head // group).to(tl.int64) * num_tiles * ROWS + head % group * RP + row
    exists = tile >= 0
    log = tl.load(masses + base[None, :] + tile.to(tl.int64) * ROWS, mask=exists,
                  other=float("-inf"))
    return tl.exp2(log - tl.load(lse + head * RP + row)[None, :])


@triton.jit(do_not_specialize=[*PROBES, "num_tiles"])
def free_masses(
    masses, lse, is_window, weights, num_tiles, last, last_first, last_step, strided_first, step,
    num_rows, ROWS: tl.constexpr, RP: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
) -> None:
    """Sum the mass in each key tile that no window covers over the probe rows of a head.

    is_window: [heads here, tiles] int8 by tile gap; weights: [heads here, tiles]. Grid (tiles /
    BLOCK, heads here).
    """
    head = tl.program_id(1)
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, RP)
    position = position_of(row, last, last_first, last_step, strided_first, step, num_rows)
    gap = tl.where(position < 0, -1, position // P)[None, :] - tile[:, None]
    windows = is_window + head.to(tl.int64) * num_tiles
    free = tl.load(windows + gap, mask=gap >= 0, other=1) == 0
    here = tl.where(free & (tile < num_tiles)[:, None], tile[:, None], -1)
    mass = _masses(masses, lse, here, head, row, num_tiles, ROWS, RP)
    tl.store(weights + head.to(tl.int64) * num_tiles + tile, tl.sum(mass, 1),
             mask=tile < num_tiles)
