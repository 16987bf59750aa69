"""The second pass of vertical-slash selection, in Triton: weights of single keys and diagonals.
Terms and layouts are those of `triton_tiles`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longspan.ops.select.triton_tiles import (
    PROBES,
    SPANS,
    load_keys,
    load_rows,
    position_of,
    zone_tiles,
)


@triton.jit
def _add_diagonals(mass, diagonals, base, tile, context_len, row, num_rows, P: tl.constexpr,
                   RP: tl.constexpr):
    """Add the token diagonals of one tile [P, RP] of consecutive rows. Entry i holds the distance
    context_len - 1 - i, so key and row together name entry key - row + num_rows - 1."""
    key, low = tl.arange(0, P), tl.arange(0, RP)
    source = key[:, None] + row[None, :]
    shifted = tl.gather(mass, tl.minimum(source, P - 1), 0)
    entry = tile * P + key + num_rows - 1
    tl.atomic_add(diagonals + base + entry, tl.sum(tl.where(source < P, shifted, 0.0), 1),
                  mask=entry < context_len, sem="relaxed")
    source = low[:, None] - RP + row[None, :]
    inside = (source >= 0) & (source < P)
    shifted = tl.gather(mass, tl.minimum(tl.maximum(source, 0), P - 1), 0)
    entry = tile * P + low - RP + num_rows - 1
    tl.atomic_add(diagonals + base + entry, tl.sum(tl.where(inside, shifted, 0.0), 1),
                  mask=(entry >= 0) & (entry < context_len), sem="relaxed")


@triton.jit
def _column_mass(queries, log_sum, k, PRECISION: tl.constexpr):
    """Return the weights [n, RP] of a head's probe rows on n keys, whether they see them or not.
    Keys stand in rows, so that sums over probe rows stay in a warp."""
    scores = tl.dot(k, tl.trans(queries), input_precision=PRECISION)
    return tl.exp2(scores - log_sum[None, :])


@triton.jit(do_not_specialize=[*PROBES, "width", "num_tiles"],
            do_not_specialize_on_alignment=["budgets", "is_window"])
def find_blocks(
    tiles, budgets, table, is_window, blocks, is_masked, width, num_tiles, last, last_first,
    last_step, strided_first, step, num_rows,
    RP: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
) -> None:
    """Find the KV blocks of listed tiles, and those in which some probe row's weights do not count:
    it stands before the tile's end, or has the tile as a window.

    tiles, blocks: [heads here, width] int32; is_masked: the same, int8. Grid (width / BLOCK, heads
    here).
    """
    head = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    listed = i < tl.minimum(tl.load(budgets + head), num_tiles)
    tile = tl.load(tiles + head * width + i, mask=listed, other=0)
    block = tl.load(table + tile, mask=listed, other=0)
    tl.store(blocks + head * width + i, block.to(tl.int32), mask=i < width)
    row = tl.arange(0, RP)
    position = position_of(row, last, last_first, last_step, strided_first, step, num_rows)
    gap = position[None, :] // P - tile[:, None]
    real = (position >= 0)[None, :] & listed[:, None]
    window = tl.load(is_window + head * num_tiles + gap, mask=real & (gap >= 0), other=1)
    found = tl.sum((real & (window != 0)).to(tl.int32), 1)
    tl.store(is_masked + head * width + i, (found > 0).to(tl.int8), mask=i < width)


@triton.jit(do_not_specialize=[*PROBES, *SPANS, "first_head", "width", "context_len"],
            do_not_specialize_on_alignment=["is_window", "budgets"])
def tile_columns(
    queries, keys, lse, is_window, tiles, blocks, is_masked, budgets, columns, stride_block,
    stride_token, stride_head, first_head, num_heads, num_zones, num_tiles, inter_end, succ_end,
    width, context_len, last, last_first, last_step, strided_first, step, num_rows,
    GROUP: tl.constexpr, RP: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
) -> None:
    """Run pass 2 in tile mode: weights that no window covers, summed over the probe rows of a head,
    for each key of some tiles. -1 for keys behind the context, and behind the end of the list.

    tiles: [heads here, width] int32 ascending, as many as ``budgets`` [heads here] says, with what
    `find_blocks` knows of them; columns: [heads here, width * P]. KEYS keys at once: little, so
    that several programs run on a multiprocessor, for each waits for one lookup after another. Grid
    (heads here, programs): heads of one KV head are at the same place of their lists together, and
    find its keys in the L2 cache.
    """
    SUB: tl.constexpr = P // KEYS
    program, num_programs = tl.program_id(1), tl.num_programs(1)
    head = tl.program_id(0).to(tl.int64)
    own = first_head + head
    keys += own // GROUP * stride_head
    tiles += head * width
    blocks += head * width
    is_masked += head * width
    is_window += head * num_tiles
    columns += head * width * P
    row, lane = tl.arange(0, RP), tl.arange(0, KEYS)
    position = position_of(row, last, last_first, last_step, strided_first, step, num_rows)
    log_sum = tl.load(lse + head * RP + row)
    count = tl.minimum(tl.load(budgets + head), num_tiles)
    i = tl.arange(0, WIDTH)
    listed = tl.load(tiles + i, mask=i < count, other=1 << 30)
    num_inter = tl.sum((listed < inter_end).to(tl.int32), 0)
    num_far = tl.sum((listed < succ_end).to(tl.int32), 0)
    share = tl.cdiv(count * SUB, num_programs)
    for zone in range(num_zones):
        first = tl.where(zone == 0, num_far, tl.where(zone == 1, num_inter, 0))
        stop = tl.where(zone == 0, count, tl.where(zone == 1, num_far, num_inter))
        q = load_rows(queries, (zone * num_heads + own) * RP, row, RP, D)
        for part in range(tl.maximum(first * SUB, program * share),
                          tl.minimum(stop * SUB, (program + 1) * share)):
            index, low = part // SUB, part % SUB * KEYS
            k = load_keys(keys + low * stride_token, blocks, index, stride_block, stride_token,
                           KEYS, D)
            key = tl.load(tiles + index) * P + low + lane
            mass = _column_mass(q, log_sum, k, PRECISION)
            if tl.load(is_masked + index) != 0:
                gap = tl.where(position < 0, -1, position // P - tl.load(tiles + index))
                seen = tl.load(is_window + gap, mask=gap >= 0, other=1) != 0
                mass = tl.where(seen[None, :], 0.0, mass)
            sums = tl.where(key < context_len, tl.sum(mass, 1), -1.0)
            tl.store(columns + part * KEYS + lane, sums)
    for part in range(count * SUB + program, width * SUB, num_programs):
        tl.store(columns + part * KEYS + lane, tl.full([KEYS], -1.0, tl.float32))


@triton.jit(do_not_specialize=[*PROBES, *SPANS, "context_len"])
def key_masses(
    queries, keys, table, lse, columns, diagonals, stride_block, stride_token, stride_head,
    first_kv_head, num_heads, num_zones, num_tiles, inter_end, succ_end, context_len, last,
    last_first, last_step, strided_first, step, num_rows,
    GROUP: tl.constexpr, RP: tl.constexpr, P: tl.constexpr, D: tl.constexpr, QG: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Run pass 2 in paper mode: weights summed over the probe rows of each head, for each key and
    for each token diagonal, which is consecutive rows' alone.

    lse: [heads here * RP]; columns, diagonals: [heads here, S], the latter 0 before. Grid
    (programs, head groups, KV heads here).
    """
    program, first_head, kv = tl.program_id(0), tl.program_id(1) * QG, tl.program_id(2)
    keys += (first_kv_head + kv).to(tl.int64) * stride_head
    row, key = tl.arange(0, RP), tl.arange(0, P)
    position = position_of(row, last, last_first, last_step, strided_first, step, num_rows)
    for zone in range(num_zones):
        first, stop = zone_tiles(zone, program, tl.num_programs(0), num_tiles, inter_end, succ_end)
        rows: tl.tuple = ()
        first_row = (zone * num_heads + (first_kv_head + kv) * GROUP + first_head) * RP
        for g in tl.static_range(QG):
            rows = rows + (load_rows(queries, first_row, g * RP + row, (GROUP - first_head) * RP,
                                      D),)
        for tile in range(first, stop, tl.num_programs(0)):
            k = load_keys(keys, table, tile, stride_block, stride_token, P, D)
            for g in tl.static_range(QG):
                if first_head + g < GROUP:
                    head = kv * GROUP + first_head + g
                    base = head.to(tl.int64) * context_len
                    log_sum = tl.load(lse + head * RP + row)
                    mass = _column_mass(rows[g], log_sum, k, PRECISION)
                    mass = tl.where(tile * P + key[:, None] <= position[None, :], mass, 0.0)
                    tl.store(columns + base + tile * P + key, tl.sum(mass, 1),
                             mask=tile * P + key < context_len)
                    _add_diagonals(mass, diagonals, base, tile, context_len, row, num_rows, P, RP)
