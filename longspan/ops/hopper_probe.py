"""The two passes of `probe` on Hopper, in Gluon, over key tiles that need no mask.

A program keeps the rotated probe rows of one KV head's query heads in shared memory and walks key
tiles that a producer copies by TMA. Two consumers share the work on a tile, so one's exponentials
overlap with the other's matrix products, and each starts the next product before it reads the last.
Layouts of all inputs and results are those of `probe`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from longspan.ops.hopper_tile import TILE_LEN, is_hopper, key_tiles, query_halves
from longspan.ops.prefill import num_sms

HALF_LEN = 64
MAX_BLOCKS = 7
"""Blocks of 64 probe rows that fit in shared memory beside three key tiles."""

TILE = gl.constexpr(128)
HALF = gl.constexpr(64)
STAGES = gl.constexpr(3)


def supports(q: Tensor, k: Tensor, padded_rows: int) -> bool:
    """Whether these kernels can take the probes. q: [.., H, RP, D]; k: [N, P, K, D].

    Not 128 rows: pass 2 then gives sums that differ from run to run (log.md), so `probe` takes
    them.
    """
    return (is_hopper(q.device) and q.dtype in (torch.bfloat16, torch.float16)
            and q.shape[-1] == TILE_LEN == k.shape[1] and padded_rows == HALF_LEN
            and k.is_contiguous() and q.shape[1] // k.shape[2] > 1)


def head_groups(group: int) -> tuple[int, int]:
    """Programs that share a KV head's query heads, and heads in each: as many as fit in shared
    memory."""
    groups = -(-group // MAX_BLOCKS)
    return groups, -(-group // groups)


def num_parts(queries: Tensor, k: Tensor, num_kv_heads: int) -> int:
    """Programs along the keys: together one wave. Each leaves one partial result of `pass_one`."""
    groups, _ = head_groups(queries.shape[1] // k.shape[2])
    return max(1, num_sms(k.device) // (groups * num_kv_heads))


def pass_one(
    queries: Tensor, k: Tensor, block_table: Tensor, masses: Tensor, partial: Tensor,
    first_partial: int, heads: tuple[int, int], zones: tuple[int, int, int, int],
    tiles: tuple[int, int], probes: tuple[int, int, int, int, int],
) -> None:
    """Masses of the key ``tiles`` [low, high), as `probe.tile_masses` writes them, and the rows'
    log-sums over them.

    Args:
        queries: [zones, H, 64, D] rotated probe rows; k: [N, P, K, D].
        masses: [KV heads here, all tiles, G * 64] int64.
        partial: [parts, KV heads here, G * 64]; written from ``first_partial`` to the end.
        heads: the first KV head here, and how many.
        zones: how many, all key tiles, where the inter zone ends, where the succ zone does.
        probes: last, last_first, strided_first, step, num_rows.
    """
    group = queries.shape[1] // k.shape[2]
    groups, at_once = head_groups(group)
    num_zones, num_tiles, inter_end, succ_end = zones
    _mass_kernel[(num_parts(queries, k, heads[1]), groups, heads[1])](
        query_halves(queries), key_tiles(k), block_table, masses, partial, first_partial,
        heads[0], queries.shape[1], num_zones, num_tiles, *tiles, inter_end, succ_end,
        group * HALF_LEN, *probes, HEADS=at_once, num_warps=4)


def pass_two(
    queries: Tensor, k: Tensor, block_table: Tensor, lse: Tensor, masks: Tensor, columns: Tensor,
    heads: tuple[int, int], zones: tuple[int, int, int, int], tiles: tuple[int, int],
) -> None:
    """Column sums of the key ``tiles`` [low, high), as `probe.column_masses` writes them.

    lse: [heads here * 64]; masks: [heads here, all tiles] int64; columns: [heads here, S].
    Other arguments as in `pass_one`.
    """
    group = queries.shape[1] // k.shape[2]
    groups, at_once = head_groups(group)
    num_zones, num_tiles, inter_end, succ_end = zones
    _column_kernel[(num_parts(queries, k, heads[1]), groups, heads[1])](
        query_halves(queries), key_tiles(k), block_table, lse, masks, columns, heads[0],
        queries.shape[1], group, num_zones, num_tiles, *tiles, inter_end, succ_end,
        columns.shape[1], HEADS=at_once, num_warps=4)


@gluon.jit
def _barriers():
    """What the producer has filled and both consumers have done with: queries, ring of keys."""
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(k_empty.index(slot), count=2)
    fence_async_shared()
    return q_full, q_empty, k_full, k_empty


@gluon.jit
def _span(zone, low, high, inter_end, succ_end):
    """This program's key tiles of a zone within [low, high): the first, and how many."""
    step = gl.num_programs(0)
    start = gl.maximum(low, gl.where(zone == 0, succ_end, gl.where(zone == 1, inter_end, 0)))
    stop = gl.minimum(high, gl.where(zone == 0, high, gl.where(zone == 1, succ_end, inter_end)))
    behind = gl.maximum((start - gl.program_id(0) + step - 1) // step, 0)
    first = gl.program_id(0) + behind * step
    return first, gl.maximum((stop - first + step - 1) // step, 0)


@gluon.jit
def _producer(
    q_desc, k_desc, table, q_smem, k_smem, q_full, q_empty, k_full, k_empty, q_row, zone_rows,
    column, num_zones, low, high, inter_end, succ_end, HEADS: gl.constexpr,
):
    """For each zone the probe rows of each head, and the zone's key tiles."""
    i = num_zones * 0
    for zone in range(num_zones):
        first, count = _span(zone, low, high, inter_end, succ_end)
        mbarrier.wait(q_empty, (zone & 1) ^ 1)
        mbarrier.expect(q_full, HEADS * HALF * TILE * 2)
        for g in gl.static_range(HEADS):
            tma.async_copy_global_to_shared(
                q_desc, [zone * zone_rows + q_row + g * HALF, 0], q_full, q_smem.index(g))
        for n in range(count):
            row = gl.load(table + first + n * gl.num_programs(0)).to(gl.int32) * TILE
            slot = i % STAGES
            mbarrier.wait(k_empty.index(slot), (i // STAGES & 1) ^ 1)
            full = k_full.index(slot)
            mbarrier.expect(full, TILE * TILE * 2)
            tma.async_copy_global_to_shared(k_desc, [row, column], full, k_smem.index(slot))
            i += 1


@gluon.jit
def _zero(table, tile):
    """0, though the compiler cannot know: KV block numbers are never negative.

    What is computed with it stays in the loop over tiles. Moved out, weights of all places and sums
    of all rows would be kept in registers, of which there are too few.
    """
    return gl.minimum(gl.load(table + tile), 0).to(gl.int32)


@gluon.jit
def _offset(row, last, last_first, strided_first, step, num_rows):
    """Place of probe rows in their query tiles, fp32."""
    position = gl.where(row < last, last_first + row, strided_first + (row - last) * step)
    return (gl.where(row < num_rows, position, 0) % TILE).to(gl.float32)


@gluon.jit
def _fraction(part, whole):
    scaled = part / gl.maximum(whole, 1e-30) * 65535.0 + 0.5
    return gl.minimum(gl.maximum(scaled, 0.0), 65535.0).to(gl.int64)


@gluon.jit
def _row_masses(s, offset, places, SCORES: gl.constexpr):
    """See `probe._row_masses`: max, sum, and the sums on the next and the previous diagonal.

    places: 0, 1, ... of the tile's keys, fp32, in shared memory: worked out from the thread's
    number, which is slow to read, they cost four times all the rest.
    """
    keys = places.load(gl.SliceLayout(0, SCORES))
    top = gl.max(_folded_max(s), 1)
    top = gl.convert_layout(top, gl.SliceLayout(1, SCORES))
    mass = gl.exp2(s - top[:, None])
    distance = offset[:, None] - keys[None, :]
    total = _row_sum(mass, SCORES)
    ahead = _row_sum(mass * gl.maximum(distance, 0.0), SCORES)
    moment = _row_sum(mass * distance, SCORES)
    return top, total, ahead, ahead - moment


@gluon.jit
def _folded_max(x):
    """[64, 128] to [64, 32]: many short chains of operations in place of one long one."""
    return gl.max(gl.reshape(x, (HALF, 4, 32)), 1)


@gluon.jit
def _row_sum(x, SCORES: gl.constexpr):
    """Sum of each row of x [64, 128], folded first, see `_folded_max`."""
    folded = gl.sum(gl.reshape(x, (HALF, 4, 32)), 1)
    return gl.convert_layout(gl.sum(folded, 1), gl.SliceLayout(1, SCORES))


@gluon.jit
def _mass_consumer(
    table, masses, partial, q_smem, k_smem, places, q_full, q_empty, k_full, k_empty, rows,
    left, num_zones, low, high, inter_end, succ_end, last, last_first, strided_first, step,
    num_rows, FIRST: gl.constexpr, STOP: gl.constexpr,
):
    """Pass 1: masses of every tile for the heads [FIRST, STOP), and the rows' sums over them.

    masses, partial: where the first of this program's rows stands."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    lane = gl.arange(0, HALF, layout=gl.SliceLayout(1, SCORES))
    zeros = gl.zeros([HALF, TILE], gl.float32, SCORES)
    offset = _offset(lane, last, last_first, strided_first, step, num_rows)
    tops: gl.tuple = ()
    sums: gl.tuple = ()
    for _ in gl.static_range(FIRST, STOP):
        tops = tops + (gl.full([HALF], -1e30, gl.float32, gl.SliceLayout(1, SCORES)),)
        sums = sums + (gl.zeros([HALF], gl.float32, gl.SliceLayout(1, SCORES)),)
    i = num_zones * 0
    for zone in range(num_zones):
        first, count = _span(zone, low, high, inter_end, succ_end)
        mbarrier.wait(q_full, zone & 1)
        for n in range(count):
            tile = first + n * gl.num_programs(0)
            here = offset + _zero(table, tile).to(gl.float32)
            slot = i % STAGES
            mbarrier.wait(k_full.index(slot), i // STAGES & 1)
            keys = k_smem.index(slot).permute((1, 0))
            place = masses + tile.to(gl.int64) * rows + lane
            s = warpgroup_mma(q_smem.index(FIRST), keys, zeros, use_acc=False, is_async=True)
            new_tops: gl.tuple = ()
            new_sums: gl.tuple = ()
            for g in gl.static_range(FIRST, STOP):
                if g + 1 < STOP:
                    following = warpgroup_mma(
                        q_smem.index(g + 1), keys, zeros, use_acc=False, is_async=True)
                    scores = warpgroup_mma_wait(1, deps=[s])
                    s = following
                else:
                    scores = warpgroup_mma_wait(0, deps=[s])
                    mbarrier.arrive(k_empty.index(slot), count=1)
                top, total, ahead, behind = _row_masses(scores, here, places, SCORES)
                log = (top + gl.log2(total)).to(gl.int32, bitcast=True).to(gl.int64) & 0xFFFFFFFF
                packed = log | (_fraction(ahead, total * TILE) << 32) | (
                    _fraction(behind, total * TILE) << 48)
                gl.store(place + g * HALF, packed, lane * 0 + g < left)
                running = gl.maximum(tops[g - FIRST], top)
                new_sums = new_sums + (sums[g - FIRST] * gl.exp2(tops[g - FIRST] - running)
                                       + total * gl.exp2(top - running),)
                new_tops = new_tops + (running,)
            tops, sums = new_tops, new_sums
            i += 1
        mbarrier.arrive(q_empty, count=1)
    for g in gl.static_range(FIRST, STOP):
        gl.store(partial + g * HALF + lane, tops[g - FIRST] + gl.log2(sums[g - FIRST]),
                 lane * 0 + g < left)


@gluon.jit(do_not_specialize=[
    "first_partial", "first_kv_head", "num_heads", "num_zones", "num_tiles", "low", "high",
    "inter_end", "succ_end", "rows", "last", "last_first", "strided_first", "step", "num_rows"])
def _mass_kernel(
    q_desc, k_desc, table, masses, partial, first_partial, first_kv_head, num_heads, num_zones,
    num_tiles, low, high, inter_end, succ_end, rows, last, last_first, strided_first, step,
    num_rows, HEADS: gl.constexpr,
):
    """Pass 1 over the tiles [low, high). See `probe.tile_masses`.

    partial: one entry of each program, from ``first_partial`` on. Grid (programs, head groups, KV
    heads here).
    """
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [HEADS, HALF, TILE], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, TILE, TILE], k_desc.layout)
    places = gl.allocate_shared_memory(
        gl.float32, [TILE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    places.store(gl.arange(0, TILE, layout=gl.BlockedLayout([1], [32], [4], [0])).to(gl.float32))
    q_full, q_empty, k_full, k_empty = _barriers()
    kv = gl.program_id(2)
    zone_rows = num_heads * HALF
    row = gl.program_id(1) * HEADS * HALF
    q_row = (first_kv_head + kv) * rows + row
    column = (first_kv_head + kv) * TILE
    left = (rows - row) // HALF  # heads; a last program may have fewer than HEADS
    masses += kv.to(gl.int64) * num_tiles * rows + row
    partial += ((first_partial + gl.program_id(0)) * gl.num_programs(2) + kv) * rows + row
    gl.warp_specialize([
        (_mass_consumer, (
            table, masses, partial, q_smem, k_smem, places, q_full, q_empty, k_full, k_empty, rows,
            left, num_zones, low, high, inter_end, succ_end, last, last_first, strided_first, step,
            num_rows, gl.constexpr(0), gl.constexpr((HEADS + 1) // 2))),
        (_mass_consumer, (
            table, masses, partial, q_smem, k_smem, places, q_full, q_empty, k_full, k_empty, rows,
            left, num_zones, low, high, inter_end, succ_end, last, last_first, strided_first, step,
            num_rows, gl.constexpr((HEADS + 1) // 2), gl.constexpr(HEADS))),
        (_producer, (
            q_desc, k_desc, table, q_smem, k_smem, q_full, q_empty, k_full, k_empty, q_row,
            zone_rows, column, num_zones, low, high, inter_end, succ_end, gl.constexpr(HEADS))),
    ], [4, 1], [232, 40])


@gluon.jit
def _visible(log_sum, bits, SCORES: gl.constexpr):
    """log_sum [64], +inf for rows that see the tile through a window: their bits are set."""
    if bits != 0:
        probe = gl.arange(0, HALF, layout=gl.SliceLayout(0, SCORES))
        log_sum = gl.where((bits >> probe.to(gl.int64)) & 1 != 0, float("inf"), log_sum)
    return log_sum


@gluon.jit
def _column_consumer(
    masks, columns, q_smem, k_smem, lse_smem, q_full, q_empty, k_full, k_empty, head, left,
    num_zones, num_tiles, low, high, inter_end, succ_end, context_len, HEADS: gl.constexpr,
    CONSUMER: gl.constexpr,
):
    """Pass 2: column sums of one half of every tile. Its keys are the rows of the scores."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    KEYS: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    key = CONSUMER * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, SCORES))
    zeros = gl.zeros([HALF, HALF], gl.float32, SCORES)
    i = num_zones * 0
    for zone in range(num_zones):
        first, count = _span(zone, low, high, inter_end, succ_end)
        mbarrier.wait(q_full, zone & 1)
        for n in range(count):
            tile = first + n * gl.num_programs(0)
            slot = i % STAGES
            seen = masks + head.to(gl.int64) * num_tiles + tile
            bits: gl.tuple = ()
            for g in gl.static_range(HEADS):  # all at once: each takes as long as a product
                bits = bits + (gl.load(seen + gl.minimum(g, left - 1) * num_tiles),)
            mbarrier.wait(k_full.index(slot), i // STAGES & 1)
            keys = k_smem.index(slot).slice(CONSUMER * HALF, HALF).load(KEYS)
            mbarrier.arrive(k_empty.index(slot), count=1)
            place = columns + head.to(gl.int64) * context_len + tile * TILE + key
            s = warpgroup_mma(keys, q_smem.index(0).permute((1, 0)), zeros, use_acc=False,
                              is_async=True)
            for g in gl.static_range(HEADS):
                scores = warpgroup_mma_wait(0, deps=[s])
                # its branch may not lie between a product's start and its end
                log_sum = _visible(lse_smem.index(g).load(gl.SliceLayout(0, SCORES)),
                                   bits[g], SCORES)
                if g + 1 < HEADS:
                    s = warpgroup_mma(keys, q_smem.index(g + 1).permute((1, 0)), zeros,
                                      use_acc=False, is_async=True)
                total = gl.sum(gl.exp2(scores - log_sum[None, :]), 1)
                gl.store(place + g * context_len, total, key * 0 + g < left)
            i += 1
        mbarrier.arrive(q_empty, count=1)


@gluon.jit(do_not_specialize=[
    "first_kv_head", "num_heads", "group", "num_zones", "num_tiles", "low", "high", "inter_end",
    "succ_end", "context_len"])
def _column_kernel(
    q_desc, k_desc, table, lse, masks, columns, first_kv_head, num_heads, group, num_zones,
    num_tiles, low, high, inter_end, succ_end, context_len, HEADS: gl.constexpr,
):
    """Pass 2 over the tiles [low, high). See `probe.column_masses`. Grid (programs, head groups,
    KV heads here)."""
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [HEADS, HALF, TILE], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, TILE, TILE], k_desc.layout)
    lse_smem = gl.allocate_shared_memory(
        gl.float32, [HEADS, HALF], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full, q_empty, k_full, k_empty = _barriers()
    kv = gl.program_id(2)
    first_head = gl.program_id(1) * HEADS
    zone_rows = num_heads * HALF
    q_row = ((first_kv_head + kv) * group + first_head) * HALF
    column = (first_kv_head + kv) * TILE
    head = kv * group + first_head
    row = gl.arange(0, HALF, layout=gl.BlockedLayout([1], [32], [4], [0]))
    left = group - first_head
    for g in gl.static_range(HEADS):  # a last program may have fewer heads of its own
        lse_smem.index(g).store(gl.load(lse + (head + gl.minimum(g, left - 1)) * HALF + row))
    gl.warp_specialize([
        (_column_consumer, (
            masks, columns, q_smem, k_smem, lse_smem, q_full, q_empty, k_full, k_empty, head, left,
            num_zones, num_tiles, low, high, inter_end, succ_end, context_len, gl.constexpr(HEADS),
            gl.constexpr(0))),
        (_column_consumer, (
            masks, columns, q_smem, k_smem, lse_smem, q_full, q_empty, k_full, k_empty, head, left,
            num_zones, num_tiles, low, high, inter_end, succ_end, context_len, gl.constexpr(HEADS),
            gl.constexpr(1))),
        (_producer, (
            q_desc, k_desc, table, q_smem, k_smem, q_full, q_empty, k_full, k_empty, q_row,
            zone_rows, column, num_zones, low, high, inter_end, succ_end, gl.constexpr(HEADS))),
    ], [4, 1], [232, 40])
