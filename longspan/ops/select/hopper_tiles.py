"""Pass 1 of `triton_tiles` on Hopper, in Gluon, over key tiles that need no mask.

A program keeps the rotated probe rows of one KV head's query heads in shared memory, in blocks of
64, and walks key tiles that a producer copies by TMA. Two consumers share the work on a tile, so
one's exponentials overlap with the other's matrix products, and each starts the next product before
it reads the last. Layouts of all inputs and results are those of `triton_tiles`.
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

from longspan.ops.tiles.hopper import TILE_LEN, is_hopper, key_tiles, query_halves
from longspan.ops.tiles.splits import num_sms

HALF_LEN = 64
MAX_BLOCKS = 7
"""Blocks of 64 probe rows that fit in shared memory beside three key tiles."""

TILE = gl.constexpr(128)
HALF = gl.constexpr(64)
STAGES = gl.constexpr(3)


def supports(q: Tensor, k: Tensor, padded_rows: int) -> bool:
    """Return whether this kernel can take the probes. q: [.., H, RP, D]; k: [N, P, K, D]."""
    return (is_hopper(q.device) and q.dtype in (torch.bfloat16, torch.float16)
            and q.shape[-1] == TILE_LEN == k.shape[1] and padded_rows % HALF_LEN == 0
            and _has_whole_rows(k) and q.shape[1] // k.shape[2] * padded_rows > HALF_LEN)


def _has_whole_rows(k: Tensor) -> bool:
    """Return whether the keys are those of a cache, or of some of its KV heads."""
    block, slot, head, dim = k.stride()
    return dim == 1 and head == k.shape[3] and block == k.shape[1] * slot


def block_groups(rows: int) -> tuple[int, int]:
    """Return how many programs share a KV head's probe rows, and how many blocks of 64 each has: as
    many as fit in shared memory."""
    blocks = rows // HALF_LEN
    groups = -(-blocks // MAX_BLOCKS)
    return groups, -(-blocks // groups)


def num_parts(queries: Tensor, k: Tensor, num_kv_heads: int) -> int:
    """Return the number of programs along the keys: together one wave. Each leaves one partial
    result of `pass_one`."""
    groups, _ = block_groups(queries.shape[1] // k.shape[2] * queries.shape[2])
    return max(1, num_sms(k.device) // (groups * num_kv_heads))


def pass_one(
    queries: Tensor, k: Tensor, block_table: Tensor, masses: Tensor, partial: Tensor,
    first_partial: int, heads: tuple[int, int], zones: tuple[int, int, int, int],
    tiles: tuple[int, int],
) -> None:
    """Compute the masses of the key ``tiles`` [low, high), as `triton_tiles.tile_masses` writes
    them, and the rows' log-sums over them.

    Args:
        queries: [zones, H, RP, D] rotated probe rows; k: [N, P, K, D].
        masses: [KV heads here, all tiles, G * RP] fp32.
        partial: [parts, KV heads here, G * RP]; written from ``first_partial`` to the end.
        heads: the first KV head here, and how many.
        zones: how many, all key tiles, where the inter zone ends, where the succ zone does.
    """
    _, num_heads, padded_rows, _ = queries.shape
    rows = num_heads // k.shape[2] * padded_rows
    groups, at_once = block_groups(rows)
    num_zones, num_tiles, inter_end, succ_end = zones
    _mass_kernel[(num_parts(queries, k, heads[1]), groups, heads[1])](
        query_halves(queries), key_tiles(k), block_table, masses, partial, first_partial,
        heads[0], num_heads * padded_rows, num_zones, num_tiles, *tiles, inter_end, succ_end, rows,
        BLOCKS=at_once, num_warps=4)


@gluon.jit
def _barriers(PARTS: gl.constexpr):
    """Allocate the barriers that say what the producer has filled and both consumers have done
    with: queries, ring of keys. A tile of keys is there with PARTS arrivals."""
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), count=PARTS)
        mbarrier.init(k_empty.index(slot), count=2)
    fence_async_shared()
    return q_full, q_empty, k_full, k_empty


@gluon.jit
def _span(zone, low, high, inter_end, succ_end):
    """Return this program's key tiles of a zone within [low, high): the first, and how many."""
    step = gl.num_programs(0)
    start = gl.maximum(low, gl.where(zone == 0, succ_end, gl.where(zone == 1, inter_end, 0)))
    stop = gl.minimum(high, gl.where(zone == 0, high, gl.where(zone == 1, succ_end, inter_end)))
    behind = gl.maximum((start - gl.program_id(0) + step - 1) // step, 0)
    first = gl.program_id(0) + behind * step
    return first, gl.maximum((stop - first + step - 1) // step, 0)


@gluon.jit
def _producer(
    q_desc, k_desc, table, q_smem, k_smem, q_full, q_empty, k_full, k_empty, q_row, zone_rows,
    column, num_zones, low, high, inter_end, succ_end, BLOCKS: gl.constexpr,
):
    """Load for each zone the blocks of probe rows, and the zone's key tiles."""
    i = num_zones * 0
    for zone in range(num_zones):
        first, count = _span(zone, low, high, inter_end, succ_end)
        mbarrier.wait(q_empty, (zone & 1) ^ 1)
        mbarrier.expect(q_full, BLOCKS * HALF * TILE * 2)
        for block in gl.static_range(BLOCKS):
            tma.async_copy_global_to_shared(
                q_desc, [zone * zone_rows + q_row + block * HALF, 0], q_full, q_smem.index(block))
        for n in range(count):
            row = gl.load(table + first + n * gl.num_programs(0)).to(gl.int32) * TILE
            slot = i % STAGES
            mbarrier.wait(k_empty.index(slot), (i // STAGES & 1) ^ 1)
            full = k_full.index(slot)
            mbarrier.expect(full, TILE * TILE * 2)
            tma.async_copy_global_to_shared(k_desc, [row, column], full, k_smem.index(slot))
            i += 1


@gluon.jit
def _folded_max(x):
    """Fold [64, 128] to [64, 32]: many short chains of operations in place of one long one."""
    return gl.max(gl.reshape(x, (HALF, 4, 32)), 1)


@gluon.jit
def _folded_sum(x):
    """See `_folded_max`."""
    return gl.sum(gl.reshape(x, (HALF, 4, 32)), 1)


@gluon.jit
def _mass_consumer(
    masses, partial, q_smem, k_smem, q_full, q_empty, k_full, k_empty, rows, left, num_zones, low,
    high, inter_end, succ_end, FIRST: gl.constexpr, STOP: gl.constexpr,
):
    """Compute the masses of every tile for the blocks [FIRST, STOP), and the rows' sums over them.

    masses, partial: where the first of this program's rows stands."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    lane = gl.arange(0, HALF, layout=ROWS)
    zeros = gl.zeros([HALF, TILE], gl.float32, SCORES)
    tops: gl.tuple = ()
    sums: gl.tuple = ()
    for _ in gl.static_range(FIRST, STOP):
        tops = tops + (gl.full([HALF], -1e30, gl.float32, ROWS),)
        sums = sums + (gl.zeros([HALF], gl.float32, ROWS),)
    i = num_zones * 0
    for zone in range(num_zones):
        first, count = _span(zone, low, high, inter_end, succ_end)
        mbarrier.wait(q_full, zone & 1)
        for n in range(count):
            slot = i % STAGES
            mbarrier.wait(k_full.index(slot), i // STAGES & 1)
            keys = k_smem.index(slot).permute((1, 0))
            place = masses + (first + n * gl.num_programs(0)).to(gl.int64) * rows + lane
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
                top = gl.convert_layout(gl.max(_folded_max(scores), 1), ROWS)
                mass = gl.exp2(scores - top[:, None])
                total = gl.convert_layout(gl.sum(_folded_sum(mass), 1), ROWS)
                gl.store(place + g * HALF, top + gl.log2(total), lane * 0 + g < left)
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
    "first_partial", "first_kv_head", "zone_rows", "num_zones", "num_tiles", "low", "high",
    "inter_end", "succ_end", "rows"])
def _mass_kernel(
    q_desc, k_desc, table, masses, partial, first_partial, first_kv_head, zone_rows, num_zones,
    num_tiles, low, high, inter_end, succ_end, rows, BLOCKS: gl.constexpr,
):
    """Run pass 1 over the tiles [low, high). See `triton_tiles.tile_masses`.

    partial: one entry of each program, from ``first_partial`` on. Grid (programs, groups of
    blocks, KV heads here).
    """
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [BLOCKS, HALF, TILE], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, TILE, TILE], k_desc.layout)
    q_full, q_empty, k_full, k_empty = _barriers(1)
    kv = gl.program_id(2)
    row = gl.program_id(1) * BLOCKS * HALF
    q_row = (first_kv_head + kv) * rows + row
    column = (first_kv_head + kv) * TILE
    left = (rows - row) // HALF  # blocks; a last program may have fewer than BLOCKS
    masses += kv.to(gl.int64) * num_tiles * rows + row
    partial += ((first_partial + gl.program_id(0)) * gl.num_programs(2) + kv) * rows + row
    gl.warp_specialize([
        (_mass_consumer, (
            masses, partial, q_smem, k_smem, q_full, q_empty, k_full, k_empty, rows, left,
            num_zones, low, high, inter_end, succ_end, gl.constexpr(0),
            gl.constexpr((BLOCKS + 1) // 2))),
        (_mass_consumer, (
            masses, partial, q_smem, k_smem, q_full, q_empty, k_full, k_empty, rows, left,
            num_zones, low, high, inter_end, succ_end, gl.constexpr((BLOCKS + 1) // 2),
            gl.constexpr(BLOCKS))),
        (_producer, (
            q_desc, k_desc, table, q_smem, k_smem, q_full, q_empty, k_full, k_empty, q_row,
            zone_rows, column, num_zones, low, high, inter_end, succ_end, gl.constexpr(BLOCKS))),
    ], [4, 1], [232, 40])
